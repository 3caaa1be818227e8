"""Whether a model may run as a stream is tried on a small copy of it, and what was found is kept."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
import transformers
from kinds import PLAIN, STREAMS, skeleton
from peft import LoraConfig, get_peft_model
from tiny import PAIRS, Stock, build, columns, gradients_of

from lora_dpo import DPOTrainer, places
from lora_dpo.config.recipe import LoraSection
from lora_dpo.engine import PairForward, attention, forked_states, proof, unsupported_reason
from lora_dpo.engine.proof import GRADIENT, LOSS, prove
from lora_dpo.engine.small_copy import HEAD, VOCABULARY, small_config, small_copy
from lora_dpo.model.lora import lora_config
from lora_dpo.training.planning.make_plan import keeps_states

QUICK = ("llama", "gemma4_text", "gpt_oss", "qwen3_5_text")
"""The others are tried in `make test-slow`."""


def a_copy(kind, **changes):
    model = small_copy(skeleton(kind))
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def small_of(**sizes):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))


def each(kinds):
    long = [pytest.mark.slow, pytest.mark.long]
    marks = {**dict.fromkeys(QUICK, ()), "kimi_linear": long}
    return [pytest.param(kind, marks=marks.get(kind, pytest.mark.slow)) for kind in kinds]


def test_there_are_as_many_kinds_as_are_promised():
    assert len(set(STREAMS)) >= 40
    assert {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "gemma4_text", "gpt_oss", "olmo3", "ministral3"} < {
        *STREAMS
    }
    assert {"lfm2", "qwen3_moe"} < {*STREAMS}
    assert "conv" in small_config(skeleton("lfm2").config).layer_types


@pytest.mark.parametrize("kind", each(STREAMS))
def test_a_small_copy_runs_as_a_stream(kind):
    found = prove(skeleton(kind))
    assert found.reason is None
    assert found.loss <= LOSS
    assert found.gradient <= GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_what_cannot_is_told_with_the_number_or_the_reason(kind):
    found = prove(skeleton(kind))
    assert found.reason is not None
    assert type(skeleton(kind)).__name__ in found.reason


def step(trainer_class, kind, seed, folder, tmp_path, dtype=torch.float32, **options):
    """Loss and LoRA gradients of a step on a small copy; of a mixture without the router's loss, which is of rows."""
    model = small_copy(skeleton(kind), seed=seed).to(dtype)
    if hasattr(model.config, "output_router_logits"):
        options["router_aux_loss_coef"] = 0.0
    trainer = build(trainer_class, model, folder, tmp_path, **options)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # of a model in float64 stock TRL's adapter is, too
            parameter.data = parameter.data.float()
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients_of(trainer), trainer


def assert_steps_are_stock_trls(kind, folder, tmp_path, **options):
    """Of up to three draws, and of these in float64 too: some models round float32 to more than the bound.

    A gated delta rule can divide by nearly zero; of Gemma 4's small copy stock TRL's own gradients in float32 are up to
    1e-3 from those in float64.
    """
    off = []
    for seed, dtype in itertools.product(range(3), (torch.float32, torch.float64)):
        try:
            stock, theirs, _ = step(Stock, kind, seed, folder, tmp_path, dtype, **options)
        except RuntimeError as error:
            if "got Double" not in str(error):  # torch multiplies no groups of experts in float64
                raise
            continue
        ours, gradients, trainer = step(DPOTrainer, kind, seed, folder, tmp_path, dtype, **options)
        assert trainer.engine.forward.streams
        assert ours == pytest.approx(stock, rel=1e-5)
        assert gradients.keys() == theirs.keys()
        off.append(apart(gradients, theirs))
        if off[-1] <= 3e-5:
            break
    assert min(off) <= 3e-5, off


def apart(ours, theirs):
    """The largest norm of a gradient's difference, of the largest norm of a gradient."""
    largest = max(gradient.norm() for gradient in theirs.values())
    return max((ours[name] - theirs[name]).norm() / largest for name in theirs)


@pytest.mark.parametrize("kind", each(STREAMS))
def test_a_step_has_stock_trls_loss_and_lora_gradients(kind, tiny_model_folder, tmp_path):
    options = {}
    if kind in ("falcon_h1", "nemotron_h"):
        options["lora"] = lora_config(small_copy(skeleton(kind)), LoraSection(rank=4))
    assert_steps_are_stock_trls(kind, tiny_model_folder, tmp_path, **options)


@pytest.mark.parametrize(("kind", "trunk"), [("llama", True), ("qwen3_5_text", True), ("gemma4_text", False)])
def test_layers_below_the_adapter_are_kept_where_those_above_need_no_more(kind, trunk, tiny_model_folder, tmp_path):
    assert prove(skeleton(kind)).trunk is trunk  # Gemma 4's last layers read the keys of layers below
    last = len(small_copy(skeleton(kind)).base_model.layers) - 1
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=rf".*\.layers\.{last}\..*proj\w*")
    assert_steps_are_stock_trls(kind, tiny_model_folder, tmp_path, lora=lora)


def test_a_small_vocabulary_is_enough():
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    assert prove(small_of(vocab_size=5, num_attention_heads=2, num_hidden_layers=2, **sizes)).reason is None


# --- what is wrong is found ------------------------------------------------------------------------


def a_state_that_leaks(monkeypatch):
    monkeypatch.setattr(forked_states.States, "branch", lambda self: self)


def a_stream_without_forks(monkeypatch):
    monkeypatch.setattr("lora_dpo.engine.pair_forward.fork", lambda layers, spans: None)


def a_window_that_is_wide(monkeypatch):
    right = attention.StreamPlan.mask
    monkeypatch.setattr(
        attention.StreamPlan, "mask", lambda self, q, before, window, like: right(self, q, before, None, like)
    )


def scores_without_a_cap(monkeypatch):
    right = attention.pair_attention
    monkeypatch.setattr(
        attention, "pair_attention", lambda *given, **named: right(*given, **{**named, "softcap": None})
    )


def sinks_that_are_left_out(monkeypatch):
    right = attention.pair_attention
    monkeypatch.setattr(attention, "pair_attention", lambda *given, **named: right(*given, **{**named, "sink_H": None}))


BREAKAGES = [
    ("qwen3_5_text", a_state_that_leaks),
    ("qwen3_5_text", a_stream_without_forks),
    ("gpt_oss", a_window_that_is_wide),
    ("gpt_oss", sinks_that_are_left_out),
    ("gemma2", scores_without_a_cap),
]


@pytest.mark.parametrize(("kind", "broken"), BREAKAGES)
def test_a_layer_that_is_broken_is_caught(kind, broken, monkeypatch):
    broken(monkeypatch)
    found = prove(skeleton(kind))
    assert found.reason is not None
    assert found.loss > 10 * LOSS
    assert "the engine's loss differs from plain passes by" in found.reason


def test_training_goes_on_by_trls_passes_with_the_reason(tiny_model_folder, tmp_path, monkeypatch, caplog):
    a_state_that_leaks(monkeypatch)
    losses = []
    for trainer_class in (DPOTrainer, Stock):
        model = a_copy("qwen3_5_text", rms_norm_eps=1.1e-6)  # no other test has tried this one
        trainer = build(trainer_class, model, tiny_model_folder, tmp_path)
        batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        if trainer_class is DPOTrainer:
            assert trainer.engine is None
    assert "on a small copy of Qwen3_5ForCausalLM the engine's loss differs from plain passes by" in caplog.text
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- what is tried ---------------------------------------------------------------------------------


def test_the_copy_has_every_kind_of_layer_and_every_flag_and_is_small():
    model = skeleton("qwen3_next")
    small = small_config(model.config)
    assert set(small.layer_types) == set(model.config.layer_types) == {"linear_attention", "full_attention"}
    assert len(small.layer_types) == small.num_hidden_layers == 4
    assert (small.vocab_size, small.head_dim) == (VOCABULARY, HEAD)
    kept = ("hidden_act", "norm_topk_prob", "rms_norm_eps", "linear_conv_kernel_dim", "rope_parameters")
    assert [getattr(small, name) for name in kept] == [getattr(model.config, name) for name in kept]
    copied = small_copy(model)
    assert sum(weight.numel() for weight in copied.parameters()) < 2e6
    assert {weight.device.type for weight in copied.parameters()} == {"cpu"}
    assert {weight.dtype for weight in copied.parameters()} == {torch.float32}


def test_a_list_with_an_item_a_layer_is_cut_where_each_kind_has_come():
    config = transformers.SmolLM3Config(num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0], vocab_size=500)
    small = small_config(config)
    assert small.no_rope_layers == [1, 1, 1, 0]
    assert small.num_hidden_layers == 4


def test_a_kind_of_layer_that_comes_late_is_in_the_copy():
    kinds = ["sliding_attention"] * 30 + ["full_attention"]
    config = transformers.Qwen3Config(
        num_hidden_layers=31, layer_types=kinds, use_sliding_window=True, sliding_window=64
    )
    small = small_config(config)
    assert set(small.layer_types) == set(kinds)
    assert small.sliding_window < 10


def test_caps_and_scales_are_of_a_size_that_matters():
    gemma = small_config(skeleton("gemma2").config)
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (2.0, 2.0)
    rope = small_config(skeleton("ministral3").config).rope_parameters
    assert rope["original_max_position_embeddings"] < 70


def test_frequencies_that_are_written_out_keep_their_head_width():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    config = transformers.Phi3Config(hidden_size=3072, num_attention_heads=32, rope_parameters=rope)
    small = small_config(config)
    assert small.hidden_size // small.num_attention_heads == 96
    assert prove(transformers.AutoModelForCausalLM.from_config(small)).reason is None


def test_the_draws_of_others_stay_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prove(skeleton("llama"))
    assert torch.equal(torch.rand(3), expected)


def test_no_generator_of_a_gpu_is_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)
    prove(skeleton("llama"))
    assert seeded == []


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_the_caller_has_switched_on_does_not_matter(around):
    with around():
        found = prove(skeleton("llama"))
    assert found.equal
    assert not found.double


def test_fused_kernels_that_want_a_gpu_do_not_matter(monkeypatch):
    from transformers.models.lfm2 import modeling_lfm2

    plain = modeling_lfm2.causal_conv1d_fn

    @functools.wraps(plain)
    def kernel(*given, **named):
        raise RuntimeError("Expected x.is_cuda() to be true, but got false.")

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", kernel)
    assert prove(skeleton("lfm2")).reason is None
    assert modeling_lfm2.causal_conv1d_fn is kernel


@pytest.mark.parametrize(("kind", "keeps"), [("llama", False), ("qwen3_5_text", True), ("lfm2", True), ("bamba", True)])
def test_the_plan_knows_layers_that_keep_a_state(kind, keeps):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    assert keeps_states(get_peft_model(small_copy(skeleton(kind)), lora)) is keeps


def test_recurrent_layers_have_their_own_forward_back():
    model = a_copy("qwen3_5_text")
    [first, *_] = forked_states.recurrent_layers(model.base_model.layers)
    moved = first.forward
    first.forward = moved  # as accelerate puts one in to move weights
    forward = PairForward(model)
    ids_RT = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]])
    call = {"input_ids": ids_RT, "attention_mask": torch.ones_like(ids_RT), "labels": ids_RT}
    model(**call, fused_lm_head=True).log_probs.sum().backward()
    assert forward.streams == 1
    forward.close()
    assert vars(first)["forward"] == moved
    others = forked_states.recurrent_layers(model.base_model.layers)[1:]
    assert not [layer for layer in others if "forward" in vars(layer)]


# --- it is kept ------------------------------------------------------------------------------------


def test_what_was_found_is_kept_for_the_process_and_on_the_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    tried = []

    def counted(model):
        tried.append(model)
        return prove(model)

    monkeypatch.setattr(proof, "prove", counted)
    model = a_copy("llama", rms_norm_eps=1.5e-6)
    assert unsupported_reason(model) is None
    assert unsupported_reason(a_copy("llama", rms_norm_eps=1.5e-6)) is None
    assert len(tried) == 1
    [file] = places.proofs().iterdir()
    stored = json.loads(file.read_text())
    assert stored["reason"] is None
    assert stored["loss"] <= LOSS
    assert unsupported_reason(a_copy("llama", rms_norm_eps=1.6e-6)) is None
    assert len(tried) == 2


def test_what_could_not_be_tried_is_tried_again(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    model = a_copy("llama", rms_norm_eps=1.7e-6)

    def short(model, *, seed):
        raise MemoryError("std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(proof, "prove", lambda model: prove(model, copy=short))
        assert "no small copy of LlamaForCausalLM can be tried" in unsupported_reason(model)
    assert not places.proofs().exists()
    assert unsupported_reason(model) is None


def test_another_engine_tries_again(monkeypatch):
    model, source = a_copy("llama"), proof.engine_source()
    key = proof.key_of(model)
    monkeypatch.setattr(proof, "engine_source", lambda: source[::-1])
    assert proof.key_of(model) != key


def test_the_time_that_another_run_took_is_not_told_as_this_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    model = a_copy("llama", rms_norm_eps=1.8e-6)
    assert proof.proof_of(model).line.endswith(" s)")
    assert proof.proof_of(model).line.endswith("(tried before)")


KEPT = '{"loss": 0.0, "gradient": 0.0, "reason": "kept", "trunk": true, "seconds": 0.1}'


@pytest.mark.parametrize(
    ("eps", "text", "reason"),
    [(2e-6, "", "tried"), (3e-6, "[]", "tried"), (4e-6, '{"loss": 0.0, "other": 1}', "tried"), (5e-6, KEPT, "kept")],
)
def test_a_file_that_says_it_is_believed_and_a_broken_one_is_not(monkeypatch, tmp_path, eps, text, reason):
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    monkeypatch.setattr(proof, "prove", lambda model: proof.Proof(0.0, 0.0, "tried"))
    model = a_copy("llama", rms_norm_eps=eps)  # no other test has tried this one
    places.proofs().mkdir()
    (places.proofs() / f"{proof.key_of(model)}.json").write_text(text)
    assert unsupported_reason(model) == reason


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "its attention has dropout"),
        ("qwen3_moe", {"output_router_logits": True}, "a term of the router's"),
    ],
)
def test_what_no_stream_can_run_is_said_without_trying(kind, changes, reason):
    assert reason in unsupported_reason(a_copy(kind, **changes))


def test_a_trained_head_is_none_for_a_stream():
    model = a_copy("llama")
    model.get_output_embeddings().requires_grad_(True)
    assert unsupported_reason(model) == "its output head is trained"

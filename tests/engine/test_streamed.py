"""A base whose weights visit the device: the same losses and gradients, few visits, and NaN where one is missed."""

import copy

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from tiny import LORA, PAIRS, assert_close, build, columns, gradients_of, tiny

from lora_dpo import DPOTrainer
from lora_dpo.engine.reference_cache import reference_name
from lora_dpo.engine.token_budget import StreamedBudget
from lora_dpo.errors import ModelError
from lora_dpo.model.lora import base_of
from lora_dpo.model.visiting import VisitingWeights, visiting_of

CPU = torch.device("cpu")
TOP = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
DROPOUT = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.2)


def four_layers(kind, *, nf4=False, count=4):
    extra = {"tie_word_embeddings": True} if kind == "gemma2" else {}
    model = tiny(kind, num_hidden_layers=count, **extra)
    if nf4:
        model.is_loaded_in_4bit = True
        for parent in list(model.base_model.layers.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, torch.nn.Linear):
                    setattr(parent, name, packed(part))
    return model.requires_grad_(False)


def packed(linear):
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    return layer


def trainer_of(kind, folder, tmp_path, stream, *, nf4=False, segment=None, count=4, **options):
    model = four_layers(kind, nf4=nf4, count=count)
    if stream != "off":
        VisitingWeights(model, CPU, layers=stream == "on")
    torch.manual_seed(3)
    trainer = build(DPOTrainer, model, folder, tmp_path, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = trainer.state.logging_steps = 9
    if segment is not None and stream == "on":
        trainer.engine.whole_step.budget.cap = segment
    return trainer


def step(trainer, seed=4):
    torch.manual_seed(seed)
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.training_step(trainer.model, batch)
    return float(loss), gradients_of(trainer)


@pytest.mark.parametrize("stream", ["embeddings", "on"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", dict(lora=TOP)),
        ("llama", dict(lora=DROPOUT)),
        ("llama", dict(nf4=True, segment=1)),
        ("qwen3", dict(segment=1)),
        ("gemma2", dict(segment=12)),
    ],
    ids=["llama", "top", "dropout", "nf4", "qwen3", "gemma2"],
)
def test_losses_and_gradients_are_those_of_a_base_that_stays(stream, kind, options, tiny_model_folder, tmp_path):
    loss, gradients = step(trainer_of(kind, tiny_model_folder, tmp_path, "off", **options))
    found, ours = step(trainer_of(kind, tiny_model_folder, tmp_path, stream, **options))
    assert found == pytest.approx(loss, rel=1e-5)
    assert_close(ours, gradients)


@pytest.mark.parametrize("lora", [LORA, TOP], ids=["all", "top"])
def test_a_layer_comes_twice_a_step_and_three_times_where_references_are_scored(lora, tiny_model_folder, tmp_path):
    trainer = trainer_of("llama", tiny_model_folder, tmp_path, "on", lora=lora, segment=1, count=6)
    visiting = visiting_of(base_of(trainer.model))
    resident = Watched(visiting)
    step(trainer)
    for known, most, all_of_them in ((True, 2, 12), (True, 2, 12), (False, 3, 18)):
        visiting.reads.clear()
        visiting.head_rows_read = 0
        trainer.engine.scoring_tokens = 1
        if not known:
            trainer.engine.references._known.clear()
            trainer.engine.references.path = None
        step(trainer)
        assert max(visiting.reads.values()) <= most
        assert 6 <= sum(visiting.reads.values()) <= all_of_them
        assert visiting.head_rows_read <= most * 300  # the vocabulary
    assert max(map(len, resident.seen)) == 2
    # the pairs ran through each layer one after the other, and came back so
    assert len(resident.calls) >= len(PAIRS) * 2 * 2


class Watched:
    """Notes each call of `arrive`, and which layers were there after it."""

    def __init__(self, visiting):
        self.calls, self.seen, real = [], [], visiting.arrive

        def arrive(number):
            real(number)
            self.calls.append(number)
            self.seen.append(visiting.resident)

        visiting.arrive = arrive


def test_layers_are_run_again_from_the_top_all_pairs_of_one_before_the_next(tiny_model_folder, tmp_path):
    trainer = trainer_of("llama", tiny_model_folder, tmp_path, "on", segment=1)
    step(trainer)
    watched = Watched(visiting_of(base_of(trainer.model)))
    step(trainer)
    turns = [number for at, number in enumerate(watched.calls) if at == 0 or watched.calls[at - 1] != number]
    assert turns == [0, 1, 2, 3, 2, 1, 0]


def test_what_is_away_is_nan_and_keeps_its_look():
    for nf4 in (False, True):
        model, stays = four_layers("llama", nf4=nf4), four_layers("llama", nf4=nf4)
        visiting = VisitingWeights(model, CPU, layers=True)
        ids = torch.tensor([[1, 5, 6]])
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, stays(ids).logits, atol=1e-5)
            away = model.base_model.layers[0].mlp.up_proj
            assert 0 not in visiting.resident
            assert away(torch.ones(1, 32)).isnan().all()
            assert model.lm_head.weight.isnan().all()
        like = stays.base_model.layers[0].mlp.up_proj.weight
        assert (away.weight.shape, away.weight.dtype) == (like.shape, like.dtype)
        assert torch.equal(visiting.value(away.weight), like)
        assert away.weight.untyped_storage().nbytes() < 8


def test_a_padding_token_beyond_the_rows_that_come_is_no_error():
    model = tiny("llama", pad_token_id=299).requires_grad_(False)
    with torch.no_grad():
        stays = model(torch.tensor([[1, 299]])).logits
        VisitingWeights(model, CPU, layers=False)
        assert torch.allclose(model(torch.tensor([[1, 299]])).logits, stays, atol=1e-5)
    assert model.get_input_embeddings().padding_idx == 299


def test_a_layer_that_leaves_too_early_is_seen(tiny_model_folder, tmp_path):
    """Were a layer sent away while it is run again, its gradients would be NaN, and no number that looks right."""
    trainer = trainer_of("llama", tiny_model_folder, tmp_path, "on")
    step(trainer)
    visiting = visiting_of(base_of(trainer.model))
    middle = base_of(trainer.model).base_model.layers[1].mlp
    middle.register_full_backward_hook(lambda *_: visiting.leave())
    _, gradients = step(trainer)
    assert any(gradient.isnan().any() for gradient in gradients.values())


@pytest.mark.parametrize("stream", ["embeddings", "on"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_answers_and_evaluations_are_those_of_a_base_that_stays(kind, stream, tiny_model_folder, tmp_path):
    found = []
    for one in ("off", stream):
        trainer = trainer_of(kind, tiny_model_folder, tmp_path / one, one, segment=1)
        step(trainer)
        with torch.no_grad():
            answer = trainer.model.eval().generate(torch.tensor([[1, 5, 6, 7]]), max_new_tokens=6, do_sample=False)
        measured = trainer.evaluate()
        found.append((answer.tolist(), measured["eval_loss"], measured["eval_logps/chosen"]))
    assert found[1][0] == found[0][0]
    assert found[1][1:] == pytest.approx(found[0][1:], rel=1e-5)


def test_a_reference_has_the_same_name(tiny_model_folder, tmp_path):
    for nf4 in (False, True):
        names = {
            reference_name(trainer_of("llama", tiny_model_folder, tmp_path, one, nf4=nf4).model, torch.float32)
            for one in ("off", "embeddings", "on")
        }
        assert len(names) == 1


def test_the_budget_halves_what_runs_through_a_layer_first():
    budget = StreamedBudget(
        layers=4, may_checkpoint=True, checkpoint_bytes=0, cap=1 << 16, free=lambda: 1_000_000,
        set_checkpointing=lambda count: None, stream_bytes=100,
    )  # fmt: skip
    budget.measure(lambda: 100.0, longest=500)
    assert (budget.segment, budget.tokens) == (1500, 3000)  # 600,000 free: half at 200 a token, then 100 a token
    budget.shrink(500)
    assert (budget.segment, budget.tokens) == (750, 3000)
    budget.shrink(500)
    budget.shrink(500)
    assert (budget.segment, budget.tokens) == (500, 1500)
    budget.shrink(500)
    budget.shrink(500)
    assert budget.shrink(500) is None
    for _ in range(1024):
        budget.measure(lambda: 0.0, longest=500)
    assert (budget.segment, budget.tokens) == (500, 1000)


def test_two_trees_over_weights_that_visit_are_refused():
    model = four_layers("llama")
    VisitingWeights(model, CPU, layers=True)
    with pytest.raises(ModelError, match=r"model\.stream"):
        copy.deepcopy(model)

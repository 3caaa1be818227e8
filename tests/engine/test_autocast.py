"""A float32 base under autocast, TRL's default on a GPU: in bf16, and in fp16 as on cards before Ampere.

Here the CPU's autocast stands in for it. fp16 is given to a trainer that asked for bf16: accelerate wants a GPU for it.
"""

import math

import pytest
import torch
from tiny import PAIRS, build, columns, gradients_of, tiny

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.engine import attention
from lora_dpo.engine.pair_batch import PairBatch, model_inputs


@pytest.fixture(autouse=True, params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def half(request, monkeypatch):
    """The 16-bit type that products run in."""
    monkeypatch.setattr("lora_dpo.training.dpo_trainer.pick_dtype", lambda *_: "bfloat16")
    if request.param == torch.float16:
        monkeypatch.setattr(
            "accelerate.accelerator.get_mixed_precision_context_manager",
            lambda on, *_: torch.autocast("cpu", torch.float16, enabled=bool(on)),
        )
    return request.param


def fresh(folder, tmp_path, **options):
    trainer = build(DPOTrainer, tiny("llama"), folder, tmp_path, **{"bf16": True, "logging_steps": 1, **options})
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.zero_()
    return trainer


def watch(trainer):
    """The dtypes in which the first layer's products are made, under autocast and not."""
    seen = set()
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_accumulation_steps": 2}])
def test_a_fresh_adapter_starts_at_ln_2(options, tiny_model_folder, tmp_path):
    for _ in range(2):  # the second run reads what the first one scored
        trainer = fresh(tiny_model_folder, tmp_path, per_device_train_batch_size=2, max_steps=2, **options)
        assert trainer.engine is not None
        assert trainer.check_reference() < 1e-5
        trainer.train()
        # other packings round otherwise; scored in float32 they are off by some 0.03 a token
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=2e-3)


def test_the_reference_is_scored_in_the_precision_that_trains(half, tiny_model_folder, tmp_path):
    trainer = fresh(tiny_model_folder, tmp_path)
    seen = watch(trainer)
    trainer.engine.with_reference(trainer.data_collator(columns(PAIRS)))
    assert seen == {half}


def test_queries_and_keys_are_cast_once_and_the_keys_stay_one_a_group(half, tiny_model_folder, tmp_path, monkeypatch):
    seen = []
    right = attention.scaled_dot_product_attention

    def watched(query, key, value, **options):
        assert key.stride(1) == value.stride(1) == 0
        seen.append((query.dtype, key.dtype, value.dtype))
        return right(query, key, value, **options)

    trainer = fresh(tiny_model_folder, tmp_path)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    trainer.train()
    # in float32 the engine is held against TRL's own pass, before the first step
    assert set(seen) == {(torch.float32,) * 3, (half,) * 3}


def test_memory_is_measured_as_training_keeps_it(tiny_model_folder, tmp_path):
    trainer = fresh(tiny_model_folder, tmp_path)
    batch = trainer.data_collator(columns(PAIRS))
    measured = trainer.engine.kept_bytes(PairBatch.of(batch))
    trainer.accelerator.prepare_model(trainer.model)  # as `train` does: autocast is put around its forward
    shortest = PairBatch.of(batch).select([3]).inputs  # 4 + 6 - 2 tokens, of which 2 stand once
    with trainer.engine.forward.count_kept() as kept, trainer.engine.forward.log(False):
        trainer.model(**model_inputs(shortest))
    assert measured == pytest.approx(sum(kept.values()) / 6, rel=1e-6)


def test_parts_have_the_gradient_of_the_whole(tiny_model_folder, tmp_path):
    found = []
    for tokens in ("auto", 14):
        trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, bf16=True,
                        engine=EngineSection(tokens=tokens))  # fmt: skip
        trainer.accelerator.prepare_model(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.max_steps, trainer.state.logging_steps = 1, 1
        trainer.training_step(trainer.model, trainer.data_collator(columns(PAIRS)))
        found.append(torch.cat([value.flatten() for value in gradients_of(trainer).values()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.03  # bf16's 8 bits


def test_what_an_untrained_policy_orders_is_no_prediction(tiny_model_folder, tmp_path):
    # Other packings round otherwise, in bf16 by more than the margin of a policy that has moved a little.
    trainer = fresh(tiny_model_folder, tmp_path, max_steps=2, learning_rate=0.0)
    cache, scored = trainer.engine.references, {}
    put = cache.put
    cache.put = lambda values: (put(values), scored.update(values))
    trainer.engine.with_reference(trainer.data_collator(columns(PAIRS)))
    put({key: logps._replace(chosen_head=logps.chosen_head - 0.01) for key, logps in scored.items()})
    trainer.train()
    assert all(row["rewards/margins"] > 0 for row in trainer.state.log_history if "loss" in row)
    assert not [row for row in trainer.state.log_history if "first_sight/prompts" in row]
    assert {row["rewards/accuracies"] for row in trainer.state.log_history if "loss" in row} == {0.0}


def test_the_guard_does_not_compare_with_what_another_packing_gave(tiny_model_folder, tmp_path):
    trainer = fresh(tiny_model_folder, tmp_path)
    cache, scored = trainer.engine.references, {}
    put = cache.put
    cache.put = lambda values: (put(values), scored.update(values))
    trainer.engine.with_reference(trainer.data_collator(columns(PAIRS)))
    put({key: logps._replace(chosen_head=logps.chosen_head - 0.5) for key, logps in scored.items()})
    assert trainer.check_reference() < 1e-5


def test_a_base_of_two_precisions_is_held_against_trls_pass_under_autocast(tiny_model_folder, tmp_path):
    # norms in float32 over layers in 16 bits, as some loaders leave them: without autocast neither way runs
    model = tiny("llama").to(torch.bfloat16)
    for name, part in model.named_modules():
        if name.endswith("norm"):
            part.float()
    trainer = build(DPOTrainer, model, tiny_model_folder, tmp_path, bf16=True)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.zero_()
    trainer.train()
    assert trainer.engine is not None
    assert trainer.engine.forward.streams > 0

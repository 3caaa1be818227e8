"""The whole-batch step: any split, any loss, the same gradient; memory that runs out makes it slower, not another."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import LORA, PAIRS, Stock, assert_close, build, columns, gradients_of, pair, tiny

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.config.trl_dpo import LOSSES
from lora_dpo.engine import lay_out
from lora_dpo.engine.layout import pack, stream_length
from lora_dpo.engine.pair_batch import PairBatch
from lora_dpo.engine.reference_cache import ReferenceCache
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.engine.token_budget import TokenBudget, fit
from lora_dpo.engine.whole_step import couples_pairs
from lora_dpo.model.device import container_bytes, peak_of_process
from lora_dpo.training.run_summary import peak_memory


def step(trainer, batches=(PAIRS,)):
    """One optimiser step's gradients, loss and metrics, through `training_step` as the loop calls it."""
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.state.max_steps, trainer.state.logging_steps = 1, 1
    loss = 0.0
    for batch in batches:
        loss += float(trainer.training_step(trainer.model, trainer.data_collator(columns(batch))))
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return gradients_of(trainer), loss, metrics


def engine_step(folder, tmp_path, tokens="auto", pairs=PAIRS, batches=None, split_pairs=False, kind="llama", **options):
    engine = EngineSection(tokens=tokens, split_pairs=split_pairs)
    trainer = build(DPOTrainer, tiny(kind), folder, tmp_path, pairs=pairs, engine=engine, **options)
    return *step(trainer, batches or (pairs,)), trainer


OPTIONS = [
    {},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]},
    {"loss_type": ["aot"], "label_smoothing": 0.1},
    {"loss_type": ["aot_unpaired", "sft"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1},
    {"ld_alpha": 0.4},
    {"use_weighting": True},
    {"gradient_checkpointing": True},
]


def name_of(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "sigmoid"


@pytest.mark.parametrize(
    "split", [{"tokens": 1}, {"tokens": 20}, {"split_pairs": True}], ids=["least", "some", "branches"]
)
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_any_split_has_the_gradient_the_loss_and_the_metrics_of_the_whole(options, split, tiny_model_folder, tmp_path):
    whole = engine_step(tiny_model_folder, tmp_path, **options)
    parts = engine_step(tiny_model_folder, tmp_path, **split, **options)
    assert whole[3].engine.last.parts == 1
    assert parts[3].engine.last.parts == {1: 3, 20: 2}.get(split.get("tokens"), 8)
    assert parts[1] == pytest.approx(whole[1], rel=2e-6)
    assert parts[2] == pytest.approx(whole[2], rel=2e-5, abs=1e-6)
    assert_close(parts[0], whole[0])


def test_measuring_the_memory_draws_no_random_numbers(tiny_model_folder, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, lora=lora, disable_dropout=False)
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    before = torch.get_rng_state()
    trainer.compute_loss(trainer.model, batch)
    assert not torch.equal(torch.get_rng_state(), before)  # a pass does draw
    before = torch.get_rng_state()
    assert trainer.engine.kept_bytes(PairBatch.of(batch)) > 0
    assert torch.equal(torch.get_rng_state(), before)


WEIGHTS = [0.25, 2.0, 0.0, 1.75]


def weighted_step(folder, tmp_path, weights, engine=None, **options):
    trainer = build(DPOTrainer, tiny("llama"), folder, tmp_path, engine=engine, weights=weights, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 1, 1
    [batch] = trainer.get_train_dataloader()
    loss = float(trainer.training_step(trainer.model, batch))
    return gradients_of(trainer), loss


@pytest.mark.parametrize("split", [{}, {"tokens": 1}, {"split_pairs": True}], ids=["whole", "parts", "branches"])
@pytest.mark.parametrize("options", [{}, {"loss_type": ["ipo"]}, {"ld_alpha": 0.4}], ids=name_of)
def test_a_weighted_step_is_the_weighted_mean_of_its_pairs_gradients(options, split, tiny_model_folder, tmp_path):
    found, loss = weighted_step(tiny_model_folder, tmp_path, WEIGHTS, EngineSection(**split), **options)
    alone = [engine_step(tiny_model_folder, tmp_path, pairs=[one], **options) for one in PAIRS]
    expected = {
        name: sum(weight * one[0][name] for weight, one in zip(WEIGHTS, alone, strict=True)) / 4 for name in found
    }
    assert_close(found, expected)
    assert loss == pytest.approx(sum(one[1] for one in alone) / 4, rel=1e-5)  # the loss itself is TRL's mean


def test_weights_of_one_change_nothing(tiny_model_folder, tmp_path):
    found, _ = weighted_step(tiny_model_folder, tmp_path, [1.0] * 4)
    plain, *_ = engine_step(tiny_model_folder, tmp_path)
    assert_close(found, plain, rtol=2e-6)  # the loader shuffles


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "discopop"])
def test_every_loss_in_parts_has_stock_trls_gradient(loss, tiny_model_folder, tmp_path):
    # discopop's temperature of 0.05 makes stock's own float32 error larger than this bound (test_shared_prefix.py)
    options = {"loss_type": [loss]}
    if loss in ("exo_pair", "robust", "aot", "aot_unpaired"):
        options["label_smoothing"] = 0.1
    stock = build(Stock, tiny("llama"), tiny_model_folder, tmp_path, **options)
    stock_loss = stock.compute_loss(stock.model, stock._prepare_inputs(stock.data_collator(columns(PAIRS))))
    stock_loss.backward()
    gradients, ours, metrics, _ = engine_step(tiny_model_folder, tmp_path, tokens=14, **options)
    assert ours == pytest.approx(stock_loss.item(), rel=2e-6, abs=1e-7)
    assert metrics == pytest.approx({name: v[0] for name, v in stock._metrics["train"].items()}, rel=2e-5, abs=1e-6)
    assert_close(gradients, gradients_of(stock))


def test_accumulated_batches_are_one_batch(tiny_model_folder, tmp_path):
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]}
    whole = engine_step(tiny_model_folder, tmp_path, **options)
    gathered = engine_step(tiny_model_folder, tmp_path, batches=[PAIRS[:1], PAIRS[1:2], PAIRS[2:]], **options)
    assert gathered[1] == pytest.approx(whole[1], rel=2e-6)
    assert gathered[2] == pytest.approx(whole[2], rel=2e-5, abs=1e-6)
    assert_close(gathered[0], whole[0])


def trained(trainer_class, folder, tmp_path, pairs, **options):
    trainer = build(trainer_class, tiny("llama"), folder, tmp_path, pairs=pairs, logging_steps=1, **options)
    trainer.reference_guard = False  # `build` draws B, so that the policy is not the reference
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_one_by_four_trains_like_four_by_one(tiny_model_folder, tmp_path):
    options = dict(max_steps=3, learning_rate=1e-3, lr_scheduler_type="constant")
    apart = trained(DPOTrainer, tiny_model_folder, tmp_path, PAIRS, per_device_train_batch_size=1,
                    gradient_accumulation_steps=4, **options)  # fmt: skip
    together = trained(DPOTrainer, tiny_model_folder, tmp_path, PAIRS, per_device_train_batch_size=4, **options)
    assert apart[0] == pytest.approx(together[0], rel=1e-5)
    for name, value in together[1].items():
        assert torch.allclose(apart[1][name], value, atol=2e-5), name


def test_twenty_steps_follow_stock_trls_trajectory(tiny_model_folder, tmp_path):
    # SGD: Adam's first steps divide by |gradient|, which turns a rounded zero into a full step
    options = dict(
        max_steps=20, learning_rate=0.05, optim="sgd", per_device_train_batch_size=2, lr_scheduler_type="linear"
    )
    ours = trained(DPOTrainer, tiny_model_folder, tmp_path, PAIRS, **options)
    stock = trained(Stock, tiny_model_folder, tmp_path, PAIRS, **options)
    assert len(ours[0]) == 20
    assert ours[0] == pytest.approx(stock[0], rel=1e-4, abs=1e-5)
    assert min(ours[0]) < 0.8 * ours[0][0]  # it went somewhere
    for name, value in stock[1].items():
        assert torch.allclose(ours[1][name], value, atol=1e-4), name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_a_4bit_base_gives_stock_trls_gradients(architecture, tokenizer, tmp_path):
    from lora_dpo.model.base import load_base
    from lora_dpo.model.lora import to_fp32_masters

    folder = tmp_path / architecture
    wide = {"head_dim": 16} if architecture != "llama" else {}
    tiny(architecture, hidden_size=64, intermediate_size=128, **wide).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, scored = [], []
    for kind in (DPOTrainer, Stock):
        trainer = build(kind, load_base(str(folder), packed=True).model, folder, tmp_path)
        to_fp32_masters(trainer.model)  # stock TRL rounds the adapter to bf16 first
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name and "default" in name:
                parameter.data.normal_(0, 0.1)
        inputs = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
        trainer.compute_loss(trainer.model, inputs).backward()
        found.append(gradients_of(trainer))
        scored.append([values.tolist() for values in trainer.compute_ref_log_probs(trainer.model, inputs)])
    assert_close(*found)
    with trainer.model.disable_adapter():
        trainer.model.eval()
        for ours, theirs in zip(score_pairs(trainer.model, PAIRS, pad_id=0), scored[1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


tokens = st.integers(3, 60)
answers = st.lists(tokens, min_size=1, max_size=9)
triples = st.tuples(st.lists(tokens, max_size=9), answers, answers).filter(lambda t: t[1] != t[2])


@given(st.lists(triples, min_size=1, max_size=5), st.integers(1, 60), st.randoms())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lengths_order_and_packing_do_not_change_the_gradient(tiny_model_folder, tmp_path, rows, budget, random):
    # length-1 answers, nothing in common, one answer the start of the other: whatever hypothesis finds
    pairs = [pair([1, *prompt], chosen, rejected) for prompt, chosen, rejected in rows]
    shuffled = random.sample(pairs, len(pairs))
    whole = engine_step(tiny_model_folder, tmp_path, pairs=pairs)
    parts = engine_step(tiny_model_folder, tmp_path, tokens=budget, pairs=shuffled)
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    assert_close(parts[0], whole[0], rtol=3e-5)


# --- logging ---------------------------------------------------------------------------------------


def test_what_is_only_logged_is_computed_only_when_logged(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, max_steps=4, logging_steps=2)
    trainer.reference_guard = False
    asked = []
    outputs = trainer.engine.forward.tables
    trainer.engine.forward.tables = lambda *a: (asked.append(trainer.engine.forward.logged), outputs(*a))[1]
    trainer.train()
    assert asked[-3:] == [True, False, True]  # steps 2, 3, 4; before them references, probe and step 1
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    assert all(row["entropy"] > 0.1 for row in logged)  # not averaged with the zeros of steps that were not logged


# --- memory ----------------------------------------------------------------------------------------


def out_of_memory_above(trainer, limit, in_backward=False, always=False):
    """The forward pass, or the backward pass, of more than `limit` tokens runs out of memory."""
    hidden = trainer.engine.forward.hidden

    def limited(layout, rows):
        result = hidden(layout, rows)
        if len(layout.ids_S) > limit and (always or torch.is_grad_enabled()):
            if not in_backward:
                raise torch.OutOfMemoryError("no more")

            def refuse(gradient):
                raise torch.OutOfMemoryError("no more")

            result.register_hook(refuse)
        return result

    trainer.engine.forward.hidden = limited


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("options", [{}, {"loss_type": ["aot"]}], ids=["sigmoid", "aot"])
def test_when_memory_runs_out_the_step_is_redone_exactly(options, in_backward, tiny_model_folder, tmp_path, caplog):
    lora = LoraConfig(**{**LORA.to_dict(), "lora_dropout": 0.2}) if not options else LORA
    dropout = {"disable_dropout": False} if not options else {}
    clean = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, lora=lora,
                  engine=EngineSection(tokens=13), **options, **dropout)  # fmt: skip
    short = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, lora=lora,
                  engine=EngineSection(tokens=26), **options, **dropout)  # fmt: skip
    out_of_memory_above(short, 14, in_backward)
    results = []
    for trainer in (clean, short):
        torch.manual_seed(3)
        with caplog.at_level(logging.WARNING, logger="lora_dpo"):
            results.append(step(trainer))
    assert [record.message for record in caplog.records] == [
        "Memory ran out: parts of at most 13 tokens from now on. The step is done again."
    ]
    assert_close(results[1][0], results[0][0], rtol=1e-7)
    assert results[1][2] == results[0][2]
    assert short.engine.whole_step.budget.tokens == 13  # learnt
    step(short)
    assert len(caplog.records) == 1


def test_a_step_that_is_done_again_is_logged_once(tiny_model_folder, tmp_path):
    clean, limited = (build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path) for _ in range(2))
    out_of_memory_above(limited, 13, in_backward=True)  # the loss is known by then, and its metrics are noted
    for trainer in (clean, limited):
        step(trainer)
    assert limited.engine.last.parts > 1
    assert limited._total_train_tokens == clean._total_train_tokens > 0
    counts = [{name: len(values) for name, values in each._metrics["train"].items()} for each in (clean, limited)]
    assert counts[0] == counts[1]
    assert set(counts[1].values()) == {1}


def test_when_memory_runs_out_for_the_reference_it_is_scored_in_smaller_parts(tiny_model_folder, tmp_path, caplog):
    clean, short = (build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path,
                          engine=EngineSection(reference_cache="off")) for _ in range(2))  # fmt: skip
    out_of_memory_above(short, 20, always=True)
    batch = clean._prepare_inputs(clean.data_collator(columns(PAIRS)))
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        found = short.engine.with_reference(batch)
    expected = clean.engine.with_reference(batch)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert torch.allclose(found[name], expected[name], rtol=1e-6)
    assert short.engine.scoring_tokens <= 20
    assert "the reference scores at most" in caplog.text
    out_of_memory_above(short, 3, always=True)
    short.engine.references = ReferenceCache(None, "another")
    with pytest.raises(torch.OutOfMemoryError):
        short.engine.with_reference(batch)


def test_memory_under_a_containers_limit(tmp_path):
    assert container_bytes(tmp_path) == float("inf")
    for name, text in (("current", "700\n"), ("stat", "anon 500\ninactive_file 150\n"), ("max", "1000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert container_bytes(tmp_path) == 1000 - 700 + 150
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) == float("inf")


def test_checkpointing_is_spread_over_the_layers_that_keep_anything(tiny_model_folder, tmp_path):
    top = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], layers_to_transform=[2, 3])
    trainer = build(DPOTrainer, tiny("llama", num_hidden_layers=4), tiny_model_folder, tmp_path, lora=top,
                    gradient_checkpointing=True)  # fmt: skip
    budget = trainer.engine.whole_step.budget
    assert budget.layers == 2
    budget.checkpoint_layers(1)
    layers = trainer.model.get_base_model().model.layers
    assert [bool(layer.gradient_checkpointing) for layer in layers][2:] == [True, False]


def test_schedule_free_optimizers_are_told_that_training_goes_on(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    told = []
    trainer.optimizer = type("ScheduleFree", (), {"train": lambda self: told.append(True)})()
    step(trainer)
    assert told == [True]


def test_the_guard_scores_weighted_pairs_without_trls_passes(tiny_model_folder, tmp_path, caplog):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, weights=[1.0, 2.0, 0.5, 0.5])
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.zero_()
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        assert trainer.check_reference() < 1e-5
    assert caplog.text == ""


def test_memory_that_cannot_suffice_is_an_error(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    out_of_memory_above(trainer, 3)
    with pytest.raises(torch.OutOfMemoryError):
        step(trainer)


def test_fit_worked_examples():
    # 10 layers of 100 bytes a token, 8 bytes a hidden state; 5,000 bytes
    common = dict(token_bytes=1000.0, checkpoint_bytes=8.0, layers=10, cap=4096)
    assert fit(**common, may_checkpoint=10, free=5000, longest=4) == (5, 0)  # 5000 / 1000
    # 9 layers kept and one input: 4990 / 908. The layer's 2 x 100 in the backward pass come when the 900 are free.
    assert fit(**common, may_checkpoint=10, free=4990, longest=5) == (5, 1)
    assert fit(**common, may_checkpoint=10, free=5000, longest=17) == (
        18,
        8,
    )  # 7: 5000 / 356 = 14; 8: 5000 / (64 + 200)
    assert fit(**common, may_checkpoint=0, free=5000, longest=20) == (20, 0)
    assert fit(**common, may_checkpoint=10, free=10**9, longest=4) == (4096, 0)


def test_a_budget_shrinks_to_single_pairs_then_checkpoints_then_gives_up():
    said = []
    budget = TokenBudget(layers=4, may_checkpoint=True, checkpoint_bytes=8, cap=100, free=lambda: 10**6,
                    set_checkpointing=said.append)  # fmt: skip
    budget.measure(lambda: 100.0, longest=30)
    assert (budget.tokens, budget.checkpointed) == (100, 0)
    assert "50 tokens" in budget.shrink(30)
    assert "30 tokens" in budget.shrink(30)
    assert "1 of 4 layers" in budget.shrink(30)
    assert "2 of 4 layers" in budget.shrink(30)
    assert "4 of 4 layers" in budget.shrink(30)
    assert budget.shrink(30) is None
    assert said == [0, 0, 1, 2, 4]


def test_what_memory_was_short_of_for_a_while_is_taken_back():
    said = []
    budget = TokenBudget(layers=4, may_checkpoint=True, checkpoint_bytes=8, cap=100, free=lambda: 10**6,
                    set_checkpointing=said.append, patience=2)  # fmt: skip
    budget.measure(lambda: 100.0, longest=30)
    while budget.shrink(30):
        pass
    budget.patience = 2
    assert (budget.tokens, budget.checkpointed) == (30, 4)
    seen = []
    for _ in range(12):
        budget.measure(lambda: 100.0, longest=30)
        seen.append((budget.tokens, budget.checkpointed))
    # every second step, in the reverse order, and never beyond what was measured
    assert seen == [(30, 4), *[(30, 2)] * 2, *[(30, 1)] * 2, *[(30, 0)] * 2, *[(60, 0)] * 2, *[(100, 0)] * 3]
    budget.shrink(30)
    assert (budget.tokens, budget.patience) == (50, 4)  # and then it waits twice as long
    for _ in range(3):
        budget.measure(lambda: 100.0, longest=30)
    assert budget.tokens == 50
    budget.measure(lambda: 100.0, longest=30)
    assert budget.tokens == 100


def test_checkpointed_layers_change_memory_not_gradients(tiny_model_folder, tmp_path):
    plain = engine_step(tiny_model_folder, tmp_path)
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, gradient_checkpointing=True)
    trainer.model.gradient_checkpointing_enable()
    trainer.engine.whole_step.budget.checkpoint_layers(0)
    before = trainer.engine.kept_bytes(PairBatch.of(trainer.data_collator(columns(PAIRS))))
    trainer.engine.whole_step.budget.tokens = 100  # decided already
    trainer.engine.whole_step.budget.checkpoint_layers(1)
    after = trainer.engine.kept_bytes(PairBatch.of(trainer.data_collator(columns(PAIRS))))
    assert after < 0.7 * before
    assert_close(step(trainer)[0], plain[0])


@pytest.mark.parametrize("free", [10**9, 1000], ids=["fits", "does not fit"])
def test_training_with_checkpointing_allowed_checkpoints_only_what_must_be(free, tiny_model_folder, tmp_path):
    # an evaluation between the steps switches to the model's own attention and back
    options = dict(max_steps=3, learning_rate=1e-3, per_device_train_batch_size=2, lr_scheduler_type="constant")
    plain = trained(DPOTrainer, tiny_model_folder, tmp_path, PAIRS, **options)
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, logging_steps=1,
                    gradient_checkpointing=True, eval_strategy="steps", eval_steps=1, **options)  # fmt: skip
    trainer.reference_guard = False
    trainer.engine.whole_step.budget.free = lambda: free
    trainer.train()
    assert trainer.engine.whole_step.budget.checkpointed == (0 if free > 1000 else 2)
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == pytest.approx(plain[0], rel=1e-5)


# --- packing ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80))
def test_packing_keeps_every_pair_once_and_the_budget(lengths, budget):
    packed = pack(lengths, budget)
    assert sorted(index for batch in packed for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= budget for batch in packed)
    fill = [sum(lengths[index] for index in batch) for batch in packed]
    assert sum(load <= budget / 2 for load in fill) <= 1  # two half-empty ones would be one


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_stream_length_is_the_layouts(chosen, rejected):
    masks = [[True] * len(row) for row in (chosen, rejected)]
    layout = lay_out([chosen, rejected], masks, width=max(len(chosen), len(rejected)))
    assert stream_length(chosen, rejected) == len(layout.ids_S)


def test_which_losses_couple_pairs():
    assert couples_pairs(["sigmoid", "aot"])
    assert not couples_pairs(["sigmoid", "sft"])


# --- several processes -----------------------------------------------------------------------------

TWO_PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
import torch
from accelerate import Accelerator
from tiny import PAIRS, build, columns, gradients_of, tiny
from lora_dpo import DPOTrainer, EngineSection
folder, out = sys.argv[1:]
# the first process runs its two pairs in two parts, the second in one
tokens = 10 if Accelerator(cpu=True).process_index == 0 else 100
trainer = build(DPOTrainer, tiny("llama"), folder, out, pairs=PAIRS, engine=EngineSection(tokens=tokens),
                per_device_train_batch_size=2, loss_type=["sigmoid"])
model = trainer.accelerator.prepare_model(trainer.model)
rank = trainer.accelerator.process_index
mine = PAIRS[:2] if rank == 0 else PAIRS[2:]
trainer.current_gradient_accumulation_steps = 1
trainer.state.max_steps, trainer.state.logging_steps = 1, 1
for _ in range(2):  # twice: nothing is left over from the first step
    model.zero_grad()
    trainer.training_step(model, trainer.data_collator(columns(mine)))
    with open(out + f"/rank{{rank}}", "a") as file:
        print(trainer.engine.last.parts, trainer._metrics["train"]["rewards/margins"][0], file=file)
if rank == 0:
    torch.save(gradients_of(trainer), out + "/gradients.pt")
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tiny_model_folder, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        TWO_PROCESSES.format(tests=str(Path(__file__).resolve().parents[1] / "helpers")), encoding="utf-8"
    )
    # accelerate starts several processes only with this option; without a GPU they are CPU processes all the same
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, str(script), str(tiny_model_folder), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [(tmp_path / f"rank{rank}").read_text(encoding="utf-8").split() for rank in (0, 1)]
    assert [rank[::2] for rank in ranks] == [["2", "2"], ["1", "1"]]
    one = engine_step(tiny_model_folder, tmp_path, loss_type=["sigmoid"])
    margins = [float(margin) for rank in ranks for margin in rank[1::2]]
    assert margins == pytest.approx([one[2]["rewards/margins"]] * 4, abs=1e-5)
    assert_close(torch.load(tmp_path / "gradients.pt", weights_only=True), one[0])


def test_the_peak_of_the_process_is_known_without_the_resource_module(monkeypatch):
    assert peak_of_process() > 1 << 20
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    info = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr("psutil.Process", lambda: info)
    assert peak_of_process() == 123
    assert peak_memory()["process"] == 123

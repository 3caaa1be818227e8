"""The peak of one pair of the longest length, with none, half and all of the layers checkpointed, against the plan."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.common import (
    GB,
    SIZES,
    Check,
    one_pair,
    peak_of,
    random_base,
    step_and_forget,
    stock_trainer,
    trainer_of,
    with_moments,
)

WITHIN = (0.85, 1.05)
"""Measured of planned, beyond which the plan is called wrong; what was counted without a card is 0.96 to 0.99 of it."""


def run(check: Check) -> None:
    """For each length the peaks of ours, then of stock TRL; then what the reference's name takes."""
    size = check.options.size
    base = random_base(SIZES[size], check.device)
    for length in check.options.length:
        ours(check, base, length)
        theirs(check, base, length)
    the_name(check, base)


def ours(check: Check, base: Any, length: int) -> None:
    """The engine, its budget set by hand."""
    from lora_dpo import DPOTrainer
    from lora_dpo.engine.cost_model import footprint, pair_shape
    from lora_dpo.engine.pair_batch import PairBatch
    from lora_dpo.training.planning.memory_plan import part_bytes

    size, notes = check.options.size, check.notes
    row = one_pair(length)
    trainer = trainer_of(DPOTrainer, base, [row], 1, check.device)
    trainer.state.logging_steps = 1  # as recipes have it, and as the plan counts
    engine, budget = trainer.engine, trainer.engine.whole_step.budget
    inputs = engine.with_reference(trainer._prepare_inputs(trainer.data_collator([row])))
    budget.set_checkpointing(0)
    measured = engine.kept_bytes(PairBatch.of(inputs))
    with_moments(trainer)
    cost = footprint(unpacked(trainer.model), itemsize=2, packed=True)
    shape = pair_shape(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    planned = cost.kept_bytes(shape) / shape.stream
    notes.say(f"{size}, {length} tokens: {measured:,.0f} bytes kept a stream token, planned {planned:,.0f}")
    notes.save(f"memory {size} {length} bytes a token", {"measured": measured, "planned": planned})
    for count in (0, budget.layers // 2, budget.layers):
        budget.tokens, budget.checkpointed = 10**6, count
        allocated, reserved = peak_of(lambda: step_and_forget(trainer, [row]))
        kept, working = part_bytes(cost, [shape], count)
        # weights; of each trainable number its value, its gradient and two moments, and its copy in 16 bits
        plan = (cost.weight_bytes + 16 * cost.trainable + cost.rounded_bytes() + kept + working) / GB
        found = {"allocated": allocated, "reserved": reserved, "planned": plan}
        if budget.checkpointed != count:  # the engine had to do the step again with more of them
            found["ran"] = budget.checkpointed
        notes.save(f"memory {size} {length} ours {count}", found)
        said = f"{size}, {length} tokens, {count} of {budget.layers} layers checkpointed: planned {plan:.2f} GiB"
        if not check.on_card:
            notes.say(f"{said}; nothing to measure on a CPU")
            continue
        if "ran" in found:
            notes.say(f"{said}; it did not fit here, {found['ran']} had to be")
            continue
        ratio = allocated / plan
        said += f", allocated {allocated:.2f} ({ratio:.2f}), reserved {reserved:.2f}"
        notes.say(said) if WITHIN[0] <= ratio <= WITHIN[1] else notes.fail(said)
    trainer.close()


def unpacked(model: Any) -> Any:
    """The same model and adapter without values, as a plan has it: of packed weights the shapes are not told."""
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM._from_config(model.config, dtype=torch.bfloat16).requires_grad_(False)
        return get_peft_model(base, model.peft_config["default"])


def theirs(check: Check, base: Any, length: int) -> None:
    """Stock TRL as it comes."""
    row, size = one_pair(length), check.options.size
    trainer = trainer_of(stock_trainer(), base, [row], 1, check.device)
    with_moments(trainer)
    try:
        allocated, reserved = peak_of(lambda: step_and_forget(trainer, [row]))
    except torch.OutOfMemoryError:
        check.notes.say(f"{size}, {length} tokens, stock TRL: out of memory")
        check.notes.save(f"memory {size} {length} TRL", {"error": "out of memory"})
        return
    check.notes.say(f"{size}, {length} tokens, stock TRL: allocated {allocated:.2f}, reserved {reserved:.2f} GiB")
    check.notes.save(f"memory {size} {length} TRL", {"allocated": allocated, "reserved": reserved})


def the_name(check: Check, base: Any) -> None:
    """What the fingerprint of all weights takes beside them, at the start of every run."""
    from lora_dpo.config.recipe import LoraSection
    from lora_dpo.engine.reference_cache import reference_name
    from lora_dpo.model.lora import attach_lora, share_weights

    model = attach_lora(share_weights(base).model, LoraSection(rank=8, targets=["q_proj"]), seed=0)
    held = torch.cuda.memory_allocated() / GB if check.on_card else 0.0
    allocated, _ = peak_of(lambda: reference_name(model, torch.bfloat16) and None)
    beyond = allocated - held
    check.notes.save(f"memory {check.options.size} reference's name", beyond)
    said = f"the reference's name takes {beyond:.2f} GiB beside {held:.2f} (computed: at most 0.25)"
    check.notes.say(said) if beyond <= 0.3 else check.notes.fail(said)

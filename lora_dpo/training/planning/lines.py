"""What a plan found out, as lines and a verdict in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_dpo.text import counted, reasons_text

if TYPE_CHECKING:
    from lora_dpo.training.planning.plan_values import Plan


def lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """Rows `(label, value)` of what is predicted."""
    tokens, steps, memory = planned.tokens, planned.steps, planned.memory
    yield "model", planned.model
    yield "machine", f"{planned.machine.name}, computing in {planned.machine.dtype}"
    for which, rows in planned.data.items():
        why = reasons_text(rows.dropped.items())
        dropped = sum(rows.dropped.values())
        yield f"{which} data", f"{counted(rows.pairs, 'pair')} read, {dropped:,} dropped" + (f" ({why})" if why else "")
        yield from (("", note) for note in rows.notes)
    if memory.activations is None:
        yield "tokens", f"{tokens.padded:,} in the run, padded"
    else:
        yield (
            "tokens",
            f"{tokens.stream:,} in the run, of {tokens.padded:,} in padded batches: not padding saves "
            f"{share(tokens.unpadded, tokens.padded)}, sharing prefixes {share(tokens.stream, tokens.unpadded)} of the "
            "rest",
        )
    if tokens.cut:
        yield "cut", f"{tokens.cut} pairs have an answer cut at max_length"
    parts = f"{steps.parts:.1f} parts (at most {steps.most_parts})" if steps.most_parts > 1 else "one part"
    yield (
        "steps",
        f"{steps.steps} of {steps.pairs} pairs ({steps.passes:.2f} passes over the data), about {steps.tokens:,.0f} "
        f"tokens each, run in {parts}",
    )
    yield "memory", f"{size(memory.total)} at the peak, of {size(memory.available)}"
    yield (
        "",
        f"{size(memory.libraries)} libraries, {size(memory.weights)} weights, {size(memory.adapter)} adapter and Adam",
    )
    if memory.activations is not None:
        again = f", {memory.checkpointed} of {memory.layers} layers computed again" if memory.checkpointed else ""
        yield "", f"{size(memory.activations)} activations of {memory.part_tokens:,} tokens{again}"
    yield "", f"{size(memory.working)} working space (logits, or one layer's temporaries)"
    yield "time", time_line(planned)


def time_line(planned: Plan) -> str:
    """How long the steps take, or why that is not known."""
    cost = planned.time
    flops = f"{cost.flops / 1e12:,.1f} TFLOP"
    if cost.seconds is None or cost.flops_per_second is None:
        return f"{flops}; how fast that card is, is not known here"
    rate = cost.flops_per_second / 1e9
    return (
        f"about {duration(cost.seconds)} for the steps: {flops} at {rate:,.0f} GFLOP/s, the speed of one matrix "
        "product here (an estimate; evaluation before and after comes on top)"
    )


def verdict(planned: Plan) -> str:
    """One sentence: does it fit, and what makes it fit."""
    memory = planned.memory
    if memory.fits is None:
        return "Whether it fits is not predicted for TRL's own passes; --measure tries it."
    if memory.fits:
        return f"It fits: {size(memory.total)} of {size(memory.available)}."
    if planned.fix is None:
        return (
            f"It does not fit into {size(memory.available)}, and no setting tried here makes it fit. Take a smaller "
            "model or a smaller lora.rank."
        )
    fix = planned.fix
    costs = f", {fix.pairs_cut} more pairs cut and {fix.pairs_lost} dropped" if fix.pairs_cut or fix.pairs_lost else ""
    return f"It does not fit into {size(memory.available)}. It does ({size(fix.total)}{costs}) with:"


def dry_run_lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """Rows `(label, value)` of what two real steps took."""
    dry_run = planned.dry_run
    if dry_run is None:
        return
    where = "allocated on the GPU" if planned.machine.kind == "cuda" else "of the whole process, loading included"
    yield "peak", f"{size(dry_run.peak)} {where}"
    first = f"(the first, which scores the references too, {duration(dry_run.first_seconds)})"
    if dry_run.tokens is None or dry_run.run_seconds is None:
        yield "step", f"{duration(dry_run.seconds)} for {dry_run.pairs} pairs {first}"
        return
    rate = dry_run.tokens / dry_run.seconds
    yield "step", f"{duration(dry_run.seconds)} for {dry_run.tokens:,} tokens, {rate:,.0f} tokens/s {first}"
    yield "whole run", f"about {duration(dry_run.run_seconds)} for the steps: their FLOPs at the speed of that step"


def share(part: int, whole: int) -> str:
    """What is saved of `whole`, in percent."""
    return f"{1 - part / whole:.0%}"


def size(number: float) -> str:
    """Bytes in GB of 2^30, as memory is sold, or MB."""
    return f"{number / (1 << 30):.1f} GB" if number >= 0.95 * (1 << 30) else f"{number / (1 << 20):.0f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read at a glance."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

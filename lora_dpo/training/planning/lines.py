"""What a plan found out, as lines and a verdict in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_dpo.text import counted, reasons_text
from lora_dpo.training.planning.cards import GB
from lora_dpo.training.planning.memory_plan import TIGHT

if TYPE_CHECKING:
    from lora_dpo.training.planning.memory_plan import Fix, Machine
    from lora_dpo.training.planning.plan_values import Plan


def lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """Rows `(label, value)` of what is predicted."""
    tokens, steps, memory = planned.tokens, planned.steps, planned.memory
    yield "model", planned.model
    yield "machine", f"{machine_name(planned.machine)}, computing in {planned.machine.dtype}"
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
    yield from memory_lines(planned)
    yield from loading_lines(planned)
    yield "time", time_line(planned)


def machine_name(machine: Machine) -> str:
    """What is planned for, with the published values of a card that was named."""
    card = machine.card
    if card is None:
        return machine.name
    less = f", of which error correction takes {size(card.gigabytes * GB - card.memory)}" if card.ecc else ""
    others = f" (not {' or '.join(machine.others)})" if machine.others else ""
    return f"{card.name}{others}: {card.gigabytes:g} GB{less}, {card.bandwidth:,.0f} GB/s, {card.tflops:g} TFLOP/s"


def memory_lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """The peak of memory, and what it is made of."""
    memory, machine = planned.memory, planned.machine
    least = f"; {size(memory.least)} is the least it fits into" if memory.least is not None and memory.fits else ""
    yield "memory", f"{size(memory.total)} at the peak, of {size(memory.available)}{least}"
    if machine.kind == "cuda" and memory.libraries:
        label = "  ROCm" if machine.card is not None and machine.card.kind == "amd" else "  CUDA"
        yield label, f"{size(memory.libraries)} for its context and libraries (assumed)"
    elif machine.kind == "cpu":
        yield "  libraries", size(memory.libraries)
    if memory.desktop:
        yield "  desktop", f"{size(memory.desktop)}, if one shows on this card (assumed)"
    yield "  weights", f"{size(memory.weights)}{planned.held and f', {planned.held}'}"
    yield "  adapter", f"{size(memory.adapter)} with its gradient and Adam's moments"
    if memory.activations is not None:
        again = f", {memory.checkpointed} of {memory.layers} layers computed again" if memory.checkpointed else ""
        kept = f"kept for the backward pass of {memory.part_tokens:,} tokens"
        yield "  activations", f"{size(memory.activations)} {kept}{again}"
    yield "  working", f"{size(memory.working)} for logits or one layer's temporaries"
    if memory.gaps:
        yield "  gaps", f"{size(memory.gaps)} between these two, as on the quickstart"
    if memory.answers:
        what = f"{size(memory.answers)} for keys and values of {counted(memory.answered, 'prompt')} at once"
        yield "  answers", f"{what}: before, after and at the guard's looks, when no activations are kept"


def loading_lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """The download, and main memory while weights are loaded."""
    loading, kind = planned.loading, planned.machine.kind
    weights = loading.weights
    if not loading.download:
        yield "download", f"none: {size(weights.total)} of weights are here"
    elif weights.source == "index":
        yield "download", f"{size(loading.download)} of {size(weights.total)}, once, by the hub's index"
    else:
        yield "download", f"{size(loading.download)}, once, by the model's parameters: its files are not here"
    libraries, tensors = size(loading.libraries), size(loading.tensors)
    if kind == "cuda":
        states = f", later {size(loading.states)} of the guard's states" if loading.states else ""
        visiting = f"; {size(loading.visiting)} of weights that visit the card stay here" if loading.visiting else ""
        yield (
            "main memory",
            f"about {size(loading.main_memory)}: {libraries} for libraries (assumed), and while it loads {tensors} of "
            f"tensors on their way to the card, since files are read tensor by tensor{states}{visiting}",
        )
    else:
        yield "to load", f"{size(loading.main_memory)}: libraries, weights, and {tensors} of a tensor on its way"


def time_line(planned: Plan) -> str:
    """How long the steps take, or why that is not known."""
    cost = planned.time
    flops = f"{cost.flops / 1e12:,.1f} TFLOP"
    if cost.seconds is None or cost.flops_per_second is None:
        if planned.machine.card is not None or planned.machine.kind == "cpu":
            return f"{flops}; how fast that machine is in such steps is not known here"
        return f"{flops}; a card's speed is known by its name, such as --card 'RTX 4090' (--cards lists them)"
    if cost.published is not None:
        part = f"{cost.flops_per_second / cost.published:.0%} of the published {cost.published / 1e12:,.0f} TFLOP/s"
        return (
            f"about {duration(cost.seconds)} for the steps, half or twice that is possible: {flops} at {part} (that "
            "share is assumed, not measured; evaluation before and after comes on top)"
        )
    rate = cost.flops_per_second / 1e9
    return (
        f"about {duration(cost.seconds)} for the steps: {flops} at {rate:,.0f} GFLOP/s, the speed of one matrix "
        "product here (an estimate; evaluation before and after comes on top)"
    )


def verdict(planned: Plan) -> str:
    """One or two sentences: does it fit, how sure is that, and what makes it fit."""
    memory = planned.memory
    where = "computed, not measured on a card" if planned.machine.kind == "cuda" else "computed, not measured"
    if memory.fits is None:
        return "Whether it fits is not predicted for TRL's own passes; --measure tries it."
    of = f"{size(memory.total)} of {size(memory.available)} ({memory.total / memory.available:.0%}), {where}"
    if memory.verdict == "fits":
        return f"It fits: {of}."
    if memory.verdict == "tight":
        return f"It is tight: {of}. {_way_out(planned)}"
    into = f"It does not fit into {size(memory.available)}"
    headless = " It would if no desktop showed on the card." if planned.fits_without_desktop else ""
    if planned.fix is None:
        return (
            f"{into}, and no setting tried here makes it fit ({where}).{headless} "
            "Take a smaller model, or adapt less of it: a smaller lora.rank, fewer lora.targets, or lora.layers=top-8."
        )
    fix = planned.fix
    taken = fix.total / memory.available
    tight = ", tightly" if taken > TIGHT else ""
    return f"{into}.{headless} It does{tight} ({size(fix.total)}, {taken:.0%}{_cut(fix)}; {where}) with:"


def _way_out(planned: Plan) -> str:
    """What to do where it is tight."""
    memory, fix = planned.memory, planned.roomier
    if memory.least is not None and memory.least <= TIGHT * memory.available:
        return (
            f"Training fills what is free, and takes smaller parts by itself if that runs out: {size(memory.least)} do."
        )
    lost = "Gaps that the allocator leaves, or another program, may take the rest."
    if fix is None or not fix.overrides:
        return (
            f"{lost} A smaller model would leave room, or adapting less of it: a smaller lora.rank, lora.layers=top-8."
        )
    settings = " ".join(fix.overrides)
    return f"{lost} With {settings} it takes {size(fix.total)} ({fix.total / memory.available:.0%}{_cut(fix)})."


def _cut(fix: Fix) -> str:
    """What settings cost in pairs."""
    if not fix.pairs_cut and not fix.pairs_lost:
        return ""
    return f", {fix.pairs_cut} more pairs cut and {fix.pairs_lost} dropped"


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
    return f"{number / GB:.1f} GB" if number >= 0.95 * GB else f"{number / (1 << 20):.0f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read at a glance."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

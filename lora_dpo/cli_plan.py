"""`lora-dpo plan`: parse, call, draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_dpo.wording import counted, json_text, reasons_text

if TYPE_CHECKING:
    from lora_dpo.config import Recipe
    from lora_dpo.console import RunView
    from lora_dpo.plan import Plan

BAR = 10
"""Characters of the longest bar of a histogram."""


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dots: trainer.max_length=512"),
    ] = None,
    card: Annotated[
        str | None, typer.Option("--card", help="Plan for an NVIDIA card with so much memory, such as 12GB.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Plan for this machine with so much memory, such as 8GB.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and run two steps on the longest pairs; nothing is kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Say before any training what a recipe reads, computes, needs and takes.

    Pairs and dropped rows, token lengths, tokens saved, parts of a step, memory and time; and, where it does not
    fit, the settings that make it fit. Loads no weights unless --measure is given, and writes nothing.
    With method: sft or kto, rows, tokens and steps; what a step takes is not known.

    Examples:

        lora-dpo plan configs/quickstart.yaml

        lora-dpo plan configs/quickstart.yaml --measure

        lora-dpo plan configs/8gb-3b.yaml --card 12GB trainer.max_length=2048
    """
    from lora_dpo.config import read_recipe
    from lora_dpo.console import RunView
    from lora_dpo.plan import plan as make_plan

    settings = read_recipe(recipe, overrides or ())
    out = Console()
    view = RunView(Console(stderr=True))  # progress beside the result, so that the result can be piped
    if settings.method != "dpo":
        _plan_answers(settings, view, out, given=bool(card or memory or measure), as_json=as_json)
        return
    with view.live():
        planned = make_plan(settings, card=card, memory=memory, measure=measure, on_event=view)
    if as_json:
        print(json_text(planned.to_json()))
    else:
        draw(planned, out)


def _plan_answers(recipe: Recipe, view: RunView, out: Console, *, given: bool, as_json: bool) -> None:
    """Print what is known of a run by SFT or KTO."""
    from lora_dpo.errors import ConfigError
    from lora_dpo.plan import plan_answers

    if given:
        raise ConfigError(
            f"--card, --memory and --measure are about steps of pairs, not method: {recipe.method}. Leave them out."
        )
    with view.live():
        planned = plan_answers(recipe, on_event=view)
    if as_json:
        print(json_text(planned.to_json()))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    held = f"{size(planned.weights)} weights, {size(planned.adapter)} adapter and Adam"
    unknown = f"memory and time of a step: not known for {planned.method}; measured by train with trainer.max_steps=5"
    for label, value in (*planned.lines, ("memory", held), ("", unknown)):
        table.add_row(label, escape(value))
    out.print(table)
    for note in planned.notes:
        out.print(f"[yellow]warning:[/] {escape(note)}", soft_wrap=True)


def draw(planned: Plan, out: Console) -> None:
    """Print a plan."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines(planned):
        table.add_row(label, escape(value))
    out.print(table)
    out.print()
    out.print(histogram(planned))
    for note in planned.notes:
        out.print(f"[yellow]warning:[/] {escape(note)}", soft_wrap=True)
    out.print()
    style = {True: "green", False: "red", None: "yellow"}[planned.memory.fits]
    out.print(f"[{style}]{escape(verdict(planned))}[/]", soft_wrap=True, highlight=False)
    if planned.fix:
        out.print(f"  {escape(' '.join(planned.fix.overrides))}", soft_wrap=True, highlight=False)
    if planned.trial:
        out.print()
        out.print("measured on the longest pairs", style="bold")
        measured = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for row in trial_lines(planned):
            measured.add_row(*map(escape, row))
        out.print(measured)


def lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """Rows `(label, value)` of what is predicted."""
    tokens, steps, memory = planned.tokens, planned.steps, planned.memory
    yield "model", planned.model
    yield "machine", f"{planned.machine.name}, computing in {planned.machine.dtype}"
    for which, rows in planned.data.items():
        why = reasons_text(rows.dropped.items())
        dropped = sum(rows.dropped.values())
        yield f"{which} data", f"{counted(rows.pairs, 'pair')} read, {dropped:,} dropped" + (f" ({why})" if why else "")
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


def trial_lines(planned: Plan) -> Iterator[tuple[str, str]]:
    """Rows `(label, value)` of what two real steps took."""
    trial = planned.trial
    if trial is None:
        return
    where = "allocated on the GPU" if planned.machine.kind == "cuda" else "of the whole process, loading included"
    yield "peak", f"{size(trial.peak)} {where}"
    first = f"(the first, which scores the references too, {duration(trial.first_seconds)})"
    if trial.tokens is None or trial.run_seconds is None:
        yield "step", f"{duration(trial.seconds)} for {trial.pairs} pairs {first}"
        return
    rate = trial.tokens / trial.seconds
    yield "step", f"{duration(trial.seconds)} for {trial.tokens:,} tokens, {rate:,.0f} tokens/s {first}"
    yield "whole run", f"about {duration(trial.run_seconds)} for the steps: their FLOPs at the speed of that step"


def histogram(planned: Plan) -> Table:
    """How many pairs have so many tokens, as bars."""
    tokens = planned.tokens
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in tokens.histogram:
        table.add_column(name, no_wrap=True)
    for index, low in enumerate(tokens.edges[:-1]):
        counts = [(column[index], max(column)) for column in tokens.histogram.values()]
        bars = [f"{bar(number, most)} {number}" if number else "" for number, most in counts]
        table.add_row(f"{low}–{tokens.edges[index + 1] - 1}", *bars)
    table.add_row("median", *(f"{middle:.0f}" for middle in tokens.medians.values()))
    table.add_row("longest", *map(str, tokens.longest.values()))
    return table


def bar(value: int, most: int) -> str:
    """A bar in eighths of a character; any count above 0 is seen."""
    eighths = max(1, round(BAR * 8 * value / most))
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


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

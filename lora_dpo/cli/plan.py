"""`lora-dpo plan`: parse, call, draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_dpo.cli.options import Json, Overrides, RecipeFile
from lora_dpo.text import json_text

if TYPE_CHECKING:
    from lora_dpo.cli.views import RunView
    from lora_dpo.config.recipe import Recipe
    from lora_dpo.training.planning.plan_values import Plan

BAR = 10
"""Characters of the longest bar of a histogram."""


def _list_cards(asked: bool) -> None:
    """Print the table of cards and end the command: no recipe is needed for it."""
    if not asked:
        return
    from lora_dpo.training.planning.cards import CARDS

    table = Table("card", box=None, padding=(0, 2, 0, 0))
    for name in ("GB", "GB/s", "TFLOP/s"):
        table.add_column(name, justify="right")
    table.add_column("in")
    for card in CARDS:
        tflops = "" if card.kind == "amd" else f"{card.tflops:g}"
        table.add_row(card.name, f"{card.gigabytes:g}", f"{card.bandwidth:,.0f}", tflops, card.dtype)
    out = Console()
    out.print(table)
    out.print("Published by the makers, of dense products in 16 bits; of a laptop's card at its lowest clock.")
    raise typer.Exit


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    card: Annotated[
        str | None,
        typer.Option(
            "--card", help="Plan for a card: 'RTX 4090', 3060, or an NVIDIA card by its memory, such as 12GB."
        ),
    ] = None,
    cards: Annotated[
        bool,
        typer.Option(
            "--cards", help="List the cards that are known by name, and stop.", is_eager=True, callback=_list_cards
        ),
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Plan for this machine with so much memory, such as 8GB.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and run two steps on the longest pairs; nothing is kept.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say before a run what it reads, computes, needs and takes.

    Pairs and dropped rows, token lengths, tokens saved, parts of a step, memory and time; and, where it does not
    fit, the settings that make it fit. Loads no weights unless --measure is given, and writes nothing.
    With method: sft or kto, rows, tokens and steps; what a step takes is not known.

    Examples:

        lora-dpo plan configs/quickstart.yaml

        lora-dpo plan configs/quickstart.yaml --measure

        lora-dpo plan configs/quickstart.yaml --card "RTX 4090"

        lora-dpo plan configs/8gb-3b.yaml --card 12GB trainer.max_length=2048
    """
    from lora_dpo.cli.ready import have_model
    from lora_dpo.cli.views import RunView
    from lora_dpo.config.reading import read_recipe
    from lora_dpo.training.planning.make_plan import check_sizes
    from lora_dpo.training.planning.make_plan import plan as make_plan
    from lora_dpo.training.prepare import check_early, with_reference

    settings = with_reference(read_recipe(recipe, overrides or ()))
    out = Console()
    view = RunView(Console(stderr=True))  # progress beside the result, so that the result can be piped
    check_early(settings)
    if settings.method != "dpo":
        _plan_answers(settings, view, out, given=bool(card or memory or measure), as_json=as_json)
        return
    check_sizes(card, memory, measure=measure)
    have_model(settings.model.name)
    with view.live():
        planned = make_plan(settings, card=card, memory=memory, measure=measure, on_event=view)
    if as_json:
        print(json_text(planned.to_json()))
    else:
        draw(planned, out)


def _plan_answers(recipe: Recipe, view: RunView, out: Console, *, given: bool, as_json: bool) -> None:
    """Print what is known of a run by SFT or KTO."""
    from lora_dpo.cli.ready import have_model
    from lora_dpo.errors import ConfigError
    from lora_dpo.training.planning.lines import size
    from lora_dpo.training.planning.make_plan import plan_answers

    if given:
        raise ConfigError(
            f"--card, --memory and --measure are about steps of pairs, not method: {recipe.method}. Leave them out."
        )
    have_model(recipe.model.name)
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
    from lora_dpo.training.planning.lines import dry_run_lines, lines, verdict

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
    style = {"fits": "green", "does not fit": "red"}.get(planned.memory.verdict, "yellow")
    out.print(f"[{style}]{escape(verdict(planned))}[/]", soft_wrap=True, highlight=False)
    if planned.fix:
        out.print(f"  {escape(' '.join(planned.fix.overrides))}", soft_wrap=True, highlight=False)
    if planned.dry_run:
        out.print()
        out.print("measured on the longest pairs", style="bold")
        measured = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for row in dry_run_lines(planned):
            measured.add_row(*map(escape, row))
        out.print(measured)


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

"""`lora-dpo init`, and data in place of a recipe: parse, call, draw."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_dpo.cli.options import ColumnsOption
from lora_dpo.errors import ConfigError
from lora_dpo.text import harmless

if TYPE_CHECKING:
    from lora_dpo.training.drafting.from_pairs import Begun

out = Console()
err = Console(stderr=True)

BALANCED = "balanced"
ModelToTune = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="With DATA: the base, by a name of `lora-dpo models list`, a folder, or a hub id. Its tokenizer says how "
        "long the pairs are, and its size whether it fits here. Without: smollm2-135m.",
    ),
]
Preset = Annotated[str | None, typer.Option("--preset", help="With DATA: quick, balanced (as without) or thorough.")]


def init(
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Pairs: a file, a folder of files, or a hub id.")
    ] = None,
    model: ModelToTune = None,
    preset: Preset = None,
    columns: ColumnsOption = None,
    other: Annotated[
        Path | None,
        typer.Option("--from", help="Settings of LLaMA-Factory, Axolotl, Unsloth or TRL: a file, a command, a script."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe to write. Default: the data's name, with .yaml.")
    ] = None,
) -> None:
    """Write a recipe for your pairs, or from another tool's settings.

    With DATA: a recipe beside it, with a line on each setting. Some prompts are held out if there are enough of them.
    With --from: those settings as a recipe, and what has no counterpart here. Without either: the quickstart with its
    data, in the current folder. Nothing is overwritten.

    Examples:

        lora-dpo init

        lora-dpo init pairs.csv

        lora-dpo init pairs.csv --model Qwen/Qwen3-0.6B --preset thorough

        lora-dpo init --from llama_factory_dpo.yaml
    """
    if data is not None and other is not None:
        raise ConfigError(f"{data} and --from {other} are two beginnings. Give one; data.train names the pairs.")
    if data is not None:
        show(_begin(data, model, preset, output, columns))
        return
    _refuse_unused(model, preset, columns, output if other is None else None)
    if other is None:
        quickstart()
    else:
        translate(other, output)


def recipe_of(
    given: Path,
    overrides: Sequence[str] | None,
    model: str | None,
    preset: str | None,
    columns: Mapping[str, str] | None = None,
) -> Path:
    """The recipe to train by: the one that was given, or for preference data the one beside them, written if need be.

    `overrides` are written into a new recipe, too: it says everything about the run.

    Raises:
        ConfigError: --model and --preset beside a recipe, which says that itself; or a folder of something else.
    """
    if not _is_data(given):
        if model is not None or preset is not None or columns is not None:
            option = "--model" if model is not None else "--preset" if preset is not None else "--columns"
            instead = (
                f"set model.name={shlex.quote(model)}"
                if model
                else "set trainer.max_steps and what else you want"
                if preset
                else "set data.columns in it"
            )
            raise ConfigError(f"{option} goes with a file of pairs. The recipe {given} says it itself: {instead}.")
        return given
    from lora_dpo.training.drafting.from_pairs import begun

    there = begun(str(given))
    if there is None:
        made = _begin(str(given), model, preset, None, columns, overrides or ())
        show(made, then=False)
        return made.path
    if model is not None or preset is not None or columns is not None:
        raise ConfigError(
            f"{there} is there already for {given}: change it, or write another with lora-dpo init {given} --output "
            "NAME.yaml."
        )
    out.print(f"The recipe for {_shown(given)} is {_shown(there)}, and is used as it is.", highlight=False)
    return there


def quickstart() -> None:
    """Write the quickstart into the current folder."""
    from lora_dpo.training.drafting.quickstart import RECIPE, write_quickstart

    written = write_quickstart(Path())
    for path in written:
        out.print(f"wrote {path}", highlight=False)
    if not written:
        out.print(f"{RECIPE} and its data are here already.", highlight=False)
    out.print(f"\nTrain the quickstart with:  lora-dpo train {RECIPE}", highlight=False)
    out.print("For your own pairs:         lora-dpo init FILE", highlight=False)


def translate(other: Path, output: Path | None) -> None:
    """Write another tool's settings as a recipe, and say what became of them."""
    from lora_dpo.training.drafting.from_tool import translate as write

    with err.status(f"reading {_shown(other)}"):
        done = write(other, output)
    made = done.made
    out.print(f"{_shown(other)}: settings of {made.tool}", highlight=False, soft_wrap=True)
    parts = (
        ("Means something else here", made.changed, "cyan"),
        ("Left out, and nothing is lost", [one for one in made.missing if not one.loud], "cyan"),
        ("NO COUNTERPART: it does not train the same", [one for one in made.missing if one.loud], "yellow"),
    )
    for title, remarks, style in parts:
        if remarks:
            out.print(f"\n[bold]{title}[/]", highlight=False)
        for remark in remarks:
            text = escape(harmless(f": {remark.text}"))
            out.print(f"  [{style}]{escape(harmless(remark.name))}[/]{text}", highlight=False, soft_wrap=True)
    command = f"lora-dpo train {shlex.quote(str(done.path))}"
    out.print(escape(harmless(f"\nRead and change it, then:  {command}")), soft_wrap=True, highlight=False)


def show(begun: Begun, *, then: bool = True) -> None:
    """Draw what was read and chosen, and the command that comes next."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in begun.lines:
        table.add_row(label, escape(harmless(value)))
    out.print(table)
    for text in begun.warnings:
        out.print(f"[yellow]warning:[/] {escape(harmless(text))}", soft_wrap=True, highlight=False)
    command = f"lora-dpo train {shlex.quote(str(begun.path))}"
    said = f"\nRead and change it, then:  {command}" if then else f"\nThe next time:  {command}\n"
    out.print(escape(harmless(said)), soft_wrap=True, highlight=False)


def _begin(
    data: str,
    model: str | None,
    preset: str | None,
    output: Path | None,
    columns: Mapping[str, str] | None,
    overrides: Sequence[str] = (),
) -> Begun:
    from lora_dpo.training.drafting.from_pairs import begin

    with err.status(f"reading {harmless(data)}" + (f", and asking {harmless(model)}" if model else "")):
        return begin(data, model=model, preset=preset or BALANCED, path=output, columns=columns, overrides=overrides)


def _is_data(given: Path) -> bool:
    """True for preference data in place of a recipe. Raises `ConfigError` for a folder of a run, which has a recipe."""
    from lora_dpo.data.rows import is_readable

    if given.is_dir():
        recipe = given / "recipe.yaml"
        if recipe.is_file():
            raise ConfigError(f"{given} is the folder of a run, not of pairs. Its recipe is {recipe}.")
        return True
    if not is_readable(str(given)):
        return False
    return given.suffix.lower() != ".json" or not _is_json_recipe(given)


def _is_json_recipe(path: Path) -> bool:
    """True for one JSON object with a recipe's sections: YAML reads JSON, too."""
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it says what is wrong
    return isinstance(found, dict) and isinstance(found.get("model"), dict) and "data" in found


def _refuse_unused(
    model: str | None, preset: str | None, columns: Mapping[str, str] | None, output: Path | None
) -> None:
    options = {
        "--model": model,
        "--preset": preset,
        "--columns": columns and shlex.quote(",".join(f"{role}={name}" for role, name in columns.items())),
        "--output": output,
    }
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} goes with a file of pairs: lora-dpo init DATA {option} {value}.")


def _shown(path: Path) -> str:
    return escape(harmless(str(path)))

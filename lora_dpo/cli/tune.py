"""`lora-dpo tune` and `lora-dpo sweep`: parse, call, draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.init import ModelToTune, Preset, recipe_of
from lora_dpo.cli.options import ColumnsOption
from lora_dpo.cli.pairs import JUDGE_HELP
from lora_dpo.cli.views import RunView
from lora_dpo.events import Stopped, StopSignal

out = Console()
err = Console(stderr=True)

NOTHING = 4
"""Exit status of a search that found nothing to learn."""

AxesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUES]...",
        help="What to vary, and between what: trainer.beta=0.03..0.5 is a range, lora.rank=4,16 are choices, and one "
        "value is set for all.",
    ),
]


@contextmanager
def _stoppable() -> Iterator[tuple[RunView, StopSignal]]:
    """What a search is drawn with and stopped by; Ctrl-C ends it with what it has, and says how it goes on."""
    from lora_dpo.cli.signals import stop_on_signals

    view, stop = RunView(out), StopSignal()
    try:
        with stop_on_signals(stop, err.print), view.live():
            yield view, stop
    except (Stopped, KeyboardInterrupt) as stopped:
        out.print("Stopped. What was tried is kept; go on with the same command and --resume.")
        if isinstance(stopped, KeyboardInterrupt):
            raise
        raise typer.Exit(130) from None


def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE|DATA", help="A recipe, or pairs: a file or folder.")],
    axes: AxesArgument = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Time for all of it.")] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Candidates, the recipe's own among them. Default: 12.")
    ] = None,
    judge: Annotated[list[str] | None, typer.Option("--judge", help=JUDGE_HELP)] = None,
    model: ModelToTune = None,
    preset: Preset = None,
    columns: ColumnsOption = None,
    all_data: Annotated[
        bool, typer.Option("--all-data", help="Train the chosen settings once more, on what was chosen by as well.")
    ] = False,
    without_suspicious: Annotated[
        bool,
        typer.Option(
            "--without-suspicious",
            help="Try the best settings once more, without the training pairs that they order against their label.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the candidates and of the division of the data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search.")] = False,
) -> None:
    """Find the settings for the best adapter, and prove the choice.

    The prompts are divided in three: to train on, to choose by, and to report from; what is reported, no candidate and
    no choice has seen. Candidates share the base in memory and the references, and are ended early where they go wrong
    or fall behind. With a judge the win rate against the base decides, without one how many held-out pairs are ranked
    right; less what it cost in answers that do not end, repeat themselves, or lost what the base knew.

    Where there is nothing to learn (labels drawn at random, contradictions), it says so; the exit status is then 4.
    Ctrl-C keeps what is there, and --resume goes on.

    Examples:

        lora-dpo tune pairs.csv --minutes 30

        lora-dpo tune recipe.yaml --trials 20 --judge 'rules:length<=40'

        lora-dpo tune recipe.yaml trainer.beta=0.05..0.5 lora.rank=4,16 trainer.max_steps=60
    """
    from lora_dpo.cli.ready import have_model
    from lora_dpo.config.reading import read_recipe
    from lora_dpo.training.prepare import check_early, with_reference
    from lora_dpo.tuning import tune as search
    from lora_dpo.tuning.choose_settings import check_tunable
    from lora_dpo.tuning.folder import PAGE
    from lora_dpo.tuning.space import split_arguments, with_values

    varied, overrides, fixed = split_arguments(axes or ())
    path = recipe_of(recipe, None, model, preset, columns)
    settings = with_reference(read_recipe(path, overrides))
    check_tunable(settings, varied, judge or (), trials, minutes)
    settings = with_values(settings, fixed)
    check_early(settings)
    have_model(settings.model.name)
    with _stoppable() as (view, stop):
        result = search(
            settings,
            name=path.stem,
            axes=varied,
            fixed=[*fixed, *(text.partition("=")[0].strip() for text in overrides)],
            trials=trials,
            minutes=minutes,
            judge=judge or (),
            seed=seed,
            all_data=all_data,
            without_suspicious=without_suspicious,
            resume=resume,
            on_event=view,
            stop=stop,
        )
    out.print(f"page  {escape(str(result.folder / PAGE))}", soft_wrap=True, highlight=False)
    if result.verdict in ("nothing to learn", "no healthy run"):
        raise typer.Exit(NOTHING)


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE|DATA", help="A recipe, or pairs: a file or folder.")],
    axes: AxesArgument = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each combination, with other seeds.")] = 1,
    judge: Annotated[list[str] | None, typer.Option("--judge", help=JUDGE_HELP)] = None,
    model: ModelToTune = None,
    preset: Preset = None,
    columns: ColumnsOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the division of the data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted sweep.")] = False,
) -> None:
    """Train every combination of some settings; measure all alike.

    The base is loaded once and the references are scored once. Held-out data that the recipe names is measured on;
    without any, some prompts are held out. Every run's adapter is kept. To find good settings without naming values:
    lora-dpo tune.

    Examples:

        lora-dpo sweep recipe.yaml trainer.beta=0.03,0.1,0.3 lora.rank=4,16

        lora-dpo sweep recipe.yaml sft_weight=0,0.2,1 --seeds 3
    """
    from lora_dpo.cli.ready import have_model
    from lora_dpo.config.reading import read_recipe
    from lora_dpo.training.prepare import check_early, with_reference
    from lora_dpo.tuning import sweep as run_all
    from lora_dpo.tuning.folder import PAGE
    from lora_dpo.tuning.grid import check_sweep
    from lora_dpo.tuning.space import split_arguments, with_values

    varied, overrides, fixed = split_arguments(axes or ())
    path = recipe_of(recipe, None, model, preset, columns)
    settings = with_reference(read_recipe(path, overrides))
    check_sweep(settings, varied, seeds, judge or ())
    settings = with_values(settings, fixed)
    check_early(settings)
    have_model(settings.model.name)
    with _stoppable() as (view, stop):
        result = run_all(
            settings,
            varied,
            name=path.stem,
            seeds=seeds,
            judge=judge or (),
            seed=seed,
            resume=resume,
            on_event=view,
            stop=stop,
        )
    out.print(f"page  {escape(str(result.folder / PAGE))}", soft_wrap=True, highlight=False)

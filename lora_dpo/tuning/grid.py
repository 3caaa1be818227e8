"""The plain grid: every combination of some values, each with several seeds if asked for; nothing is ended early but
by the guard, and nothing is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.config.recipe import Recipe
from lora_dpo.data.journal import alone
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.evaluation.intervals import Interval, mean
from lora_dpo.events import Note, OnEvent, StopSignal, Tabulated
from lora_dpo.files import replace_file, write_json
from lora_dpo.model.base import Base
from lora_dpo.quiet import quiet_libraries
from lora_dpo.tuning.folder import PAGE, RESULT, TABLE, choose_place, search_of
from lora_dpo.tuning.page import sweep_page
from lora_dpo.tuning.parts import FOR_TWO, Parts, divide
from lora_dpo.tuning.search import Search, check_searchable
from lora_dpo.tuning.space import Axis
from lora_dpo.tuning.trials import Trial, Trials, grouped_rows

MOST = 1000
"""Runs of a sweep at most: more are a slip."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    folder: Path
    trials: tuple[Trial, ...]
    scores: Mapping[str, Interval]
    """By combination: the mean score of its seeds, with Student's t interval (none of a single seed)."""


def sweep(
    recipe: Recipe,
    axes: Sequence[Axis],
    *,
    name: str = "sweep",
    seeds: int = 1,
    judge: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    base: Base | None = None,
    on_event: OnEvent | None = None,
    stop: StopSignal | None = None,
) -> SweepResult:
    """Train every combination of the axes' values, and measure all of them on the same held-out prompts.

    Args:
        recipe: what is varied. Its held-out data is what is measured on; without any, some prompts are held out.
        axes: choices, not ranges (`space.parse_axis`).
        name: the sweep lies in `adapters/NAME.search`, numbered if that is taken; each run's adapter within.
        seeds: runs of each combination, with the recipe's seed and those after it.
        judge: judges of answers, as for `open_judge`.
        seed: of the division of the data.

    Raises:
        LoraDPOError: anything that a user can mend.
        Stopped: `stop` was requested; the sweep goes on with `resume`.
    """
    check_sweep(recipe, axes, seeds, judge)
    output = choose_place(recipe.output, name, resume=resume)
    search = Search(
        recipe, output, search_of(output), on_event or (lambda event: None), stop or StopSignal(), tuple(judge)
    )
    with quiet_libraries(), alone(search.folder / "search"):
        parts = _two(search, divide(*search.read(), seed=seed))
        first = search.first_candidate(parts)
        search.claim(parts, first, axes, seeds=seeds, seed=seed)
        runs = search.open(parts, first, base)
        wanted = [(values, number) for values in grid(axes) for number in range(seeds)]
        own_seed = int(first.trainer.get("seed", 42))
        for number, (values, of_seed) in enumerate(wanted):
            if number < len(runs.done):
                continue
            runs.run(number, values, seed=own_seed + of_seed)
            search.emit(Tabulated(f"{len(runs.done)} of {len(wanted)}", tuple(grouped_rows(runs)), grows=True))
            if search.stop.keep:
                break
        result = SweepResult(search.folder, tuple(runs.done), _scores(runs))
        replace_file(search.folder / PAGE, sweep_page(runs))
        write_json(search.folder / TABLE, [trial.to_json() for trial in runs.done])
        write_json(search.folder / RESULT, {"scores": {text: one.to_json() for text, one in result.scores.items()}})
    return result


def check_sweep(recipe: Recipe, axes: Sequence[Axis], seeds: int, judge: Sequence[str]) -> None:
    """Refuse, without torch, what is no grid. Raises `ConfigError`."""
    ranges = [axis for axis in axes if not axis.choices]
    if ranges:
        raise ConfigError(
            f"{ranges[0].key}={ranges[0].text} is a range, and a sweep tries every value: name them "
            f"({ranges[0].key}=A,B,C), or search the range with lora-dpo tune."
        )
    if not axes and seeds == 1:
        raise ConfigError("Nothing is varied. Name settings with values, such as trainer.beta=0.03,0.1,0.3.")
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}: each combination is run at least once.")
    total = seeds * len(list(grid(axes)))
    if total > MOST:
        raise ConfigError(f"That are {total:,} runs. Name fewer values, or search them with lora-dpo tune.")
    check_searchable(recipe, axes, judge)


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination, the last axis fastest."""
    for values in itertools.product(*(axis.choices for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values, strict=True)}


def _two(search: Search, parts: Parts) -> Parts:
    """Nothing is chosen, so two parts are enough: held-out data that was named is what is measured on."""
    if parts.report and search.recipe.data.eval is not None:
        return Parts((*parts.train, *parts.choose), parts.report)
    if not parts.choose:
        raise DataError(
            f"There are too few different prompts to hold some out and compare runs by them: {FOR_TWO} are the fewest. "
            "Name held-out data with data.eval."
        )
    search.emit(Note(f"{len(parts.choose)} pairs are held out, and measured by all runs alike"))
    return Parts((*parts.train, *parts.report), parts.choose)


def _scores(runs: Trials) -> dict[str, Interval]:
    found: dict[str, list[float]] = {}
    for trial in runs.done:
        scored = runs.score_of(trial)
        if scored is not None:
            found.setdefault(trial.text, []).append(scored.value)
    return {text: mean(values) for text, values in found.items()}

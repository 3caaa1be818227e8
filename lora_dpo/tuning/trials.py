"""One candidate after the other on one base: trained, measured, kept on the disk.

FOLDER/trials/003.json       what the third candidate came to: its values, scores, curves, what it cost
FOLDER/trials/003.looks.json what was seen in the middle of it, while it goes on
FOLDER/trials/003            its adapter, as long as it may be the best
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dpo.adapters.checkpoints import checkpoints
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.adapters.stored_pairs import save_stored_pairs
from lora_dpo.adapters.stored_run import read_run
from lora_dpo.config.recipe import Recipe
from lora_dpo.errors import ModelError
from lora_dpo.evaluation.intervals import Interval, mean
from lora_dpo.evaluation.prequential import at_first_sight
from lora_dpo.events import Event, OnEvent, Progress, StepLogged, StopSignal
from lora_dpo.files import write_json
from lora_dpo.leftovers import discard
from lora_dpo.model.base import Base
from lora_dpo.model.lora import detach
from lora_dpo.training.run import Look, train
from lora_dpo.tuning.measure import Part
from lora_dpo.tuning.score import Measured, Score, score
from lora_dpo.tuning.space import Values, value_text, with_values

LOOKS = (1 / 3,)
"""Shares of a trial's steps after which it is looked at. (A second one, at two thirds, had ended no candidate in the
quickstart's searches.)"""
HEALTH = 0.3
"""Share of a trial's steps between two looks of the guard at answers: the first is before a third of the steps, and
there is hardly ever a third one, since the candidate is measured soon after."""
CURVES = ("loss", "rewards/margins", "rewards/accuracies")

Clock = Callable[[], float]
"""Seconds since some moment. One that stands still while a search is paused counts no pause as a candidate's time."""
Prune = Callable[[int, float], bool]
"""Called with the number of a look, from 1, and its value: whether the trial ends there."""


def _never(look: int, value: float) -> bool:
    return False


@dataclass(frozen=True)
class Trial:
    """What came of one candidate."""

    number: int
    values: Values
    seed: int
    measured: Measured | None = None
    """None of one that was ended early."""
    score: Score | None = None
    """As it was when it was measured, beside the base's numbers: a table is made from this without a model."""
    ended: str = ""
    """Why it was ended early; empty of one that was trained to its end."""
    steps: int = 0
    """Optimiser steps that were run."""
    planned: int = 0
    """Optimiser steps that it was to have."""
    learned: Interval | None = None
    """Accuracy on training prompts at first sight."""
    looks: tuple[float, ...] = ()
    curves: Mapping[str, list[float]] = field(default_factory=dict)
    """`step`, and TRL's metrics by name."""
    rows: tuple[tuple[str, str], ...] = ()
    """Prompts with answers."""
    left_out: int = 0
    """Training pairs that it was not trained on, as suspicious."""
    seconds: float = 0.0
    measuring: float = 0.0
    """Seconds of these that were spent on measuring."""
    scoring: float = 0.0
    """Seconds of these in which pairs were scored with the reference, for all candidates that come after."""

    @property
    def text(self) -> str:
        """Its values in one line."""
        said = [f"{key.rpartition('.')[2]} {value_text(value)}" for key, value in self.values.items()]
        return ", ".join([*said, *([f"without {self.left_out} pairs"] if self.left_out else [])])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **vars(self),
            "values": dict(self.values),
            "measured": self.measured.to_json() if self.measured else None,
            "score": self.score.to_json() if self.score else None,
            "learned": vars(self.learned) if self.learned else None,
            "curves": dict(self.curves),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Trial:
        """What `to_json` gave."""
        return cls(
            **{
                **stored,
                "measured": Measured.from_json(stored["measured"]) if stored["measured"] else None,
                "score": Score.from_json(stored["score"]) if stored.get("score") else None,
                "learned": Interval(**stored["learned"]) if stored["learned"] else None,
                "looks": tuple(stored["looks"]),
                "rows": tuple((prompt, answer) for prompt, answer in stored["rows"]),
            }
        )


class Pruned(Exception):
    """A trial is ended early."""


@dataclass
class Trials:
    """The candidates of one search.

    Args:
        recipe: what is varied, with its data set to the part that is trained on.
        part: what candidates are measured on.
    """

    folder: Path
    recipe: Recipe
    base: Base
    part: Part
    emit: OnEvent
    stop: StopSignal
    control_length: bool = True
    clock: Clock = time.perf_counter
    done: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        for path in sorted((self.folder / "trials").glob("[0-9]*.json")):
            if path.stem.isdigit():
                self.done.append(Trial.from_json(json.loads(path.read_text(encoding="utf-8"))))

    def place(self, number: int) -> Path:
        """The adapter's folder of a trial."""
        return self.folder / "trials" / f"{number:03d}"

    def score_of(self, trial: Trial) -> Score | None:
        """Its score; None of one that was ended early."""
        if trial.measured is None:
            return None
        return score(trial.measured, self.part.base_measured, control_length=self.control_length)

    def run(
        self,
        number: int,
        values: Values,
        *,
        seed: int | None = None,
        prune: Prune = _never,
        data: Path | None = None,
        left_out: int = 0,
    ) -> Trial:
        """Train a candidate and measure it, or go on where it was interrupted.

        Args:
            seed: of its data order and its adapter; by default the recipe's.
            prune: decides at each look whether it ends there.
            data: what it is trained on, if not on what the others are; `left_out` pairs are not in it.

        Raises:
            LoraDPOError: as `train`.
            Stopped: `stop` was requested; the trial's last checkpoint stays.
        """
        recipe = self._recipe(number, values, seed)
        if data is not None:
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": data.as_posix()})})
        began, looks = self.clock(), _Looks(self, number, prune, int(recipe.trainer["max_steps"]))
        trial = Trial(
            number, dict(values), int(recipe.trainer.get("seed", 42)), planned=looks.planned, left_out=left_out
        )
        curves: dict[str, list[float]] = {name: [] for name in ("step", *CURVES)}
        try:
            looks.decide_again()
            with self._trained(number, recipe, looks, curves) as model:
                trial = self._measured(trial, model)
        except Pruned:
            ended = f"behind the others at step {looks.step}"
            trial = replace(trial, ended=ended, steps=looks.step, curves=curves)
            discard(partial_of(self.place(number)))
        except ModelError as error:  # weights that are no numbers any more, or a rank that memory has no room for
            if number == 0:
                raise  # with the recipe itself something else is wrong
            trial = replace(trial, ended=str(error).partition(". ")[0], steps=looks.step, curves=curves)
        trial = replace(trial, looks=tuple(looks.values), seconds=self.clock() - began)
        trial = replace(trial, score=self.score_of(trial))  # with it a table needs no base
        write_json(self.folder / "trials" / f"{number:03d}.json", trial.to_json())
        looks.path.unlink(missing_ok=True)
        self.done.append(trial)
        return trial

    def _measured(self, trial: Trial, model: Any) -> Trial:
        """What came of a trial that was trained; of one that the guard ended it is not measured."""
        run = read_run(self.place(trial.number))
        health = run.measured["health"]
        curves = {name: [float(row.get(name, 0.0)) for row in run.trained] for name in ("step", *CURVES)}
        trial = replace(
            trial,
            learned=at_first_sight(self.place(trial.number)),
            steps=health["steps"],
            curves=curves,
            scoring=run.measured.get("reference_seconds", 0.0),
        )
        if self.stop.keep and trial.steps < trial.planned and self.done:  # of the only one, what is there is measured
            return replace(trial, ended=f"stopped by hand at step {trial.steps}")
        if health["sentence"]:
            return replace(trial, ended=f"{health['alarms'][-1]['name']} at step {trial.steps}")
        since = self.clock()
        found = self.part.measure(model, f"trial {trial.number}")
        save_stored_pairs(self.place(trial.number), self.part.stored_pairs(found.scores))
        rows = [(asked.text, answer.text) for asked, answer in zip(self.part.prompts, found.answers, strict=True)]
        return replace(trial, measured=found.measured, rows=tuple(rows), measuring=self.clock() - since)

    @contextlib.contextmanager
    def _trained(self, number: int, recipe: Recipe, look: Look, curves: dict[str, list[float]]) -> Iterator[Any]:
        """The trial's model, trained now or, if only its measuring was interrupted, as it lies on the disk."""
        place = self.place(number)
        if place.is_dir():
            with self.policy(place) as model:
                yield model
            return

        def tell(event: Event) -> None:
            if isinstance(event, Progress):
                self.emit(Progress(f"trial {number}: {event.stage}", event.done, event.total))
            elif isinstance(event, StepLogged) and "loss" in event.metrics:
                curves["step"].append(event.step)
                for name in CURVES:
                    curves[name].append(float(event.metrics.get(name, 0.0)))

        resume = bool(checkpoints(partial_of(place)))
        options: dict[str, Any] = {"resume": resume, "on_event": tell, "stop": self.stop, "look": look}
        trained: Any = train(recipe, base=self.base, candidate_of=self.folder, **options).model
        trained.eval()
        try:
            yield trained
        finally:
            self.base.model = detach(trained)

    def keep_only(self, numbers: set[int]) -> None:
        """Remove the adapters of all other trials: what they came to stays."""
        for trial in self.done:
            place = self.place(trial.number)
            if trial.number not in numbers and place.is_dir():
                discard(place)

    @contextlib.contextmanager
    def policy(self, place: Path) -> Iterator[Any]:
        """An adapter on the base, for the length of the block."""
        model: Any = attach_adapter(self.base, place)
        model.eval()
        try:
            yield model
        finally:
            self.base.model = detach(model)

    def _recipe(self, number: int, values: Values, seed: int | None) -> Recipe:
        recipe = with_values(self.recipe, values)
        steps = recipe.trainer.get("max_steps")
        every: Any = max(2, round(HEALTH * steps)) if isinstance(steps, int) and steps > 0 else "auto"
        trainer = dict(recipe.trainer) if seed is None else {**recipe.trainer, "seed": seed}
        health = recipe.health.model_copy(
            update={"action": "stop", "every": every if recipe.health.every == "auto" else recipe.health.every}
        )
        return recipe.model_copy(update={"output": self.place(number).as_posix(), "trainer": trainer, "health": health})


class _Looks:
    """What is seen of one trial while it is trained, kept on the disk, and whether it ends there."""

    def __init__(self, trials: Trials, number: int, prune: Prune, planned: int) -> None:
        self.part, self.prune, self.planned = trials.part, prune, planned
        self.path = trials.folder / "trials" / f"{number:03d}.looks.json"
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
        self.values: list[float] = stored
        self.step = 0
        """The last step that was seen."""

    def decide_again(self) -> None:
        """Of an interrupted trial: the decisions that were taken, in the same order. Raises `Pruned`."""
        for index, value in enumerate(self.values, start=1):
            self.step = self._due(index, self.planned)
            if self.prune(index, value):
                raise Pruned

    def __call__(self, step: int, total: int, model: Any) -> None:
        """Look where it is time. Raises `Pruned` if the trial ends there."""
        self.step = step
        for index in range(1, len(LOOKS) + 1):
            if step != self._due(index, total):
                continue
            if len(self.values) < index:
                self.values.append(self.part.glance(model))
                write_json(self.path, self.values)
            if self.prune(index, self.values[index - 1]):
                raise Pruned

    @staticmethod
    def _due(index: int, total: int) -> int:
        return max(1, round(LOOKS[index - 1] * total))


def trial_rows(runs: Trials) -> list[tuple[str, ...]]:
    """The table of all trials so far; the first row names the columns."""
    keys = list(dict.fromkeys(key for trial in runs.done for key in trial.values))
    rows = [
        (
            "candidate",
            *(key.rpartition(".")[2] for key in keys),
            "score",
            "at least",
            "quality",
            "cost",
            "KL",
            "seconds",
            "",
        )
    ]
    for trial in runs.done:
        found = runs.score_of(trial)
        numbers = ("-",) * 5
        if found and trial.measured:
            numbers = (
                f"{found.value:.3f}",
                f"{found.low:.3f}",
                f"{found.quality.value:.3f}",
                f"{found.cost:.3f}",
                f"{trial.measured.kl:.3f}",
            )
        values = (value_text(trial.values.get(key, "")) for key in keys)
        said = trial.ended or (f"without {trial.left_out} pairs" if trial.left_out else "")
        rows.append((str(trial.number), *values, *numbers, f"{trial.seconds:.0f}", said))
    return rows


def grouped_rows(runs: Trials) -> list[tuple[str, ...]]:
    """The table by combination of values: means over seeds, with Student's t interval where there are several."""
    groups: dict[str, list[Trial]] = {}
    for trial in runs.done:
        groups.setdefault(json.dumps(dict(trial.values), sort_keys=True), []).append(trial)
    keys = list(runs.done[0].values) if runs.done else []
    names = (key.rpartition(".")[2] for key in keys)
    rows = [(*names, "runs", "score", "quality", "cost", "KL", "length", "")]
    for trials in groups.values():
        scored = [(found, one.measured) for one in trials if one.measured and (found := runs.score_of(one))]
        cells = ("-",) * 5
        if scored:
            cells = (
                _spread([found.value for found, _ in scored]),
                _spread([found.quality.value for found, _ in scored]),
                _spread([found.cost for found, _ in scored]),
                _spread([measured.kl for _, measured in scored]),
                _spread([fmean(measured.tokens) for _, measured in scored], digits=1),
            )
        ended = [one.ended for one in trials if one.ended]
        note = f"{len(ended)} ended early: {ended[0]}" if ended else ""
        values = (value_text(trials[0].values[key]) for key in keys)
        rows.append((*values, str(len(trials)), *cells, note))
    return rows


def _spread(values: Sequence[float], *, digits: int = 3) -> str:
    """A mean, and half of its 95% interval where it has one."""
    found = mean(values)
    text = f"{found.value:.{digits}f}"
    return f"{text} ± {found.high - found.value:.{digits}f}" if found.known else text

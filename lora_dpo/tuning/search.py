"""What every search begins with: its data in parts, its judge, the base in memory, and the trials that are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.config.reading import check_recipe, dump_recipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.trl_dpo import trainer_settings
from lora_dpo.data import PreferencePair, read_pairs
from lora_dpo.data.questions import Question, read_questions
from lora_dpo.data.write import write_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.events import Note, OnEvent, Progress, Stopped, StopSignal, Tabulated
from lora_dpo.files import replace_file, sha256_of
from lora_dpo.judging import Judge, open_judge
from lora_dpo.judging.specs import check_specs, is_implicit, is_rule
from lora_dpo.model.base import Base, load_recipe_base
from lora_dpo.training.drafting.presets import prompts_of
from lora_dpo.training.drafting.quickstart import packaged
from lora_dpo.tuning.folder import claim
from lora_dpo.tuning.measure import Part
from lora_dpo.tuning.parts import FOR_THREE, FOR_TWO, MOST, Parts
from lora_dpo.tuning.space import Axis, with_values
from lora_dpo.tuning.trials import Clock, Trials, trial_rows

FEWEST_ANSWERS = 32
"""Prompts of a part that are answered at least, if it has so many."""
OF_HELD_OUT = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
"""Settings of a trainer that need held-out data, which no candidate has."""


def check_searchable(recipe: Recipe, axes: Sequence[Axis], judge: Sequence[str]) -> None:
    """Refuse, without torch, what cannot be searched: it would be found out hours later. Raises `ConfigError`."""
    if recipe.method != "dpo":
        raise ConfigError(f"The recipe's method is {recipe.method}: candidates are settings of dpo.")
    for axis in axes:
        for value in axis.choices or (axis.low, axis.high):
            given = int(value) if axis.whole else value
            trainer_settings(with_values(recipe, {axis.key: given}))
    check_specs(judge)
    if any(map(is_implicit, judge)):
        raise ConfigError("The implicit judge is the policy itself, and cannot say which policy is better.")


@dataclass
class Search:
    """A search as it was begun.

    Args:
        recipe: what was given, with its data as a user named it.
        output: the adapter that a search makes.
        folder: where the search lies (`folder.search_of`).
    """

    recipe: Recipe
    output: Path
    folder: Path
    emit: OnEvent
    stop: StopSignal
    judges: tuple[str, ...] = ()
    clock: Clock = time.perf_counter
    began: float = field(init=False)
    earlier: float = 0.0
    """Seconds of candidates that were tried before it was interrupted."""
    judge: Judge | None = None
    questions: list[Question] = field(default_factory=list)
    max_length: int = 1024
    """Longest prompt and answer of a pair, in tokens, as training has it."""

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def seconds(self) -> float:
        """How long it has taken so far, all sittings together."""
        return self.earlier + self.clock() - self.began

    # --- the data ---------------------------------------------------------------------------------

    def read(self) -> tuple[list[PreferencePair], list[PreferencePair]]:
        """All pairs, and those that were never to be trained on."""
        data = self.recipe.data
        how: dict[str, Any] = {"on_bad_row": data.on_bad_row, "format": data.format, "columns": data.columns}
        pairs, report = read_pairs(data.train, min_gap=data.min_gap, **how)
        self.emit(Note(f"data: {report.summary()}"))
        if data.eval is None:
            return pairs, []
        return pairs, read_pairs(data.eval, **how)[0]

    def first_candidate(self, parts: Parts) -> Recipe:
        """The recipe on the part that is trained on, with its steps as a number.

        It measures nothing itself: that is done here, for all candidates alike.
        """
        settings = self.recipe.model_dump(mode="json", exclude_unset=True)
        settings.pop("output", None)
        settings["data"] = {"train": self._path("train").as_posix()}
        if self.recipe.data.pair_weight != "equal":
            settings["data"]["pair_weight"] = self.recipe.data.pair_weight
        settings["evaluation"] = {"answers": 0, "show": 0}
        trainer = settings.setdefault("trainer", {})
        for name in [name for name in trainer if name.startswith("eval_") or name in OF_HELD_OUT]:
            del trainer[name]
        recipe = check_recipe(settings, where="the first candidate")
        return with_values(recipe, {"trainer.max_steps": steps_of(recipe, len(parts.train))})

    def with_own_data(self, recipe: Recipe) -> Recipe:
        """A candidate's recipe on the data as the user named it: to run again."""
        own: dict[str, Any] = {"data": self.recipe.data, "output": None}
        if self.recipe.data.has_held_out:
            own["evaluation"] = self.recipe.evaluation
        return recipe.model_copy(update=own)

    def claim(self, parts: Parts, first: Recipe, axes: Sequence[Axis], **more: Any) -> None:
        """Write down what the search is, or check that it is the one that was begun; write its parts.

        Raises:
            ConfigError: it was begun otherwise.
        """
        sources = sorted({pair.origin.source for part in vars(parts).values() for pair in part})
        claim(
            self.folder,
            {
                "recipe": self.recipe.model_dump(mode="json", exclude={"output"}),
                "data": {source: sha256_of(Path(source)) if Path(source).is_file() else None for source in sources},
                "axes": [vars(axis) for axis in axes],
                "judge": list(self.judges),
                **more,
            },
        )
        for name, pairs in vars(parts).items():
            path = self._path(name)
            if pairs and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_pairs(pairs, path)
        replace_file(self.folder / "recipe.yaml", dump_recipe(first))

    def _path(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.jsonl"

    def say_parts(self, parts: Parts) -> None:
        """How many prompts there are for what, and what too few of them mean."""
        counts = {name: prompts_of(pairs) for name, pairs in vars(parts).items()}
        if not parts.choose:
            text = (
                f"{counts['train']} different prompts are too few to choose between settings: {FOR_TWO} are the "
                f"fewest, and {FOR_THREE} for numbers that do not flatter. The recipe is trained as it is."
            )
            self.emit(Note(text, warning=True))
            return
        text = f"prompts: {counts['train']} to train on, {counts['choose']} to choose by"
        if parts.flatters:
            text += (
                f". There are too few for a third part ({FOR_THREE} different prompts): the numbers at the end are "
                "those that were chosen by, and flatter."
            )
        else:
            text += f", {counts['report']} to report from"
        self.emit(Note(text, warning=parts.flatters))

    # --- what is in memory ------------------------------------------------------------------------

    def open(self, parts: Parts, first: Recipe, base: Base | None, *, briefly: bool = False) -> Trials:
        """Load the judge and the base, and measure the base on the part that is chosen by.

        Args:
            briefly: measure no more of it than tells candidates apart: a pair of each prompt, and, where no judge
                compares answers, so many of these as tell whether they end and how long they are.
        """
        self.judge = open_judge(list(self.judges)) if self.judges else None
        own = self.recipe.evaluation.questions  # the quickstart's most models that chat can answer
        self.questions = read_questions(own or str(packaged() / "data" / "quickstart-questions.jsonl"))
        if base is None:
            tick = self.tick("loading the model", 1)
            base = load_recipe_base(self.recipe.model)
            tick(1)
        self.max_length = trainer_settings(first).get("max_length", 1024)
        part = self.part("choosing part", base, parts.choose, briefly=briefly)
        part.measure_base(self.folder / "base-choose.json")
        # A rule says itself what it looks at; what other judges prefer may be no more than length.
        control = not all(map(is_rule, self.judges))
        runs = Trials(self.folder, first, base, part, self.emit, self.stop, control, self.clock)
        self.earlier = sum(trial.seconds for trial in runs.done)
        return runs

    def part(
        self,
        name: str,
        base: Base,
        pairs: Sequence[PreferencePair],
        *,
        questions: bool = True,
        briefly: bool = False,
    ) -> Part:
        """One part of the data, to measure on; `briefly` as for `open`."""
        answers = max(self.recipe.evaluation.answers, FEWEST_ANSWERS)
        return Part(
            name,
            base,
            pairs,
            max_length=self.max_length,
            max_new_tokens=self.recipe.evaluation.max_new_tokens,
            answers=FEWEST_ANSWERS if briefly and self.judge is None else answers,
            most_pairs=MOST if briefly else None,
            questions=self.questions if questions else (),
            judge=self.judge,
            template=dict(self.recipe.model.template),
            tick=self.tick,
        )

    def tick(self, stage: str, total: int) -> Callable[[int], None]:
        """Progress of a stage; a request to stop is heard here."""

        def tell(done: int) -> None:
            self.emit(Progress(stage, min(done, total), total))
            if self.stop.requested:
                raise Stopped(self.output, step=0, resumable=True)

        tell(0)
        return tell

    def tell(self, runs: Trials) -> None:
        """The table of all trials so far."""
        if runs.done:
            self.emit(Tabulated("candidates", tuple(trial_rows(runs)), grows=True))


def steps_of(recipe: Recipe, pairs: int) -> int:
    """Optimiser steps of a recipe's own run on so many pairs."""
    settings = trainer_settings(recipe)
    steps = settings.get("max_steps", -1)
    if steps and steps > 0:
        return int(steps)
    batch: int = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    return max(1, round(float(settings["num_train_epochs"]) * pairs / batch))

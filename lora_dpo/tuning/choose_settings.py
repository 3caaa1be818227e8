"""From preference data to the best adapter that a search found, proven on prompts that neither it nor the choice saw.

The recipe's own values are the first candidate; others are drawn (`study`). All of them share the base in memory, the
references and the order of the data. The same data, seed and number of trials give the same search, however often it
was interrupted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lora_dpo.adapters.checkpoints import checkpoints
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.adapters.stored_margins import read_margins
from lora_dpo.config.reading import dump_recipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.data.journal import alone
from lora_dpo.data.pairs import pair_mark
from lora_dpo.data.write import write_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.evaluation.suspicion import by_suspicion
from lora_dpo.events import Answered, Event, Note, OnEvent, Progress, Saved, StopSignal, Tabulated
from lora_dpo.files import atomic_folder, replace_file, write_json
from lora_dpo.model.base import Base
from lora_dpo.model.lora import detach
from lora_dpo.quiet import quiet_libraries
from lora_dpo.training.drafting.presets import prompts_of
from lora_dpo.training.run import train
from lora_dpo.training.run_summary import findings
from lora_dpo.tuning.folder import CHOSEN, PAGE, RESULT, TABLE, choose_place, search_of
from lora_dpo.tuning.page import search_page
from lora_dpo.tuning.parts import FOR_TWO, Parts, divide
from lora_dpo.tuning.result import Reported, TuneResult, gain_of, remarks, reported_rows, result_json, side_by_side
from lora_dpo.tuning.score import EQUAL, best_of, score
from lora_dpo.tuning.search import Search, check_searchable, steps_of
from lora_dpo.tuning.space import Axis, default_axes, own_values, with_values
from lora_dpo.tuning.study import Asked, Study
from lora_dpo.tuning.time_limit import TimeLimit
from lora_dpo.tuning.trials import Clock, Trial, Trials
from lora_dpo.tuning.verdict import lengths_of, verdict_of

TRIALS = 12
"""Candidates of a search for which neither a number nor a time is given."""
HOPELESS = 6
"""Trials after which a search ends if none of them ranks held-out pairs better than chance."""
DRAWS = 12
"""Candidates that are drawn for one place in a search with a time, until one is expected to end in it."""
MEASURED_AT_THE_END = 3
"""The base, the default recipe and the chosen one. (They are asked no questions, and the base's answers are long.)"""


def tune(
    recipe: Recipe,
    *,
    name: str = "tuned",
    axes: Sequence[Axis] = (),
    fixed: Collection[str] = (),
    trials: int | None = None,
    minutes: float | None = None,
    judge: Sequence[str] = (),
    seed: int = 0,
    all_data: bool = False,
    without_suspicious: bool = False,
    resume: bool = False,
    base: Base | None = None,
    on_event: OnEvent | None = None,
    stop: StopSignal | None = None,
    clock: Clock = time.perf_counter,
) -> TuneResult:
    """Search for the settings that make the best adapter of some preference data, and prove the choice.

    Args:
        recipe: the first candidate, with the data. Its held-out data, if it names some, is what the report comes from.
        name: the adapter is `adapters/NAME`, numbered if that is taken, unless the recipe sets `output`.
        axes: what is varied (`space.parse_axis`); by default `space.default_axes`.
        fixed: settings that are not varied where no axes are given, such as `trainer.beta`: all candidates have the
            recipe's.
        trials: candidates, the recipe's own among them.
        minutes: time for all of it; the last candidate begins when it is expected to end in time. Without both, 12
            candidates.
        judge: judges of answers, as for `open_judge`; with them the win rate against the base decides.
        seed: of the candidates that are drawn, and of the division of the data.
        all_data: train the chosen settings once more, on what was chosen by as well; the report is of that adapter.
        without_suspicious: try the best settings once more, without the training pairs that their run ordered against
            their label (`evaluation.suspicion`); it is one more candidate.
        resume: go on with an interrupted search.
        base: a base model that is loaded already; it must be the one that the recipe names.
        on_event: receives what happens (`lora_dpo.events`).
        stop: set its `requested` to end at the next step; `keep`, to end with what is there.
        clock: what `minutes` are counted by; one that stands still while the search is paused gives it all of them.

    Raises:
        LoraDPOError: anything that a user can mend.
        Stopped: `stop` was requested; the search goes on with `resume`.
    """
    check_tunable(recipe, axes, judge, trials, minutes)
    output = choose_place(recipe.output, name, resume=resume)
    emit = on_event or (lambda event: None)
    search = Search(recipe, output, search_of(output), emit, stop or StopSignal(), tuple(judge), clock)
    with quiet_libraries(), alone(search.folder / "search"):
        parts = divide(*search.read(), seed=seed)
        first = search.first_candidate(parts)
        steps = steps_of(first, len(parts.train))
        varied = list(axes) or default_axes(first, steps=steps, fixed=fixed)
        search.claim(parts, first, varied, seed=seed, all_data=all_data, without_suspicious=without_suspicious)
        search.say_parts(parts)
        if not parts.choose:
            return _recipe_alone(search, parts, base)
        runs = search.open(parts, first, base, briefly=not parts.flatters)
        study = Study(search.folder / "study.sqlite", varied, own_values(first, varied, steps=steps), seed)
        most = trials if trials is not None or minutes is not None else TRIALS
        part, reported = runs.part, parts.report or parts.choose
        at_the_end = MEASURED_AT_THE_END * max(1.0, (len(reported) + len(part.prompts)) / part.rows)
        limit = TimeLimit(minutes, more=all_data + without_suspicious, measurings=at_the_end)
        _try_candidates(search, runs, study, limit, trials=most)
        if without_suspicious:
            _try_without_suspicious(search, runs, parts)
        return _Conclusion(search, runs, parts).conclude(all_data=all_data)


def check_tunable(
    recipe: Recipe, axes: Sequence[Axis], judge: Sequence[str], trials: int | None, minutes: float | None
) -> None:
    """Refuse, without torch, what cannot be searched. Raises `ConfigError`."""
    check_searchable(recipe, axes, judge)
    if trials is not None and trials < 1:
        raise ConfigError(f"--trials is {trials}: at least the recipe itself is tried.")
    if minutes is not None and not 0 < minutes < 1e6:
        raise ConfigError(f"--minutes is {minutes:g}: write how long the search may take, such as 30.")


# --- the candidates -------------------------------------------------------------------------------


def _try_candidates(search: Search, runs: Trials, study: Study, limit: TimeLimit, *, trials: int | None) -> None:
    while trials is None or len(runs.done) < trials:
        number = len(runs.done)
        if number >= HOPELESS and not any(one.measured and one.measured.accuracy.low > 0.5 for one in runs.done):
            text = f"None of {number} candidates ranks held-out pairs better than chance: the search ends here."
            search.emit(Note(text, warning=True))
            break
        asked = _next_that_fits(search, runs, study, limit)
        if asked is None:
            search.emit(Note(f"The time is used up after {number} candidates."))
            break
        trial = runs.run(number, asked.values, prune=asked.prune)
        found = runs.score_of(trial)
        asked.tell(found.low if found else None)
        search.tell(runs)
        _keep_the_best(runs, budget=search.recipe.health.kl)
        if search.stop.keep:
            break


def _next_that_fits(search: Search, runs: Trials, study: Study, limit: TimeLimit) -> Asked | None:
    """The next candidate: of those that are drawn for its place the first that is expected to end in time."""
    number, before = len(runs.done), runs.done[-1] if runs.done else None
    last = (before.values, before.score.low if before.score else None) if before else None
    for draw in range(DRAWS):
        asked = study.ask(number, last, draw=draw)
        if limit.allows(asked.values, used=search.seconds, done=runs.done):
            return asked
        asked.drop()
    return None


def _keep_the_best(runs: Trials, *, budget: float) -> None:
    """Keep the adapters that may be chosen, and the default recipe's."""
    within = [trial for trial in runs.done if trial.measured and trial.measured.kl <= budget]
    scores = {trial.number: found.low for trial in within if (found := runs.score_of(trial))}
    highest = max(scores.values(), default=0.0)
    runs.keep_only({0, *(number for number, low in scores.items() if low >= highest - EQUAL)})


def _try_without_suspicious(search: Search, runs: Trials, parts: Parts) -> None:
    """One more candidate: the best settings, without the pairs that their run ordered against their label."""
    if any(trial.left_out for trial in runs.done):
        return
    best = best_trial(runs, budget=search.recipe.health.kl)
    if best is None:
        return
    wrong = {one.mark for one in by_suspicion(read_margins(runs.place(best.number))) if (one.mean or 0.0) < 0}
    left = [pair for pair in parts.train if pair_mark(pair) not in wrong]
    count = len(parts.train) - len(left)
    if not count:
        search.emit(Note(f"Candidate {best.number} ordered no training pair against its label: none is left out."))
        return
    data = search.folder / "parts" / "without-suspicious.jsonl"
    if not data.exists():
        write_pairs(left, data)
    trial = runs.run(len(runs.done), best.values, data=data, left_out=count)
    search.tell(runs)
    found, before = runs.score_of(trial), runs.score_of(best)
    if found is not None and before is not None:
        text = (
            f"Without the {count} training pairs that candidate {best.number} ordered against their label its score is "
            f"at least {found.low:.3f}, with them {before.low:.3f}."
        )
        search.emit(Note(text))


def best_trial(runs: Trials, *, budget: float) -> Trial | None:
    """The best candidate so far, within the budget of KL."""
    known = {
        trial.number: (found, trial.measured.kl)
        for trial in runs.done
        if trial.measured and (found := runs.score_of(trial))
    }
    number = best_of(known, budget=budget)
    return next((trial for trial in runs.done if trial.number == number), None)


# --- the end --------------------------------------------------------------------------------------


class _Conclusion:
    """From trials to a result: the choice, its numbers on data of their own, and whether anything was learnt."""

    def __init__(self, search: Search, runs: Trials, parts: Parts) -> None:
        self.search, self.runs, self.parts = search, runs, parts
        self.prompts: list[str] = []
        """Those that the report's answers are to."""

    def conclude(self, *, all_data: bool) -> TuneResult:
        search, runs = self.search, self.runs
        chosen = best_trial(runs, budget=search.recipe.health.kl)
        result = TuneResult("no healthy run", "", None, search.recipe, search.folder, tuple(runs.done), None)
        if chosen is None:
            reason = "Every candidate was ended early, or went beyond its budget of KL: none is worth keeping."
            return self._finish(replace(result, reason=reason))
        place = self._trained_on_all(chosen) if all_data else runs.place(chosen.number)
        reported = self._report(place, chosen, all_data=all_data)
        recipe = search.with_own_data(with_values(runs.recipe, chosen.values))
        result = replace(result, chosen=chosen, recipe=recipe, reported=reported, gain=gain_of(reported))
        assert chosen.measured is not None  # noqa: S101
        verdict, reason = verdict_of(
            chosen.measured,
            reported["chosen"],
            flatters=self.parts.flatters,
            bias=lengths_of([*self.parts.train, *self.parts.choose, *self.parts.report]),
            chosen_recipe=(search.folder / CHOSEN).as_posix(),
            likely_reason=self._likely_reason,
        )
        result = replace(result, verdict=verdict, reason=reason)
        if verdict == "better":
            _copy(place, search.output)
            result = replace(result, adapter=search.output)
        return self._finish(result)

    def _trained_on_all(self, chosen: Trial) -> Path:
        """The chosen settings on what was chosen by as well."""
        search, place = self.search, self.search.folder / "all-data"
        if not place.is_dir():
            recipe = with_values(self.runs.recipe, chosen.values)
            names = ("without-suspicious" if chosen.left_out else "train", "choose")
            both = [(search.folder / "parts" / f"{name}.jsonl").as_posix() for name in names]
            data = recipe.data.model_copy(update={"train": both})
            recipe = recipe.model_copy(update={"data": data, "output": place.as_posix()})
            resume = bool(checkpoints(partial_of(place)))
            result = train(recipe, base=self.runs.base, resume=resume, on_event=self._quietly, stop=search.stop)
            self.runs.base.model = detach(result.model)
        return place

    def _quietly(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.search.emit(Progress(f"on all data: {event.stage}", event.done, event.total))

    def _report(self, place: Path, chosen: Trial, *, all_data: bool) -> dict[str, Reported]:
        """Base, default and chosen one, on the part that neither training nor choice saw."""
        runs, part = self.runs, self.runs.part
        if self.parts.report:
            # The questions are no part of the data: what trials answered to them is known.
            part = self.search.part("reporting part", runs.base, self.parts.report, questions=all_data)
            part.measure_base(self.search.folder / "base-report.json")
        base, asked = part.base_measured.asked_before(runs.part.base_measured), len(part.prompts)
        found = {"base": Reported(base, score(base, base), part.of_base.answers[:asked])}
        own = next(trial for trial in runs.done if trial.number == 0)
        for name, folder, trial in (("default", runs.place(0), own), ("chosen", place, chosen)):
            if name == "chosen" and folder == runs.place(0):
                found[name] = found["default"]
            elif folder.is_dir():
                with runs.policy(folder) as model:
                    fresh = part.measure(model, name)
                measured = fresh.measured.asked_before(trial.measured)
                scored = score(measured, base, control_length=runs.control_length)
                found[name] = Reported(measured, scored, fresh.answers)
        self.prompts = [prompt.text for prompt in part.prompts]
        return found

    def _likely_reason(self) -> str:
        """What the doctor finds in the data that would explain it."""
        found = findings(self.search.recipe.data, len(self.parts.train)) or []
        told = {one["check"]: one for one in found}
        for check in ("contradiction", "equal", "length-bias", "near-duplicate", "duplicate"):
            if check in told:
                return f"Likely because of the data: {told[check]['title']} ({told[check]['count']})."
        return (
            "The labels look as if they were drawn at random: look some of them through (lora-dpo data show), and "
            "whether chosen and rejected are the right way round."
        )

    def _finish(self, result: TuneResult) -> TuneResult:
        search = self.search
        result = replace(result, seconds=search.seconds)
        replace_file(search.folder / PAGE, search_page(result, self.runs, self.prompts))
        replace_file(search.folder / CHOSEN, dump_recipe(result.recipe))
        write_json(search.folder / TABLE, [trial.to_json() for trial in self.runs.done])
        write_json(search.folder / RESULT, result_json(result))
        if result.reported:
            search.emit(Tabulated("on the reporting part", tuple(reported_rows(result))))
            search.emit(Answered(tuple(side_by_side(result, self.prompts)), ("base", "chosen")))
        for text in remarks(result):
            search.emit(Note(text))
        search.emit(Note(result.reason, warning=result.verdict != "better"))
        if result.adapter is not None:
            search.emit(Saved(result.adapter))
        return result


def _copy(place: Path, output: Path) -> None:
    with atomic_folder(output) as temporary:
        shutil.copytree(place, temporary, dirs_exist_ok=True)


def _recipe_alone(search: Search, parts: Parts, base: Base | None) -> TuneResult:
    """Too few prompts to choose by: the recipe as it is, under its guard."""
    recipe = search.recipe.model_copy(update={"output": search.output.as_posix()})
    resume = bool(checkpoints(partial_of(search.output)))
    trained = train(recipe, base=base, resume=resume, on_event=search.emit, stop=search.stop)
    trained.base.model = detach(trained.model)
    reason = (
        f"{prompts_of(parts.train)} different prompts are too few to choose between settings ({FOR_TWO} are the "
        "fewest): this is the recipe as it is."
    )
    result = TuneResult("too little data", reason, trained.folder, search.recipe, search.folder, (), None)
    result = replace(result, seconds=search.seconds)
    write_json(search.folder / RESULT, result_json(result))
    return result

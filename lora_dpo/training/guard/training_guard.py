"""The guard of a training run: hears the monitor, acts on its alarms, decides which step's adapter is the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_dpo.config.recipe import HealthSection, Recipe
from lora_dpo.errors import ConfigError
from lora_dpo.events import Alarmed, Note, Sampled
from lora_dpo.files import replace_file
from lora_dpo.judging import open_judge
from lora_dpo.judging.specs import check_specs, is_implicit
from lora_dpo.model.decoding import Answer
from lora_dpo.training.guard.completion_sampler import CompletionSampler
from lora_dpo.training.guard.monitor import Alarm, Baseline, HealthSample, Lengths, Monitor
from lora_dpo.training.guard.snapshots import Kept, Snapshots, restore_snapshot, take_snapshot

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_dpo.adapters.run_folder import RunLog
    from lora_dpo.training.prepared import Run

STRIDE = 4
"""Steps between two kept states: an alarm of the numbers goes back 4 to 8 steps."""
RARELY, OFTEN = 50, 8
"""`health.every: auto` looks twice in a run, at most every 8 and at least every 50 steps."""
HALVINGS = 3
OF_ANSWERS = ("length collapse", "length growth", "repetition", "lost end of turn", "KL budget", "reference drift")
BEYOND_REPAIR = ("not a number", "reference drift")
"""Alarms that a lower learning rate does not help against."""
BEFORE, STATE = "health-before.json", "health.json"
OF_SEARCH = "base-health.json"
"""In the folder of a search: what the base answers to the prompts that its candidates are looked at with."""


@dataclass(frozen=True)
class Outcome:
    """What the guard did, for the report and the model card."""

    steps: int
    """Optimiser steps that were run."""
    kept: int
    """The step whose adapter is the result."""
    sentence: str | None
    """What was stopped and why; None for a run that ended as planned."""
    alarms: tuple[Alarm, ...]
    seconds: float = field(default=0.0, compare=False)
    """Spent on looking at answers."""


def check_health(recipe: Recipe) -> None:
    """Refuse settings of `health:` that could not work, before any model is loaded. Raises `ConfigError`."""
    section = recipe.health
    if section.judge is None:
        return
    check_specs(section.judges)
    if any(map(is_implicit, section.judges)):
        raise ConfigError("health.judge is implicit, which changes with training itself. Name another judge.")
    if not recipe.data.has_held_out or section.prompts == 0 or section.action == "none":
        raise ConfigError(
            "health.judge scores answers to held-out prompts: set data.eval or data.hold_out, health.prompts and an "
            "action."
        )


class Guard:
    """One run's guard. Nothing of it is random, so a resumed run is guarded as an uninterrupted one.

    Args:
        before: the answers to the run's held-out prompts before training, if they are known.
        candidate_of: the folder of a search that measures the result itself: answers are not looked at shortly before
            that, and the look before the first step is shared there.
    """

    def __init__(
        self,
        run: Run,
        model: PeftModel,
        log: RunLog,
        before: Sequence[Answer] = (),
        *,
        candidate_of: Path | None = None,
    ) -> None:
        self.run, self.model, self.log, self.known = run, model, log, before
        self.candidate_of = candidate_of
        self.section: HealthSection = run.recipe.health
        if run.recipe.method != "dpo" and self.section.action == "keep-best":
            # SFT and KTO move a policy far on purpose, and the thresholds were measured on DPO.
            self.section = self.section.model_copy(update={"action": "warn"})
        self.on = self.section.action != "none"
        self.monitor = Monitor(self.section, run.steps, run.beta, _lengths(run), method=run.recipe.method)
        self.sampler = CompletionSampler(run, model)
        self.snapshots = Snapshots()
        self.alarms: list[Alarm] = []
        self.step = 0
        self.stopped: Alarm | None = None
        self.halved = 0
        self.waiting: dict[str, Any] = {}
        """Numbers and texts of a look, for the trackers' next log."""

    # --- what the trainer tells ---------------------------------------------------------------------

    def begin(self, checkpoint: Path | None, step: int) -> None:
        """Before the first step: the baseline is made; a resumed run, at `step`, reads it and its state back."""
        self.step = step
        if not self.on:
            return
        if self.section.judge is not None and self.sampler.prompts:
            self.sampler.judge = open_judge(self.section.judges)
        before = self._before(resumed=checkpoint is not None)
        if before is not None:
            self.monitor.baseline = Baseline(self.sampler.limit, before, self.sampler.chosen_tokens())
        self.snapshots.checked = self.snapshots.recent = take_snapshot(self.model, step)
        state = read_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            self.snapshots = Snapshots.load(checkpoint, state["slots"])
            self.monitor.restore(state["monitor"])
            self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
            self.stopped = Alarm(**state["stopped"]) if state["stopped"] else None
            self.halved, self.step = state["halved"], state["step"]

    def _before(self, *, resumed: bool) -> HealthSample | None:
        path = self.run.partial / BEFORE
        if resumed and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.sampler.reference_before = stored["reference"]
            return HealthSample.restored(stored["checkup"]) if stored["checkup"] else None
        shared = self.candidate_of / OF_SEARCH if self.candidate_of else None
        before = self.sampler.first(self.known, shared=shared)
        stored = {"checkup": asdict(before) if before else None, "reference": self.sampler.reference_before}
        replace_file(path, json.dumps(stored, ensure_ascii=False))
        return before

    def after_step(self, step: int, total: int) -> bool:
        """After an optimiser step: look at answers where it is time. True if the run is to end here."""
        self.step = step
        if not (self.on and self.sampler.prompts and self._due(step, total)):
            return False
        sample = self.sampler.look(step)
        self._tell(sample)
        self._hear(self.monitor.answers(sample))
        if self._known_healthy:
            self.snapshots.checked = take_snapshot(self.model, step, sample.score)
            if sample.score is not None:
                self.snapshots.compare(self.snapshots.checked)
        return self.stopped is not None

    def _due(self, step: int, total: int) -> bool:
        between = every(self.section, total)
        if self.candidate_of is not None and total - step <= between // 2:
            return False  # it is measured before another look would be due
        return step == total or step % between == 0

    def logged(self, step: int, logs: dict[str, Any], *, texts: bool) -> bool:
        """At a log call: add what waits for the trackers, hear the numbers. True if the run is to end here."""
        if not self.on:
            return False
        if "loss" in logs and self.waiting:
            logs.update({name: value for name, value in self.waiting.items() if texts or not isinstance(value, str)})
            self.waiting = {}
        self._hear(self.monitor.numbers(step, logs))
        if not self._known_healthy:
            return self.stopped is not None
        held_out = logs.get("eval_rewards/accuracies")
        if held_out is not None and self.sampler.judge is None:
            self.snapshots.compare(take_snapshot(self.model, step, float(held_out)))
        recent = self.snapshots.recent
        if "loss" in logs and (recent is None or step - recent.step >= STRIDE):
            self.snapshots.previous, self.snapshots.recent = recent, take_snapshot(self.model, step)
        return False

    @property
    def _known_healthy(self) -> bool:
        """After the rate was lowered the weights are those that raised the alarm, until a whole window says better."""
        return self.monitor.healthy and (self.halved == 0 or self.monitor.settled)

    def lower_rate(self, optimizer: Any, scheduler: Any) -> None:
        """Halve the learning rate if the recipe wants that and an alarm calls for it."""
        if self.section.action != "lower-lr" or self.monitor.healthy or self.stopped is not None:
            return
        self.halved += 1
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        if hasattr(inner, "base_lrs"):
            inner.base_lrs = [rate * 0.5 for rate in inner.base_lrs]
            inner._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the next step's log says
        self.monitor.forget()
        text = f"Step {self.step}: the learning rate is halved, {self.halved} of at most {HALVINGS} times."
        self.run.emit(Note(text, warning=True))

    def saved(self, folder: Path) -> None:
        """Put the state beside a checkpoint."""
        if not self.on:
            return
        state = {
            "slots": self.snapshots.save(folder),
            "monitor": self.monitor.state(),
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "stopped": asdict(self.stopped) if self.stopped else None,
            "halved": self.halved,
            "step": self.step,
        }
        (folder / STATE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8", newline="\n")

    # --- after the last step ------------------------------------------------------------------------

    def finish(self) -> Outcome:
        """Decide which step's adapter is the result, and put it on the model."""
        kept, sentence, best = self.step, None, self.snapshots.best
        goes_back = self.section.action in ("keep-best", "lower-lr")
        if self.stopped is not None:
            kept = self._go_back() if goes_back else self.step
            sentence = _sentence(self.stopped, self.step, self.run.steps, kept)
        elif goes_back and best is not None and best.step != self.step:
            restore_snapshot(self.model, best)
            kept = best.step
            sentence = (
                f"Kept the adapter of step {kept} of {self.step}: it had the best held-out score, {best.score:.3f}."
            )
        if sentence:
            self.run.emit(Note(sentence, warning=self.stopped is not None))
        return Outcome(self.step, kept, sentence, tuple(self.alarms), round(self.sampler.seconds, 2))

    def _go_back(self) -> int:
        """Put the best state that was healthy on the model; returns its step."""
        snapshots = self.snapshots
        checked = snapshots.checked
        from_answers = self.stopped is not None and self.stopped.name in OF_ANSWERS
        chosen = (None if from_answers else snapshots.previous) or checked
        if chosen is None or checked is None:
            return self.step
        if (
            snapshots.best is not None and snapshots.best.step <= chosen.step
        ):  # a later one may score well and be ruined
            chosen = snapshots.best
        restore_snapshot(self.model, chosen)
        if chosen.step > checked.step and self.sampler.prompts and not self._answers_well(chosen):
            chosen = checked
            restore_snapshot(self.model, chosen)
        return chosen.step

    def _answers_well(self, state: Kept) -> bool:
        """Whether a state that only the numbers called healthy answers as it should; it is on the model."""
        judge = Monitor(self.section, self.run.steps, self.run.beta, Lengths(), self.monitor.baseline)
        judge.answers(self.sampler.look(state.step))
        return judge.healthy

    # --- telling ------------------------------------------------------------------------------------

    def _tell(self, sample: HealthSample) -> None:
        before = self.monitor.baseline.before if self.monitor.baseline else sample
        rows = tuple(zip(self.sampler.asked(), before.texts, sample.texts, strict=True))
        numbers = sample.numbers()
        self.run.emit(Sampled(sample.step, numbers, rows))
        self.log.append({"step": sample.step, **numbers, "answers": list(sample.texts)})
        texts = {f"health/answer_{i}": f"{prompt}\n\n{now}" for i, (prompt, _, now) in enumerate(rows, start=1)}
        self.waiting = {**numbers, **texts}

    def _hear(self, alarms: Sequence[Alarm]) -> None:
        """Tell alarms, and decide whether the run ends."""
        for alarm in alarms:
            self.alarms.append(alarm)
            self.run.emit(Alarmed(alarm.step, alarm.name, alarm.text))
            self.log.append({"step": alarm.step, "alarm": asdict(alarm)})
            if alarm.severe and self.stopped is None and self._ends(alarm):
                self.stopped = alarm

    def _ends(self, alarm: Alarm) -> bool:
        if self.section.action == "lower-lr":
            last = self.step >= self.run.steps  # nothing is left to go slower in
            return last or self.halved >= HALVINGS or alarm.name in BEYOND_REPAIR
        return self.section.action in ("stop", "keep-best")


def every(section: HealthSection, total: int) -> int:
    """Steps between two looks, in a run of `total` steps."""
    return min(RARELY, max(OFTEN, -(-total // 2))) if section.every == "auto" else section.every


def read_state(checkpoint: Path) -> Mapping[str, Any] | None:
    """What `Guard.saved` wrote beside a checkpoint; None if it was not guarded."""
    path = checkpoint / STATE
    if not path.is_file():
        return None
    state: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def was_stopped(checkpoint: Path) -> bool:
    """True if the guard ended the run at this checkpoint: nothing is left to train."""
    state = read_state(checkpoint)
    return bool(state and state["stopped"])


def _lengths(run: Run) -> Lengths:
    """Mean tokens of good and bad answers: of pairs, or of KTO's single ones."""
    chosen = [len(pair.chosen) for pair in run.train] or [len(one.answer) for one in run.answers if one.up]
    rejected = [len(pair.rejected) for pair in run.train] or [len(one.answer) for one in run.answers if not one.up]
    return Lengths(*(fmean(lengths) if lengths else 0.0 for lengths in (chosen, rejected)))


def _sentence(alarm: Alarm, step: int, total: int, kept: int) -> str:
    ended = f"Stopped at step {step} of {total} because of" if step < total else f"The last step, {step}, raised"
    ended = f"{ended} {alarm.name}: {alarm.seen}"
    if kept == step:
        return f"{ended}; the adapter is that of this step."
    if kept == 0:
        return f"{ended}; no earlier step had been found healthy, so the adapter is the untrained one."
    return f"{ended}; kept the adapter of step {kept}, which was healthy."

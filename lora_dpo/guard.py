"""The guard of a training run: looks at the model now and then, hears the monitor, and acts on its alarms.

It keeps a few states of the adapter in memory, and with every checkpoint on the disk:

    recent, previous   the last two states that the logged numbers called healthy, some steps apart
    checked            the last state whose sampled answers were healthy; the start is one
    best               the state with the highest score, where something scores them

An alarm of the numbers goes back to `previous`, an alarm of the answers to `checked`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_dpo.config import HealthSection, Recipe
from lora_dpo.data.template import prompt_ids
from lora_dpo.errors import ConfigError
from lora_dpo.evaluate import evenly, score_pairs
from lora_dpo.events import Alarmed, Note, Progress, Sampled
from lora_dpo.generate import Answer, Sampling, decode, stop_token_ids
from lora_dpo.health import Alarm, Checkup, Lengths, Monitor, Yardstick
from lora_dpo.judges import Judge, open_judge
from lora_dpo.judges.grammar import check_specs
from lora_dpo.model import reference
from lora_dpo.prompts import Prompt
from lora_dpo.token_laws import as_answer, kl_to_reference

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lora_dpo.data import TokenPair
    from lora_dpo.prepare import Run
    from lora_dpo.runs import RunLog

STRIDE = 4
"""Steps between two kept states: an alarm of the numbers goes back 4 to 8 steps."""
RARELY, OFTEN = 50, 8
"""`health.every: auto` looks three times a run, at most every 8 and at least every 50 steps."""
HALVINGS = 3
BEFORE, STATE, TENSORS = "health-before.json", "health.json", "health.safetensors"
TEXT_TRACKERS = ("tensorboard", "wandb", "trackio")
"""Trackers of transformers that take texts beside numbers."""


@dataclass
class Kept:
    """A state of the adapter: its trainable tensors, on the CPU."""

    step: int
    tensors: dict[str, torch.Tensor]
    score: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What the guard did, for the report and the model card."""

    steps: int
    """Optimiser steps that were run."""
    kept: int
    """The step whose adapter is the result."""
    sentence: str | None
    """What was stopped and why; None for a run without an alarm that was acted on."""
    alarms: tuple[Alarm, ...]


@dataclass
class _Slots:
    recent: Kept | None = None
    previous: Kept | None = None
    checked: Kept | None = None
    best: Kept | None = None


def check_health(recipe: Recipe) -> None:
    """Refuse settings of `health:` that could not work, before any model is loaded. Raises `ConfigError`."""
    section = recipe.health
    if section.judge is None:
        return
    specs = section.judges
    check_specs(specs)
    if any(spec.endswith("implicit") for spec in specs):
        raise ConfigError("health.judge is implicit, which changes with training itself. Name another judge.")
    if recipe.data.eval is None or section.prompts == 0 or section.action == "none":
        raise ConfigError(
            "health.judge scores answers to held-out prompts: set data.eval, health.prompts and an action."
        )


class Guard:
    """One run's guard. Nothing of it is random, so a resumed run is guarded as an uninterrupted one."""

    def __init__(self, run: Run, model: PeftModel, log: RunLog) -> None:
        self.run, self.model, self.log = run, model, log
        self.section: HealthSection = run.recipe.health
        self.on = self.section.action != "none"
        chosen = fmean(len(pair.chosen) for pair in run.train) if run.train else 0.0
        rejected = fmean(len(pair.rejected) for pair in run.train) if run.train else 0.0
        self.monitor = Monitor(self.section, run.steps, run.beta, Lengths(chosen, rejected))
        self.probes: list[TokenPair] = _probes(run) if self.on else []
        self.slots = _Slots()
        self.alarms: list[Alarm] = []
        self.step = 0
        self.stopped: Alarm | None = None
        self.halved = 0
        self.waiting: dict[str, Any] = {}
        """Numbers and texts of a checkup, for the trackers' next log."""
        self._names = {tuple(prompt_ids(run.tokenizer, prompt)): prompt for prompt in run.prompts}
        self._judge: Judge | None = None
        self._reference: float | None = None

    # --- what the trainer tells ---------------------------------------------------------------------

    def begin(self, checkpoint: Path | None, step: int) -> None:
        """Before the first step: the yardstick is made; a resumed run, at `step`, reads it and its state back."""
        if not self.on:
            return
        if self.section.judge is not None and self.probes:
            self._judge = open_judge(self.section.judges)
        path = self.run.partial / BEFORE
        if checkpoint is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._reference = stored["reference"]
            before = _checkup_of(stored["checkup"]) if stored["checkup"] else None
        else:
            with self._at_rest():
                before = self._answers(0) if self.probes else None
                self._reference = self._reference_score()
            stored = {"checkup": asdict(before) if before else None, "reference": self._reference}
            path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
        if before is not None:
            limit = self.section.max_new_tokens
            chosen = tuple(min(len(pair.chosen) - 1, limit) for pair in self.probes)
            self.monitor.yardstick = Yardstick(limit, before, chosen)
        self.slots.checked = self.slots.recent = self._keep(step, None)
        if checkpoint is not None:
            self._restore_state(checkpoint)

    def after_step(self, step: int, total: int) -> bool:
        """After an optimiser step: look at answers where it is time. True if the run is to end here."""
        self.step = step
        if not (self.on and self.probes) or (step % _every(self.section, total) and step != total):
            return False
        checkup = self.look(step)
        self._tell(checkup)
        healthy = self._hear(self.monitor.answers(checkup))
        if healthy and self.monitor.healthy:
            self.slots.checked = self._keep(step, checkup.score)
            if checkup.score is not None:
                self._compare(self.slots.checked)
        return self.stopped is not None

    def logged(self, step: int, logs: dict[str, Any], *, texts: bool) -> bool:
        """At a log call: add what waits for the trackers, hear the numbers. True if the run is to end here."""
        if not self.on:
            return False
        if "loss" in logs and self.waiting:
            logs.update({name: value for name, value in self.waiting.items() if texts or not isinstance(value, str)})
            self.waiting = {}
        self._hear(self.monitor.numbers(step, logs))
        if not self.monitor.healthy:
            return self.stopped is not None
        held_out = logs.get("eval_rewards/accuracies")
        if held_out is not None and self._judge is None:
            self._compare(self._keep(step, float(held_out)))
        recent = self.slots.recent
        if "loss" in logs and (recent is None or step - recent.step >= STRIDE):
            self.slots.previous, self.slots.recent = recent, self._keep(step, None)
        return False

    def lower_rate(self, optimizer: Any, scheduler: Any) -> bool:
        """Halve the learning rate if the recipe wants that and an alarm calls for it. True if it was done."""
        if self.section.action != "lower-lr" or self.monitor.healthy or self.stopped is not None:
            return False
        self.halved += 1
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        inner = getattr(scheduler, "scheduler", scheduler)
        if hasattr(inner, "base_lrs"):
            inner.base_lrs = [rate * 0.5 for rate in inner.base_lrs]
        self.monitor.forget()
        self.run.emit(
            Note(f"Step {self.step}: the learning rate is halved ({self.halved} of at most {HALVINGS} times).")
        )
        return True

    def saved(self, folder: Path) -> None:
        """Put the state beside a checkpoint."""
        if not self.on:
            return
        from safetensors.torch import save_file

        kept = {name: slot for name, slot in vars(self.slots).items() if slot is not None}
        by_step = {slot.step: slot for slot in kept.values()}
        save_file(
            {f"{step}/{name}": tensor for step, slot in by_step.items() for name, tensor in slot.tensors.items()},
            folder / TENSORS,
        )
        state = {
            "monitor": self.monitor.state(),
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "slots": {name: {"step": slot.step, "score": slot.score} for name, slot in kept.items()},
            "stopped": asdict(self.stopped) if self.stopped else None,
            "halved": self.halved,
            "step": self.step,
        }
        temporary = folder / (STATE + ".new")
        temporary.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        temporary.replace(folder / STATE)

    # --- after the last step ------------------------------------------------------------------------

    def finish(self) -> Outcome:
        """Decide which step's adapter is the result, and put it on the model."""
        kept, sentence = self.step, None
        acts = self.section.action in ("keep-best", "lower-lr")
        if self.stopped is not None:
            chosen = self._go_back() if acts else None
            kept = chosen.step if chosen else self.step
            sentence = _sentence(self.stopped, self.step, self.run.steps, kept, self.section.action)
        elif acts and self.slots.best is not None and self.slots.best.step != self.step:
            best = self.slots.best
            kept = best.step
            self._put(best)
            sentence = (
                f"Kept the adapter of step {kept} of {self.step}, which had the best held-out score ({best.score:.3f})."
            )
        if sentence:
            self.run.emit(Note(sentence, warning=self.stopped is not None))
        return Outcome(self.step, kept, sentence, tuple(self.alarms))

    def _go_back(self) -> Kept | None:
        slots = self.slots
        from_answers = self.stopped is not None and self.stopped.name in _OF_ANSWERS
        chosen = (None if from_answers else slots.previous) or slots.checked
        if chosen is None:
            return None
        if slots.best is not None and slots.best.step <= chosen.step:  # a later one may score well and be ruined
            chosen = slots.best
        self._put(chosen)
        if slots.checked is not None and chosen.step > slots.checked.step and self.probes:
            checkup = self.look(chosen.step)
            fresh = Monitor(self.section, self.run.steps, self.run.beta, Lengths(), self.monitor.yardstick)
            if any(alarm.severe for alarm in fresh.answers(checkup)):
                chosen = slots.checked
                self._put(chosen)
        return chosen

    # --- looking ------------------------------------------------------------------------------------

    def look(self, step: int) -> Checkup:
        """Answer the monitor's prompts with the model as it is now, and measure beside it."""
        with self._at_rest():
            checkup = self._answers(step)
            score = self._reference_score()
        shift = None
        if score is not None and self._reference is not None:
            shift = abs(score - self._reference)
        return Checkup(**{**vars(checkup), "reference_shift": shift})

    def _answers(self, step: int) -> Checkup:
        tokenizer, prompts = self.run.tokenizer, [pair.prompt for pair in self.probes]
        stops = stop_token_ids(self.model, tokenizer)
        written: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(max_new_tokens=self.section.max_new_tokens)
        for row, token in decode(self.model, prompts, stops, sampling):
            written[row].append(token)
        answers = [as_answer(tokenizer, ids, stops) for ids in written]
        kl = None
        if step:  # before the first step the policy is the reference
            sums = kl_to_reference(self.model, list(zip(prompts, written, strict=True)))
            tokens = sum(count for _, count in sums)
            kl = sum(value for value, _ in sums) / tokens if tokens else None
        return Checkup(
            step=step,
            tokens=tuple(answer.tokens for answer in answers),
            finished=tuple(answer.finished for answer in answers),
            texts=tuple(answer.text for answer in answers),
            kl=kl,
            score=self._score(answers),
        )

    def _score(self, answers: Sequence[Answer]) -> float | None:
        if self._judge is None:
            return None
        scores = []
        for number, (pair, answer) in enumerate(zip(self.probes, answers, strict=True)):
            messages = self._names.get(tuple(pair.prompt))
            if messages is not None:
                scores += self._judge.score(Prompt(messages, "health", number + 1), [answer])
        known = [score for score in scores if score is not None]
        return fmean(known) if known else None

    def _reference_score(self) -> float | None:
        """The reference's log-probability of the shortest training pair, nats a token."""
        if not self.run.train:
            return None
        pair = min(self.run.train, key=lambda one: len(one.prompt) + len(one.chosen) + len(one.rejected))
        pad = self.run.tokenizer.pad_token_id
        with reference(self.model):
            chosen, rejected = score_pairs(self.model, [pair], pad_id=pad if pad is not None else 0)
        return (chosen[0] + rejected[0]) / (len(pair.chosen) + len(pair.rejected))

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The model in eval mode, and as it was afterwards."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    # --- telling and acting -------------------------------------------------------------------------

    def _tell(self, checkup: Checkup) -> None:
        before = self.monitor.yardstick.before if self.monitor.yardstick else checkup
        asked = [self._text_of(pair) for pair in self.probes]
        rows = tuple(zip(asked, before.texts, checkup.texts, strict=True))
        numbers = checkup.numbers()
        self.run.emit(Sampled(checkup.step, numbers, rows))
        self.log.append({"step": checkup.step, **numbers, "answers": list(checkup.texts)})
        texts = {f"health/answer_{i + 1}": f"{prompt}\n\n{now}" for i, (prompt, _, now) in enumerate(rows)}
        self.waiting = {**numbers, **texts}

    def _text_of(self, pair: TokenPair) -> str:
        messages = self._names.get(tuple(pair.prompt))
        if messages is not None:
            return messages[-1]["content"]
        return str(self.run.tokenizer.decode(pair.prompt, skip_special_tokens=True))

    def _hear(self, alarms: Sequence[Alarm]) -> bool:
        """Tell alarms and decide whether the run ends. True if none of them calls for action."""
        for alarm in alarms:
            self.alarms.append(alarm)
            self.run.emit(Alarmed(alarm.step, alarm.name, alarm.text))
            self.log.append({"step": alarm.step, "alarm": asdict(alarm)})
            ends = self.section.action in ("stop", "keep-best") or (
                self.section.action == "lower-lr" and (self.halved >= HALVINGS or alarm.name in _BEYOND_REPAIR)
            )
            if alarm.severe and ends and self.stopped is None:
                self.stopped = alarm
        return not any(alarm.severe for alarm in alarms)

    def _compare(self, state: Kept) -> None:
        best = self.slots.best
        if best is None or (state.score or 0.0) >= (best.score or 0.0):
            self.slots.best = state

    # --- states of the adapter ----------------------------------------------------------------------

    def _trainable(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _keep(self, step: int, score: float | None) -> Kept:
        tensors = {name: value.detach().to("cpu", copy=True) for name, value in self._trainable().items()}
        return Kept(step, tensors, score)

    def _put(self, state: Kept) -> None:
        import torch

        with torch.no_grad():
            for name, value in self._trainable().items():
                value.copy_(state.tensors[name])

    def _restore_state(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        if state is None:
            return  # killed between the checkpoint and its state: guarded from here on
        from safetensors.torch import load_file

        tensors = load_file(checkpoint / TENSORS)
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            step, _, parameter = name.partition("/")
            states.setdefault(int(step), {})[parameter] = tensor
        self.slots = _Slots(
            **{name: Kept(slot["step"], states[slot["step"]], slot["score"]) for name, slot in state["slots"].items()}
        )
        self.monitor.restore(state["monitor"])
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.stopped = Alarm(**state["stopped"]) if state["stopped"] else None
        self.halved, self.step = state["halved"], state["step"]


_OF_ANSWERS = ("length collapse", "length growth", "repetition", "lost end of turn", "KL budget", "reference drift")
_BEYOND_REPAIR = ("not a number", "reference drift")
"""Alarms that a lower learning rate does not help against."""


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What `Guard.saved` wrote beside a checkpoint; None if it was not guarded."""
    path = checkpoint / STATE
    if not path.is_file():
        return None
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def was_stopped(checkpoint: Path) -> bool:
    """True if the guard ended the run at this checkpoint: nothing is left to train."""
    state = read_state(checkpoint)
    return bool(state and state["stopped"])


def guard_callback(guard: Guard, checkpoint: Path | None) -> Any:
    """The guard as a callback of transformers' Trainer. It goes first, so that trackers see what it adds to the logs."""
    from transformers import TrainerCallback

    class GuardCallback(TrainerCallback):  # type: ignore[misc]
        """Forwards to the guard, and its decision to the trainer."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            guard.begin(checkpoint, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._act(guard.after_step(state.global_step, state.max_steps), control, kwargs)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            texts = all(name in TEXT_TRACKERS for name in args.report_to)
            self._act(guard.logged(state.global_step, logs, texts=texts), control, kwargs)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            guard.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        @staticmethod
        def _act(ends: bool, control: Any, kwargs: Mapping[str, Any]) -> None:
            if ends:
                control.should_training_stop = control.should_save = True
            else:
                guard.lower_rate(kwargs["optimizer"], kwargs["lr_scheduler"])

    return GuardCallback()


def _probes(run: Run) -> list[TokenPair]:
    """The pairs whose prompts the guard asks, spread over the data, each prompt once."""
    unique = {tuple(pair.prompt): pair for pair in reversed(run.held_out or run.train)}
    pairs = list(reversed(unique.values()))
    return [pairs[index] for index in evenly(len(pairs), run.recipe.health.prompts)]


def _every(section: HealthSection, total: int) -> int:
    if section.every != "auto":
        return section.every
    return min(RARELY, max(OFTEN, -(-total // 3)))


def _checkup_of(stored: Mapping[str, Any]) -> Checkup:
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Checkup(**lists)


def _sentence(alarm: Alarm, step: int, total: int, kept: int, action: str) -> str:
    ended = f"Stopped at step {step} of {total}: {alarm.name}, {alarm.seen}"
    if action == "stop" or kept == step:
        return f"{ended}; the adapter is that of this step."
    if kept == 0:
        return f"{ended}; no later state was healthy, so the adapter is the untrained one."
    return f"{ended}; kept the adapter of step {kept}, which was healthy."

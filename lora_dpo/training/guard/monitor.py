"""The health monitor: from the numbers of a run and a few sampled answers to alarms. Pure functions, no model.

Every usual curve can look excellent while the model is ruined (docs/health.md). Log-ratios here are in nats a token,
h(y) = (log π_θ(y|x) - log π_ref(y|x)) / tokens of y, so that one threshold fits short and long answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from lora_dpo.config.recipe import HealthSection
from lora_dpo.text import repetition
from lora_dpo.training.guard import advice

WINDOW = 4
"""Logged steps that are averaged before they are judged: single batches are noisy."""
REJECTED_COLLAPSE = 1.5
STUCK_MARGIN = 0.01
STUCK_AFTER = 24
SATURATED_MARGIN = 5.0
OVERFIT_FROM, OVERFIT_GAP = 0.95, 0.25
LONGEST = 2.0
REPEATING = 0.25
UNFINISHED = 0.5
REFERENCE_SHIFT = 0.02


@dataclass(frozen=True)
class Alarm:
    """Something that spoils the run, or will: what was seen, why it happens, what to change."""

    name: str
    step: int
    seen: str
    cause: str
    advice: str
    severe: bool = True
    """Whether the recipe's action is taken; else it is only said."""

    @property
    def text(self) -> str:
        """For a terminal, a log or a report."""
        return f"step {self.step}, {self.name}: {self.seen}. {self.cause}. {self.advice}."


@dataclass(frozen=True)
class Reading:
    """What the log of one optimiser step says. None where the method logs no such number."""

    step: int
    margin: float | None = None
    accuracy: float | None = None
    chosen: float | None = None
    """h of the chosen answers, nats a token."""
    rejected: float | None = None
    broken: str | None = None
    """A logged number that is NaN or infinite, by name."""


@dataclass(frozen=True)
class Lengths:
    """Mean answer tokens of the training pairs, end-of-turn token included; 0 where there are no pairs."""

    chosen: float = 0.0
    rejected: float = 0.0


@dataclass(frozen=True)
class HealthSample:
    """Answers to the monitor's few prompts at one step, and what was measured beside them."""

    step: int
    tokens: tuple[int, ...]
    finished: tuple[bool, ...]
    texts: tuple[str, ...]
    kl: float | None = None
    """Mean KL(policy ‖ reference) in nats a token, at the tokens of these answers."""
    reference_shift: float | None = None
    """How far the reference's score of one pair is from where it was, nats a token."""
    score: float | None = None
    """Mean score of the recipe's judge."""

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> HealthSample:
        """From JSON, which knows no tuples."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**known)

    def numbers(self) -> dict[str, float]:
        """For logs and trackers."""
        found = {
            "health/answer_tokens": fmean(self.tokens),
            "health/finished": fmean(self.finished),
            "health/repetition": fmean(map(repetition, self.texts)),
            "health/kl": self.kl,
            "health/reference_shift": self.reference_shift,
            "health/judge": self.score,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Baseline:
    """What answers to the monitor's prompts are held against, cut at as many tokens as they are."""

    limit: int
    """Most tokens of an answer."""
    before: HealthSample
    """The same prompts, answered before the first step."""
    chosen: tuple[int, ...] = ()
    """Tokens of the prompts' chosen answers, where they are known."""


def reading(step: int, logs: Mapping[str, Any], *, beta: float, lengths: Lengths) -> Reading | None:
    """The reading of one log call; None if it is not about an optimiser step.

    TRL logs rewards β·(log π_θ - log π_ref) per answer, averaged over the batch.
    """
    if "loss" not in logs:
        return None
    numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]

    def a_token(name: str, tokens: float) -> float | None:
        return numbers[name] / beta / tokens if name in numbers and tokens > 0 else None

    return Reading(
        step=step,
        margin=numbers.get("rewards/margins"),
        accuracy=numbers.get("rewards/accuracies"),
        chosen=a_token("rewards/chosen", lengths.chosen),
        rejected=a_token("rewards/rejected", lengths.rejected),
        broken=bad[0] if bad else None,
    )


def of_numbers(
    readings: Sequence[Reading], *, total: int, limits: HealthSection, method: str = "dpo"
) -> Iterator[Alarm]:
    """Alarms of the readings so far, the newest last; those before the last `WINDOW` do not matter.

    Args:
        total: optimiser steps of the run.
        method: `dpo`, `kto` or `sft`, for the words of the advice.
    """
    last = readings[-1]
    tell = _teller(last.step, method)
    if last.broken:
        yield tell("not a number", f"{last.broken} is NaN or infinite")
        return
    window = readings[-WINDOW:]
    if len(window) < WINDOW:
        return
    margin, accuracy, chosen, rejected = (_mean(window, name) for name in ("margin", "accuracy", "chosen", "rejected"))
    if margin is None:
        return
    if chosen is not None and chosen < -limits.displacement and margin > 0:
        yield tell(
            "likelihood displacement",
            f"the chosen answers lost {-chosen:.2f} nats a token while the margin rose to {margin:.1f} (limit "
            f"{limits.displacement:g})",
        )
    if rejected is not None and rejected < -REJECTED_COLLAPSE:
        yield tell(
            "rejected collapse",
            f"the rejected answers lost {-rejected:.2f} nats a token (limit {REJECTED_COLLAPSE:g})",
        )
    if last.step >= max(STUCK_AFTER, total // 4) and abs(margin) < STUCK_MARGIN:
        # The value of the sigmoid loss and of KTO's at margin 0, where all losses start.
        name, value = ("stuck at 0.5", "KTO's loss is still 0.5") if method == "kto" else _STUCK_AT_LN_2
        yield tell(
            name, f"the margin is {margin:+z.3f} after {last.step} steps, so {value}", entry="stuck", severe=False
        )
    if accuracy is not None and accuracy >= 0.99 and margin >= SATURATED_MARGIN:
        yield tell(
            "saturated",
            f"reward accuracy {accuracy:.2f} at margin {margin:z.1f}",
            cause=f"Of pairs at this margin less than {100 / (1 + math.exp(margin)):.1f}% of the gradient is left: "
            "more steps learn the pairs by heart",
            severe=False,
        )


_STUCK_AT_LN_2 = ("stuck at ln 2", "the sigmoid loss is still ln 2")


def _teller(step: int, method: str) -> Callable[..., Alarm]:
    """A maker of alarms at this step, with cause and advice for the method."""

    def tell(name: str, seen: str, *, cause: str = "", entry: str = "", severe: bool = True) -> Alarm:
        why = cause or advice.of(advice.CAUSES, entry or name, method)
        return Alarm(name, step, seen, why, advice.of(advice.ADVICE, entry or name, method), severe)

    return tell


def of_accuracies(train: Sequence[Reading], held_out: float, step: int) -> Iterator[Alarm]:
    """Alarms when held-out pairs were scored during training.

    Args:
        held_out: their reward accuracy.
    """
    accuracy = _mean(train[-WINDOW:], "accuracy")
    if accuracy is not None and accuracy >= OVERFIT_FROM and held_out <= accuracy - OVERFIT_GAP:
        yield _teller(step, "dpo")(
            "overfit",
            f"reward accuracy {accuracy:.2f} on training pairs, {held_out:.2f} on held-out ones",
            severe=False,
        )


def of_answers(
    sample: HealthSample, baseline: Baseline, limits: HealthSection, *, method: str = "dpo"
) -> Iterator[Alarm]:
    """Alarms of sampled answers and of what was measured beside them."""
    tell, before = _teller(sample.step, method), baseline.before
    written, wrote = sum(sample.tokens), sum(before.tokens)
    # A run may teach to be short as the chosen answers are, or not touch the length at all: neither is drift.
    wanted = sum(min(b, c) for b, c in zip(before.tokens, baseline.chosen or before.tokens, strict=True))
    if written < limits.shortest * wanted:
        yield tell(
            "length collapse",
            f"answers have {written / len(sample.tokens):.0f} tokens, {wanted / len(sample.tokens):.0f} were to be "
            f"expected (limit {limits.shortest:g} of that)",
        )
    allowed = max(wrote, sum(baseline.chosen))
    if written > LONGEST * allowed:
        yield tell(
            "length growth",
            f"answers have {written / len(sample.tokens):.0f} tokens, before they had {wrote / len(before.tokens):.0f}",
        )
    repeated, repeated_before = (fmean(map(repetition, each.texts)) for each in (sample, before))
    if repeated > repeated_before + REPEATING:
        yield tell(
            "repetition",
            f"{repeated:.0%} of three-word sequences repeat themselves, before it were {repeated_before:.0%}",
        )
    yield from _of_endings(sample, baseline, tell)
    if sample.kl is not None and sample.kl > limits.kl:
        yield tell(
            "KL budget",
            f"the policy is {sample.kl:.2f} nats a token from the reference (budget {limits.kl:g})",
        )
    if sample.reference_shift is not None and sample.reference_shift > REFERENCE_SHIFT:
        yield tell(
            "reference drift",
            f"the reference scores the same pair {sample.reference_shift:.3f} nats a token away from where it was",
        )


def _of_endings(sample: HealthSample, baseline: Baseline, tell: Callable[..., Alarm]) -> Iterator[Alarm]:
    """An alarm if answers stopped ending, of the prompts whose good answer ends within the limit.

    A run that teaches longer answers than a look writes is expected to be cut there.
    """
    short = [place for place, tokens in enumerate(baseline.chosen) if tokens < baseline.limit]
    places = short if baseline.chosen else range(len(sample.finished))
    if not places:
        return
    ended, ended_before = (fmean(each.finished[place] for place in places) for each in (sample, baseline.before))
    if ended < UNFINISHED * ended_before and ended_before >= 0.5:
        yield tell(
            "lost end of turn",
            f"{ended:.0%} of the answers end by themselves within {baseline.limit} tokens, before it were "
            f"{ended_before:.0%}",
        )


def _mean(readings: Sequence[Reading], name: str) -> float | None:
    values = [getattr(one, name) for one in readings]
    return None if None in values or not values else fmean(values)


@dataclass
class Monitor:
    """The alarms of one run so far. Each kind is raised once."""

    limits: HealthSection
    total: int
    beta: float
    lengths: Lengths
    baseline: Baseline | None = None
    method: str = "dpo"
    readings: list[Reading] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)

    def numbers(self, step: int, logs: Mapping[str, Any]) -> list[Alarm]:
        """New alarms of one log call."""
        found = reading(step, logs, beta=self.beta, lengths=self.lengths)
        if found is None:
            held_out = logs.get("eval_rewards/accuracies")
            return self._new(of_accuracies(self.readings, held_out, step)) if held_out is not None else []
        self.readings = [*self.readings, found][-WINDOW:]
        return self._new(of_numbers(self.readings, total=self.total, limits=self.limits, method=self.method))

    def answers(self, sample: HealthSample) -> list[Alarm]:
        """New alarms of one sample."""
        if self.baseline is None:
            return []
        return self._new(of_answers(sample, self.baseline, self.limits, method=self.method))

    def forget(self) -> None:
        """Begin anew, after the recipe's action changed what follows."""
        self.readings, self.alarms = [], []

    @property
    def healthy(self) -> bool:
        """True until an alarm that calls for action."""
        return not any(alarm.severe for alarm in self.alarms)

    @property
    def settled(self) -> bool:
        """True once the numbers fill a window, so that no alarm of them says something."""
        return len(self.readings) == WINDOW

    def _new(self, found: Iterator[Alarm]) -> list[Alarm]:
        known = {alarm.name for alarm in self.alarms}
        new = [alarm for alarm in found if alarm.name not in known]
        self.alarms.extend(new)
        return new

    def state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {"readings": [asdict(one) for one in self.readings], "alarms": [asdict(one) for one in self.alarms]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.readings = [Reading(**one) for one in state["readings"]]
        self.alarms = [Alarm(**one) for one in state["alarms"]]

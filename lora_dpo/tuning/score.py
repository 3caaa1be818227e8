"""What 'best' means, as one number: what was won, less what it cost. Pure functions over measured values.

    score = quality - unfinished - repeated - forgotten - length        each a share between 0 and 1

quality     with a judge, the win rate against the base (a tie is half a win); without one, reward accuracy on pairs
            that were not trained on
unfinished  share of the answers, to the part's prompts and to the questions, that do not end by themselves: those to
            prompts of other kinds than the data's are where a policy that learnt too little goes on and on
repeated    share of three-word sequences that are repeats, above the base's
forgotten   share of questions with known answers that the base gets right and the candidate does not, net
length      without a judge: how far the mean answer is from the chosen ones' length, beyond 15 hundredths of it

Candidates are compared by the lower end of the score's 95% interval, that of its quality: with few prompts a lucky
candidate has a wide one. A KL above the recipe's budget (`health.kl`) rules a candidate out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from lora_dpo.evaluation.intervals import Interval, length_controlled, rate

LENGTH_ROOM = 0.15
"""How far the mean length of answers may be from the chosen ones', as a share of it, and cost nothing."""
EQUAL = 0.01
"""Scores that differ by less are equal, and the candidate nearer to the base is taken."""


@dataclass(frozen=True)
class Measured:
    """One policy on one part of the data. Lists go over the part's prompts, in its order."""

    right: tuple[float, ...]
    """Share of each prompt's pairs whose chosen answer has the larger log-ratio; a tie is half."""
    margin: float
    """Mean log-ratio of the chosen answers less that of the rejected ones, nats."""
    finished: tuple[bool, ...]
    """Whether each answer ended by itself."""
    tokens: tuple[int, ...]
    """Length of each answer, without its thought."""
    repeated: tuple[float, ...]
    """Share of repeats in each answer (`text.repetition`)."""
    chosen_tokens: float
    """Mean length of the part's chosen answers."""
    known: int = 0
    """Questions with a known answer that were answered correctly."""
    questions: int = 0
    cut: int = 0
    """Questions whose answers did not end by themselves."""
    kl: float = 0.0
    """KL from the reference on its own answers, nats a token."""
    outcomes: tuple[float, ...] = ()
    """With a judge: 1 for a win against the base, 0.5 for a tie, 0 for a loss; prompts that it could not judge are
    left out."""
    longer_by: tuple[float, ...] = ()
    """With a judge: tokens by which its answer is longer than the base's, for the same prompts."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Measured:
        """What `to_json` gave."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**values)

    def asked_before(self, before: Measured | None) -> Measured:
        """With what the same policy answered to the questions on another part, if it was not asked them on this one."""
        if self.questions or before is None:
            return self
        return replace(self, known=before.known, questions=before.questions, cut=before.cut)

    @property
    def accuracy(self) -> Interval:
        """Reward accuracy; the pairs of one prompt are one unit."""
        return rate(sum(self.right), len(self.right))


@dataclass(frozen=True)
class Score:
    """The one number with its interval, and what it is made of."""

    quality: Interval
    costs: Mapping[str, float]

    @property
    def cost(self) -> float:
        """All costs together."""
        return sum(self.costs.values())

    @property
    def value(self) -> float:
        """The score."""
        return self.quality.value - self.cost

    @property
    def low(self) -> float:
        """The lower end of its interval: what candidates are compared by."""
        return self.quality.low - self.cost

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"value": self.value, "low": self.low, "quality": vars(self.quality), "costs": dict(self.costs)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Score:
        """What `to_json` gave."""
        return cls(Interval(**stored["quality"]), dict(stored["costs"]))


def score(found: Measured, base: Measured, *, control_length: bool = True) -> Score:
    """The score of a policy, measured beside its base on the same prompts.

    Args:
        control_length: with a judge, take the length of the answers out of the win rate
            (`intervals.length_controlled`).
    """
    answers = len(found.finished) + found.questions
    costs = {
        "unfinished": (len(found.finished) - sum(found.finished) + found.cut) / answers if answers else 0.0,
        "repeated": max(0.0, _mean(found.repeated) - _mean(base.repeated)),
        "forgotten": max(0, base.known - found.known) / found.questions if found.questions else 0.0,
    }
    if found.outcomes:
        wins, longer = found.outcomes, found.longer_by
        quality = length_controlled(wins, longer) if control_length else rate(sum(wins), len(wins))
        return Score(quality, costs)
    if found.chosen_tokens:
        off = abs(_mean(found.tokens) / found.chosen_tokens - 1)
        costs["length"] = min(1.0, max(0.0, off - LENGTH_ROOM))
    return Score(found.accuracy, costs)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def best_of(candidates: Mapping[int, tuple[Score, float]], *, budget: float) -> int | None:
    """The number of the best candidate; None if there is none within the budget of KL.

    Args:
        candidates: by number, each one's score and KL.
    """
    within = {number: found for number, found in candidates.items() if found[1] <= budget}
    if not within:
        return None
    highest = max(found.low for found, _ in within.values())
    equal = [number for number, (found, _) in within.items() if found.low >= highest - EQUAL]
    return min(equal, key=lambda number: (within[number][1], number))


def frontier(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """Numbers of those `(KL, score)` that no other beats in both, by rising KL."""
    kept: list[int] = []
    highest = float("-inf")
    for number, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if value > highest:
            kept.append(number)
            highest = value
    return kept

"""What `lora-dpo eval` found out about one adapter: numbers with intervals, and the call that they allow."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.adapters.stored_pairs import HELD_OUT
from lora_dpo.evaluation.intervals import Interval, call
from lora_dpo.evaluation.win_rate import WinRate


@dataclass(frozen=True)
class PairPart:
    """Held-out pairs: does the adapter raise chosen answers above rejected ones, against its reference?"""

    pairs: int
    accuracy: Interval
    """Share of pairs with h(chosen) > h(rejected), a tie as half; averaged over the pairs of a prompt first."""
    controlled: Interval
    """The same with the length of the answers taken out."""
    margin: Interval
    """Mean of β·(h(chosen) - h(rejected)), Rafailov et al. 2023, eq. 5."""
    chosen: tuple[float, ...]
    """h of each chosen answer, in nats."""
    rejected: tuple[float, ...]


@dataclass(frozen=True)
class AnswerPart:
    """What one model's answers look like."""

    tokens: Interval
    finished: Interval
    repetition: Interval
    """Mean share of repeated three-word sequences."""
    refusals: Interval


@dataclass(frozen=True)
class TextPart:
    """Perplexity on plain text, for what was forgotten."""

    tokens: int
    base: float
    adapter: float
    ratio: Interval
    """Perplexity with the adapter over that of the base; 1 is no change."""


@dataclass(frozen=True)
class Assessment:
    """Everything that `lora-dpo eval` found out about one adapter."""

    adapter: str
    base: str
    against: str
    data: tuple[str, ...]
    beta: float
    pairs: PairPart
    ours: AnswerPart | None
    theirs: AnswerPart | None
    length_change: Interval | None
    """Mean tokens of the adapter's answer less the other's, prompt by prompt."""
    contest: WinRate | None
    learned: Interval | None
    """Reward accuracy on training prompts at first sight (`prequential.py`); None where no log says it."""
    kl: Interval | None
    """Nats a token."""
    text: TextPart | None
    rows: tuple[tuple[str, str, str], ...]
    """`(prompt, answer of the other, answer of the adapter)`."""
    seconds: float
    cost: str = ""
    trained_on: tuple[str, ...] = ()
    """Those of `data` that the adapter was trained on."""

    def warnings(self) -> list[str]:
        """What makes the numbers say less than they seem to."""
        found = []
        if self.trained_on:
            found.append(
                f"The adapter was trained on {', '.join(self.trained_on)}: what it has seen flatters it. Give pairs "
                f"with other prompts{self._held_out()}."
            )
        if self.contest and self.contest.foreign:
            found.append(
                f"{self.contest.foreign} votes under these names are on other weights or another base: left out."
            )
        return found

    def _held_out(self) -> str:
        place = Path(self.adapter) / HELD_OUT
        return f", such as those that its run held out: --data {shlex.quote(str(place))}" if place.is_file() else ""

    def numbers(self) -> dict[str, Interval]:
        """All estimates by the names that `--require` knows."""
        found: dict[str, Interval | None] = {
            "accuracy": self.pairs.accuracy,
            "accuracy-lc": self.pairs.controlled,
            "learned": self.learned,
            "margin": self.pairs.margin,
            "win-rate": self.contest.win_rate if self.contest else None,
            "win-rate-lc": self.contest.controlled if self.contest else None,
            "kl": self.kl,
            "length": self.ours.tokens if self.ours else None,
            "length-change": self.length_change,
            "finished": self.ours.finished if self.ours else None,
            "repetition": self.ours.repetition if self.ours else None,
            "refusals": self.ours.refusals if self.ours else None,
            "perplexity-ratio": self.text.ratio if self.text else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def called(self) -> str:
        """`better`, `worse`, `no better than chance` or `undecided`.

        By the win rate where there is one, else by the reward accuracy. Better must be learnt, too: if the run could
        not predict the labels of pairs that it saw for the first time, it only drifted, and another seed would have
        drifted elsewhere (`prequential.py`). Where that is not known, an accuracy must hold with length taken out.
        """
        first = call(self.contest.win_rate if self.contest else self.pairs.accuracy)
        if first != "better":
            return first
        if self.learned is not None:
            return call(self.learned) if call(self.learned) == "better" else "no better than chance"
        return first if self.contest or call(self.pairs.controlled) == "better" else "undecided"

    def verdict(self) -> str:
        """One sentence or two, with the intervals that they rest on."""
        called, against = self.called, self.against if self.contest else "chance"
        rests = self.contest.win_rate if self.contest else self.pairs.accuracy
        what = f"{f'win rate against {against}' if self.contest else 'reward accuracy'} {_interval(rests)}"
        if called in ("better", "worse"):
            text = f"{called.capitalize()} than {against}: {what}."
        elif called == "undecided":
            text = f"Undecided: {what}, but with length taken out {_interval(self.pairs.controlled)}."
        elif call(rests) == "better" and self.learned is not None:
            text = (
                f"No better than chance: {what}, but in training the labels of prompts seen for the first time were "
                f"not predicted ({_interval(self.learned)}), so this is drift that another seed would turn elsewhere."
            )
        else:
            text = f"No better than chance: {what}."
        if self.contest is None:
            text += " This is about telling answers apart; whether its own answers are better takes --judge or --votes."
        return text

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "format": 1,
            "adapter": self.adapter,
            "base": self.base,
            "against": self.against,
            "data": list(self.data),
            "beta": self.beta,
            "called": self.called,
            "verdict": self.verdict(),
            "warnings": self.warnings(),
            "numbers": {name: value.to_json() for name, value in self.numbers().items()},
            "pairs": {
                "pairs": self.pairs.pairs,
                "log_ratios": {"chosen": list(self.pairs.chosen), "rejected": list(self.pairs.rejected)},
            },
            "answers": {
                name: {key: value.to_json() for key, value in vars(part).items()}
                for name, part in (("adapter", self.ours), (self.against, self.theirs))
                if part is not None
            },
            "contest": self.contest.to_json() if self.contest else None,
            "text": None
            if self.text is None
            else {"tokens": self.text.tokens, "base": self.text.base, "adapter": self.text.adapter},
            "rows": [{"prompt": row[0], "against": row[1], "adapter": row[2]} for row in self.rows],
            "seconds": round(self.seconds, 1),
            "cost": self.cost,
        }


def _interval(found: Interval) -> str:
    return f"{found.value:.2f}, 95% interval {found.low:.2f} to {found.high:.2f}, n = {found.n}"

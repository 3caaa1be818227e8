"""Who answers better: two models' answers to the same prompts, judged in both orders, or counted from blind votes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dpo.data.prompts import Prompt
from lora_dpo.data.rows import read_rows
from lora_dpo.errors import DataError
from lora_dpo.evaluation.intervals import Interval, length_controlled, rate
from lora_dpo.judging import Judge
from lora_dpo.model.decoding import Answer


@dataclass(frozen=True)
class WinRate:
    """Outcomes of one model against another, one a prompt: 1 a win, 0.5 a tie, 0 a loss; the mean of several votes."""

    judge: str
    against: str
    outcomes: tuple[float, ...]
    longer_by: tuple[float, ...]
    """Length of the model's answer less that of the other's; tokens, with votes words."""
    contradicted: int = 0
    """Prompts at which the two orders of showing the answers gave opposite verdicts: ties."""
    unjudged: int = 0
    """Prompts that the judge could not score: left out."""
    scores: tuple[tuple[float | None, float | None], ...] = ()
    """The judge's scores of the model's and the other's answer, one pair a prompt asked."""
    votes: int | None = None
    """Votes that were counted; None with a judge."""
    foreign: int = 0
    """Votes on other weights under these names, or on another base: left out."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """Wins, ties, losses."""
        wins = sum(value > 0.5 for value in self.outcomes)
        losses = sum(value < 0.5 for value in self.outcomes)
        return wins, len(self.outcomes) - wins - losses, losses

    @property
    def win_rate(self) -> Interval:
        """Share of prompts won, a tie as half a win."""
        return rate(sum(self.outcomes), len(self.outcomes))

    @property
    def controlled(self) -> Interval:
        """The same with length taken out (`intervals.length_controlled`)."""
        return length_controlled(self.outcomes, self.longer_by)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        wins, ties, losses = self.counts
        return {
            "judge": self.judge,
            "against": self.against,
            "wins": wins,
            "ties": ties,
            "losses": losses,
            "contradicted": self.contradicted,
            "unjudged": self.unjudged,
            "votes": self.votes,
            "foreign_votes": self.foreign,
            "win_rate": self.win_rate.to_json(),
            "length_controlled_win_rate": self.controlled.to_json(),
        }


def judged(
    prompts: Sequence[Prompt],
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    judge: Judge,
    *,
    against: str,
    on_prompt: Callable[[int], None] | None = None,
) -> WinRate:
    """Have a judge compare two models' answers, each two shown in both orders.

    A model as a judge tends to prefer a place (Zheng et al. 2023, arXiv 2306.05685, section 3.3): where the two orders
    contradict each other, neither has won.

    Raises:
        DataError: the judge could score no prompt.
        JudgeError: the judge failed.
    """
    outcomes, longer_by, scores = [], [], []
    contradicted = unjudged = 0
    for done, (prompt, our, their) in enumerate(zip(prompts, ours, theirs, strict=True), start=1):
        their_first, our_second = judge.score(prompt, [their, our])
        our_first, their_second = judge.score(prompt, [our, their])
        scores.append((our_first, their_first))
        if None in (our_first, our_second, their_first, their_second):
            unjudged += 1
        else:
            one, other = _verdict(our_second, their_first), _verdict(our_first, their_second)
            contradicted += {one, other} == {0.0, 1.0}
            outcomes.append(_settle(one, other))
            longer_by.append(float(our.said_tokens - their.said_tokens))
        if on_prompt:
            on_prompt(done)
    if not outcomes:
        raise DataError(
            f"The judge {judge.spec} could score no prompt. Give prompts that it can judge, or another judge."
        )
    return WinRate(judge.spec, against, tuple(outcomes), tuple(longer_by), contradicted, unjudged, tuple(scores))


def _verdict(ours: float | None, theirs: float | None) -> float:
    if ours is None or theirs is None or ours == theirs:
        return 0.5
    return 1.0 if ours > theirs else 0.0


def _settle(one: float, other: float) -> float:
    """Two verdicts make one: opposite ones are a tie, and a winner in one order alone has won."""
    both = one + other
    return 1.0 if both > 1 else 0.0 if both < 1 else 0.5


def voted(
    path: str,
    *,
    us: str,
    against: str,
    weights: Mapping[str, str | None] | None = None,
    base: str | None = None,
) -> WinRate:
    """Count the demo's blind votes between two models; several votes on one prompt are averaged first.

    Args:
        path: the file of votes. Those without a winner (both good, both bad) are in a file beside it and count as
            ties; skipped ones do not count.
        us, against: the names that the votes know the two models by: an adapter's folder, or `base`.
        weights: SHA-256 of each adapter's weights, by these names.
        base: fingerprint of the base. A vote that names other weights or another base is left out, and counted; one
            that names none is taken.

    Raises:
        DataError: there is no vote between these two.
    """
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    names: set[str] = set()
    foreign = 0
    for row in _vote_rows(path):
        found = _vote(row)
        if found is None:
            continue
        texts, outcome_of_first = found
        names.update(texts)
        if set(texts) != {us, against}:
            continue
        if _is_foreign(row["origin"], weights or {}, base):
            foreign += 1
            continue
        outcome = outcome_of_first if next(iter(texts)) == us else 1 - outcome_of_first
        longer = float(len(texts[us].split()) - len(texts[against].split()))
        by_prompt.setdefault(json.dumps(row.get("prompt")), []).append((outcome, longer))
    if not by_prompt:
        known = f" It has votes on {', '.join(sorted(names))}." if names else ""
        if foreign:
            known = f" Its {foreign} votes under these names are on other weights or another base."
        raise DataError(f"{path} holds no vote between {us} and {against}.{known}")
    units = [tuple(fmean(column) for column in zip(*votes, strict=True)) for votes in by_prompt.values()]
    outcomes, longer_by = zip(*units, strict=True)
    count = sum(map(len, by_prompt.values()))
    return WinRate(f"votes in {path}", against, outcomes, longer_by, votes=count, foreign=foreign)


def _is_foreign(origin: Mapping[str, Any], weights: Mapping[str, str | None], base: str | None) -> bool:
    """Whether a vote says that it is on other weights than these, or on another base."""
    sides = [side for side in map(origin.get, ("chosen", "rejected", "a", "b")) if isinstance(side, Mapping)]
    named = [(side.get("adapter_sha256"), weights.get(str(side.get("who")))) for side in sides]
    named.append((origin.get("model_fingerprint"), base))
    return any(said and known and said != known for said, known in named)


def _vote_rows(path: str) -> Iterator[Mapping[str, Any]]:
    for _, row in read_rows(path):
        yield row
    file = Path(path)
    beside = file.with_name(f"{file.stem}.other{file.suffix}")
    if beside.is_file() and beside.stat().st_size:
        for _, row in read_rows(str(beside)):
            yield row


def _vote(row: Mapping[str, Any]) -> tuple[dict[str, str], float] | None:
    """Two models' texts by name, and the outcome of the first; None for a row that is no vote between two models."""
    origin = row.get("origin")
    if not isinstance(origin, Mapping):
        return None
    vote = origin.get("vote")
    sides, outcome = (("chosen", "rejected"), 1.0) if vote in ("a", "b") else (("a", "b"), 0.5)
    if vote not in ("a", "b", "both good", "both bad"):
        return None
    texts: dict[str, str] = {}
    for side in sides:
        facts = origin.get(side)
        if not isinstance(facts, Mapping) or not isinstance(facts.get("who"), str):
            return None
        texts[facts["who"]] = _text(row.get(side))
    return (texts, outcome) if len(texts) == 2 else None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(message.get("content", "")) for message in value if isinstance(message, Mapping))
    return str(value or "")

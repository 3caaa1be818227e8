"""Blind votes: each is on the disk before it is acknowledged, and together they say who wins.

votes.jsonl        "A is better" and "B is better": preference pairs in the canonical form, ready to train on
votes.other.jsonl  both good, both bad, skipped: kept, and no pairs

Every row's `origin` says which models gave the two answers, how, and in which order they were shown.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_dpo.data import Message, Origin
from lora_dpo.data.chat_template import assistant_turn
from lora_dpo.data.formats.trl import checked_pair
from lora_dpo.data.journal import append_durably
from lora_dpo.data.messages import BadRow
from lora_dpo.data.row_reading import Row
from lora_dpo.data.rows import read_rows
from lora_dpo.data.write import canonical_row
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.evaluation import intervals
from lora_dpo.files import disk_errors
from lora_dpo.text import shown

Verdict = Literal["a", "b", "both good", "both bad", "skip"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class ShownAnswer:
    """One of the two answers that are voted on."""

    text: str
    who: str
    """`base`, or the adapter's name."""
    facts: Mapping[str, Any]
    """How it was made: seed, temperature, the adapter's hash."""


@dataclass(frozen=True)
class HeadToHead:
    """How one model did against another, by the votes."""

    first: str
    second: str
    wins: int
    losses: int
    both_good: int
    both_bad: int
    skipped: int

    @property
    def decided(self) -> int:
        """Votes that prefer one of the two."""
        return self.wins + self.losses

    @property
    def rate(self) -> float | None:
        """Share of the decided votes that `first` won; None without any."""
        return self.wins / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `rate`; `(0, 1)` without any decided vote."""
        if not self.decided:
            return 0.0, 1.0
        found = intervals.rate(self.wins, self.decided)
        return found.low, found.high


class VoteLog:
    """The file of votes. Several threads and processes may write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.other = path.with_name(f"{path.stem}.other{path.suffix}")
        self._lock = threading.RLock()
        self._known: tuple[Any, list[HeadToHead]] | None = None
        """The state of the files, and what was read from them then."""

    def add(
        self,
        prompt: Sequence[Message],
        a: ShownAnswer,
        b: ShownAnswer,
        verdict: str,
        *,
        vote_id: str,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write one vote and wait until it is on the disk; returns the file it is in.

        Args:
            verdict: one of `VERDICTS`.
            vote_id: names the vote, so that a repeated one is seen.
            facts: what holds for both answers, such as the base; goes into the origin.

        Raises:
            ConfigError: there is no such verdict.
            DataError: the two answers cannot make a pair: they are equal, or one is empty.
            OutputError: the disk refuses. Then the vote was not counted.
        """
        if verdict not in VERDICTS:
            raise ConfigError(f"{shown(verdict)} is no verdict: allowed are {', '.join(VERDICTS)}.")
        origin: Row = {
            "vote": verdict,
            "id": vote_id,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "shown": [a.who, b.who],
            **(facts or {}),
        }
        if verdict in ("a", "b"):
            chosen, rejected = (a, b) if verdict == "a" else (b, a)
            target, row = self.path, _pair_row(prompt, chosen, rejected, origin)
        else:
            sides = {"a": _facts(a), "b": _facts(b)}
            target = self.other
            row = {"prompt": list(prompt), "a": a.text, "b": b.text, "verdict": verdict, "origin": {**origin, **sides}}
        with self.held():
            append_durably(target, row)
        return target

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads and processes from writing for the length of the block."""
        import filelock

        with disk_errors(self.path), self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_name(f".{self.path.name}.lock")):
                yield

    def rows(self) -> Iterator[Row]:
        """The rows of both files, pairs first; lines that are no rows are passed over."""
        for path in (self.path, self.other):
            if path.is_file() and path.stat().st_size:
                yield from (row for _, row in read_rows(str(path), on_broken=lambda *broken: None))

    def records(self) -> list[HeadToHead]:
        """How each model did against each other one; two samples of one model say nothing here."""
        state, known = self.state(), self._known
        if known is None or known[0] != state:  # every page shows them after every vote
            known = self._known = (state, self._read_records())
        return list(known[1])

    def _read_records(self) -> list[HeadToHead]:
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for row in self.rows():
            found = _outcome(row)
            if found is None:
                continue
            winner, loser, what = found
            pair = _ordered(winner, loser)
            if what == "won" and pair[0] != winner:
                what = "lost"
            tally = counts.setdefault(pair, dict.fromkeys(("won", "lost", "both good", "both bad", "skip"), 0))
            tally[what] += 1
        return [HeadToHead(*pair, *tally.values()) for pair, tally in sorted(counts.items())]

    def state(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The same as long as no vote is added, changed or removed."""
        return _changed(self.path), _changed(self.other)

    def count(self) -> tuple[int, int]:
        """Votes that are pairs, and others."""
        return _lines(self.path), _lines(self.other)


def _changed(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _pair_row(prompt: Sequence[Message], chosen: ShownAnswer, rejected: ShownAnswer, origin: Row) -> Row:
    sides = [(assistant_turn(side.text),) for side in (chosen, rejected)]
    origin = {**origin, "chosen": _facts(chosen), "rejected": _facts(rejected)}
    try:
        pair = checked_pair(tuple(prompt), sides[0], sides[1], Origin("vote", 1), provenance=origin)
    except BadRow as bad:
        raise DataError(f"This vote makes no pair to train on ({bad}). Choose both good, both bad or skip.") from None
    return canonical_row(pair)


def _facts(side: ShownAnswer) -> Row:
    return {"who": side.who, **side.facts}


def _outcome(row: Row) -> tuple[str, str, str] | None:
    """`(winner, loser, what)` of a row with the origin of a vote between two models; else None."""
    origin = row.get("origin")
    if not isinstance(origin, dict) or origin.get("vote") not in VERDICTS:
        return None
    decided = origin["vote"] in ("a", "b")
    sides = [origin.get(side) for side in (("chosen", "rejected") if decided else ("a", "b"))]
    names = [side.get("who") for side in sides if isinstance(side, dict)]
    if len(names) != 2 or names[0] == names[1] or not all(isinstance(name, str) for name in names):
        return None
    return str(names[0]), str(names[1]), "won" if decided else str(origin["vote"])


def _ordered(one: str, other: str) -> tuple[str, str]:
    """The base is always second: what is asked is whether an adapter beats it."""
    first, second = sorted((one, other), key=lambda name: (name == "base", name))
    return first, second


def _lines(path: Path) -> int:
    return sum(1 for line in path.open("rb") if line.strip()) if path.is_file() else 0

"""What the toolkit means by a preference pair, and how reading accounts for every row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_dpo.data.chat_template import Message
from lora_dpo.text import counted, reasons_text

ROWS_SHOWN = 8
"""Places of a finding that are named on a page or in a terminal."""


@dataclass(frozen=True)
class Origin:
    """Where a pair came from: the file or hub id, and the row (a line number in JSONL), from 1; 0 is all of it."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}" if self.row else self.source


@dataclass(frozen=True)
class PreferencePair:
    """One judgement: after `prompt`, `chosen` is better than `rejected`. All are chat messages."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    chosen_score: float | None = None
    """What the judge gave the chosen answer, on the data's own scale; higher is better."""
    rejected_score: float | None = None
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the model may call; the chat template writes them."""
    provenance: Mapping[str, Any] | None = None
    """The row's own `origin` object: what it says about how it was made."""

    @property
    def gap(self) -> float | None:
        """Score of the chosen answer less that of the rejected one; None unless both have a score."""
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True)
class UnpairedAnswer:
    """One answer with a thumb up or down; two opposite votes after the same prompt make a pair."""

    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    up: bool
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()

    def doubled(self) -> PreferencePair:
        """The answer as both sides of a pair, for what looks at pairs."""
        return PreferencePair(self.prompt, self.answer, self.answer, self.origin, tools=self.tools)


@dataclass(frozen=True)
class Dropped:
    """A row that was left out, and why. `kind` is one of `messages.Kind`, or `unreadable`."""

    origin: Origin
    reason: str
    kind: str = "malformed"


@dataclass
class ReadReport:
    """The account of one reading: `kept = rows - dropped + surplus - held_out`, always."""

    rows: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    surplus: int = 0
    """Pairs made less rows used: above 0 if rows hold several pairs, below if two votes make one."""
    held_out: int = 0
    """Pairs that were set apart, to be measured and not trained on."""
    formats: Counter[str] = field(default_factory=Counter)
    """Rows by the format that they were read as."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What a person should know of how a file was read, by the file: its encoding, its sheet, which column was what."""

    @property
    def kept(self) -> int:
        """Pairs that are left."""
        return self.rows - len(self.dropped) + self.surplus - self.held_out

    @property
    def read_as(self) -> str:
        """`HH-RLHF transcripts`, or with counts if rows have several formats."""
        if len(self.formats) == 1:
            return next(iter(self.formats))
        return ", ".join(f"{title} ({count})" for title, count in self.formats.most_common())

    def note(self, file: str, text: str) -> None:
        """Enter what a person should know of how a file was read."""
        self.notes.setdefault(file, []).append(text)

    def noted(self) -> list[str]:
        """The notes as lines; of several files, a line a file with its name."""
        if len(self.notes) > 1:
            return [f"{file}: {'; '.join(notes)}" for file, notes in self.notes.items()]
        return [note for notes in self.notes.values() for note in notes]

    def reasons(self) -> list[tuple[str, int]]:
        """Reasons with their counts, the most frequent first."""
        return Counter(dropped.reason for dropped in self.dropped).most_common()

    def summary(self, what: str = "pairs") -> str:
        """`250 pairs read, 2 dropped (2 empty chosen answer)`; `what` names other things that rows become.

        Reasons are told without their details, and six of them: the rows are all in `dropped`.
        """
        why = reasons_text(self.reasons())
        read = counted(self.kept, what.removesuffix("s"))
        apart = f", {self.held_out:,} held out" if self.held_out else ""
        return f"{read} read, {len(self.dropped):,} dropped" + (f" ({why})" if why else "") + apart


def pair_mark(pair: PreferencePair) -> str:
    """A short hash of what a pair says, wherever it lies: of its prompt, its answers in their order, and its tools."""
    said = [pair.prompt, pair.chosen, pair.rejected, pair.tools]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` indices spread evenly over `range(total)`: a fair sample, not the best."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def rows_text(rows: Sequence[Origin], shown: int = ROWS_SHOWN) -> str:
    """`3, 7 of a.jsonl; 12 of b.jsonl; … 40 more`."""
    by_source: dict[str, list[str]] = {}
    for origin in rows[:shown]:
        by_source.setdefault(origin.source, []).append(str(origin.row))
    named = "; ".join(f"{', '.join(numbers)} of {source}" for source, numbers in by_source.items())
    return named + (f"; … {len(rows) - shown} more (--json lists all)" if len(rows) > shown else "")

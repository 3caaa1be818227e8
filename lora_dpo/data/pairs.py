"""What the toolkit means by a preference pair, and how reading accounts for every row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lora_dpo.data.template import Message


@dataclass(frozen=True)
class Origin:
    """Where a pair came from: the file or hub id, and the row (a line number in JSONL), from 1."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True)
class PreferencePair:
    """One judgement: after `prompt`, `chosen` is better than `rejected`. All are chat messages."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin


@dataclass(frozen=True)
class Dropped:
    """A row that was left out, and why."""

    origin: Origin
    reason: str


@dataclass
class ReadReport:
    """The account of one reading: `rows = kept + dropped`, always."""

    rows: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows that became pairs."""
        return self.rows - len(self.dropped)

    def reasons(self) -> list[tuple[str, int]]:
        """Reasons with their counts, the most frequent first."""
        return Counter(dropped.reason for dropped in self.dropped).most_common()

    def summary(self) -> str:
        """`250 pairs read, 2 dropped (2 empty chosen answer)`."""
        why = ", ".join(f"{count} {reason}" for reason, count in self.reasons())
        return f"{self.kept} pairs read, {len(self.dropped)} dropped" + (f" ({why})" if why else "")

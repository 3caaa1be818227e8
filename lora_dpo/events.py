"""What a run tells while it goes on, and how it is asked to stop.

`train` emits these and never prints: the terminal or the page draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resolved:
    """Everything that was decided, before any weight is loaded: `(label, value)` lines."""

    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RowsDropped:
    """Data rows that were left out, as `(origin, reason)`."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Progress:
    """A stage is at `done` of `total`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepLogged:
    """Metrics of an optimiser step, by TRL's names (`loss`, `rewards/margins`, …)."""

    step: int
    total: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Note:
    """Something a user should know; `warning` if it may spoil the result."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Compared:
    """Held-out metrics before and after, as `(name, before, after)`; numbers are formatted."""

    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Answered:
    """The same prompts answered by two models: `(prompt, before, after)` in most runs."""

    rows: tuple[tuple[str, str, str], ...]
    names: tuple[str, str] = ("before", "after")
    """Of the two."""


@dataclass(frozen=True)
class RoundsMeasured:
    """Held-out scores of every round so far; the first row names the columns, numbers are formatted."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Tabulated:
    """A table of a search; the first row names the columns, numbers are formatted."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    grows: bool = False
    """Whether it is told again and again, with one more row or another last one."""


@dataclass(frozen=True)
class Sampled:
    """Answers to a few fixed prompts in the middle of training: `(prompt, before, now)`."""

    step: int
    numbers: Mapping[str, float]
    """`health/answer_tokens`, `health/finished`, `health/repetition`, `health/kl`, …"""
    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Alarmed:
    """The health monitor saw something that spoils the run, or will."""

    step: int
    name: str
    text: str


@dataclass(frozen=True)
class Saved:
    """The adapter folder is whole and in its place."""

    folder: Path


Event = (
    Resolved
    | RowsDropped
    | Progress
    | StepLogged
    | Note
    | Compared
    | Answered
    | RoundsMeasured
    | Tabulated
    | Sampled
    | Alarmed
    | Saved
)
OnEvent = Callable[[Event], None]


class Stopped(Exception):
    """The run was asked to stop. `resumable` if a checkpoint was saved."""

    def __init__(self, output: Path, *, step: int, resumable: bool) -> None:
        super().__init__(f"stopped at step {step}")
        self.output, self.step, self.resumable = output, step, resumable


@dataclass
class StopSignal:
    """Set `requested` from a signal handler or another thread to end a run at its next safe point."""

    requested: bool = False
    keep: bool = False
    """Set it to end training at its next step and keep the adapter as it is then: it is measured and saved."""
    kept_at: int | None = None
    """Filled in by the run: the step, before the last, that `keep` ended it at."""
    output: Path | None = None
    """Filled in by the run: the adapter folder that it works towards."""

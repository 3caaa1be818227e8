"""What a plan holds: data, tokens, steps, memory and time of a run that was not begun."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.training.planning.loading import Loading
from lora_dpo.training.planning.memory_plan import Fix, Machine, Memory

if TYPE_CHECKING:
    from lora_dpo.data import ReadReport
    from lora_dpo.training.planning.dry_run import DryRun


@dataclass(frozen=True)
class Rows:
    """The account of a file: rows read, pairs kept, and rows dropped by reason."""

    rows: int
    pairs: int
    dropped: dict[str, int]
    notes: tuple[str, ...] = ()
    """What a person should know of how the files were read."""

    @classmethod
    def of(cls, report: ReadReport) -> Rows:
        """The account of one reading."""
        return cls(report.rows, report.kept, dict(report.reasons()), tuple(report.noted()))


@dataclass(frozen=True)
class Tokens:
    """Token counts of the training pairs, and of the whole run in a seeded random order.

    `padded` is what TRL computes (batches of the recipe's size, each padded to its longest row), `unpadded` the same
    rows without padding, `stream` what is computed here: a pair's common prefix once, nothing padded.
    """

    medians: dict[str, float]
    longest: dict[str, int]
    cut: int
    """Pairs whose answers `max_length` cuts."""
    edges: tuple[int, ...]
    histogram: dict[str, tuple[int, ...]]
    """Counts of pairs with `edges[i] <= tokens < edges[i + 1]`, for prompt, chosen, rejected and pair (stream)."""
    padded: int
    unpadded: int
    stream: int


@dataclass(frozen=True)
class Steps:
    """Optimiser steps, and how they are run."""

    steps: int
    pairs: int
    """Pairs of a step."""
    passes: float
    """Passes over the training pairs."""
    tokens: float
    """Mean stream tokens of a step."""
    parts: float
    """Mean number of parts that a step is run in."""
    most_parts: int


@dataclass(frozen=True)
class Time:
    """FLOPs of the training steps, and how long they take; evaluation before and after comes on top."""

    flops: float
    flops_per_step: float
    flops_per_second: float | None
    """Of the steps: on a CPU that of a matrix product, measured; None for a card that was not named."""
    seconds: float | None
    published: float | None = None
    """FLOP/s that the maker of a card that was named publishes: which share the steps reach is assumed."""


@dataclass(frozen=True)
class Plan:
    """What `lora-dpo plan` knows."""

    model: str
    machine: Machine
    data: dict[str, Rows]
    tokens: Tokens
    steps: Steps
    memory: Memory
    loading: Loading
    time: Time
    fix: Fix | None = None
    """Set where the recipe does not fit; None there means that nothing was found."""
    roomier: Fix | None = None
    """Set where it is tight: the first settings under which it is not."""
    fits_without_desktop: bool = False
    """It does not fit, and would if no desktop showed on the card."""
    dry_run: DryRun | None = None
    notes: tuple[str, ...] = ()
    held: str = ""
    """How the base's weights are held, for a person."""

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields; bytes, seconds, FLOPs and tokens."""
        values = asdict(self)
        values["memory"]["verdict"] = self.memory.verdict
        return values


@dataclass(frozen=True)
class AnswersPlan:
    """What `lora-dpo plan` knows of a run on single answers, by SFT or KTO: time and memory of a step are not."""

    method: str
    data: dict[str, Rows]
    """`pairs` are answers here."""
    steps: int
    cut: int
    """Answers that `max_length` cuts."""
    weights: int
    """Bytes of the base."""
    adapter: int
    """Bytes of the adapter, its gradient, and the optimiser's state."""
    lines: tuple[tuple[str, str], ...]
    """Rows `(label, value)` of data, tokens, steps, and bytes."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return asdict(self)

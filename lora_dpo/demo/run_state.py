"""What a run has told so far: its events, kept for whoever looks, and for whoever looks later."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

from lora_dpo.events import Answered, Compared, Event, Note, Progress, Resolved, Saved, StepLogged, Tabulated

RECENT = 9
"""Steps that the pace is taken from."""
LATE = 4.0
"""A step that takes so many times as long as the others, and no estimate holds."""


@dataclass(frozen=True)
class Sample:
    """An answer of the model in training, after so many steps; step 0 is before."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run at one moment."""

    name: str
    version: int = 0
    """Grows with everything that is told: the same number, the same state."""
    stage: str = ""
    done: int = 0
    total: int = 0
    steps: tuple[tuple[int, Mapping[str, float]], ...] = ()
    step: int = 0
    all_steps: int = 0
    resolved: tuple[tuple[str, str], ...] = ()
    notes: tuple[Note, ...] = ()
    compared: tuple[tuple[str, str, str], ...] = ()
    answered: tuple[tuple[str, str, str], ...] = ()
    samples: tuple[Sample, ...] = ()
    saved: str | None = None
    ends: tuple[tuple[int, float], ...] = ()
    """The last steps that were seen to end, and when (monotonic)."""
    minutes: float | None = None
    """Of a search for the best settings, how long it may take; None of one training."""
    tables: tuple[Tabulated, ...] = ()
    """What a search has told so far, by title."""

    @property
    def pace(self) -> float | None:
        """Seconds a step, the median of the last ones, which a pause among them does not change; None before two."""
        gaps = [(after - before) / (step - last) for (last, before), (step, after) in pairwise(self.ends)]
        return median(gaps) if gaps else None

    def seconds_left(self, now: float) -> float | None:
        """How long the remaining steps take at that pace; None before two steps, and while one takes far longer."""
        if self.pace is None or self.step >= self.all_steps:
            return None
        late = now - self.ends[-1][1]
        if late > LATE * max(self.pace, 1.0):
            return None
        return max(0.0, self.pace * (self.all_steps - self.step) - min(late, self.pace))


@dataclass
class RunState:
    """Collects the events of one run; safe to read from other threads."""

    name: str
    minutes: float | None = None
    """Of a search, how long it may take."""
    _seen: RunSnapshot = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._seen = RunSnapshot(self.name, minutes=self.minutes)

    @property
    def seen(self) -> RunSnapshot:
        """The state now; it never changes under the reader's feet."""
        return self._seen

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Progress(stage, done, total):
                self._set(stage=stage, done=done, total=total)
            case StepLogged(step, total, metrics) if "loss" in metrics:
                steps = (*self._seen.steps, (step, dict(metrics)))
                ends = (*self._seen.ends, (step, time.monotonic()))[-RECENT:]
                self._set(steps=steps, step=step, all_steps=total, ends=ends)
            case Resolved(lines):
                self._set(resolved=lines)
            case Note() as note:
                self._set(notes=(*self._seen.notes, note))
            case Compared(rows):  # the last that is told before the adapter is written
                self._set(compared=rows, stage="saving", done=0, total=1)
            case Answered(rows, _):
                self._set(answered=rows)
            case Tabulated(title) as grown:
                self._set(tables=(*(one for one in self._seen.tables if one.title != title), grown))
            case Saved(folder):
                self._set(saved=str(folder))

    def restore(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take in what a run had logged before it was interrupted; each row has its `step`."""
        self._set(steps=tuple((int(row["step"]), dict(row)) for row in rows if "loss" in row))

    def sampled(self, sample: Sample) -> None:
        """Take in an answer to one of the chosen prompts."""
        self._set(samples=(*self._seen.samples, sample))

    def touched(self) -> None:
        """Something changed that is not told in events, such as a pause."""
        self._set()

    def _set(self, **changes: object) -> None:
        with self._lock:
            self._seen = replace(self._seen, version=self._seen.version + 1, **changes)  # type: ignore[arg-type]


def logratios(steps: tuple[tuple[int, Mapping[str, float]], ...], beta: float) -> dict[str, list[tuple[int, float]]]:
    """The four curves of a run as `(step, value)`; rewards β·h become log-ratios h in nats."""
    series = {
        "loss": ("loss", 1.0),
        "margin": ("rewards/margins", 1.0),
        "accuracy": ("rewards/accuracies", 1.0),
        "chosen": ("rewards/chosen", 1 / beta),
        "rejected": ("rewards/rejected", 1 / beta),
    }
    return {
        name: [(step, metrics[key] * scale) for step, metrics in steps if key in metrics]
        for name, (key, scale) in series.items()
    }

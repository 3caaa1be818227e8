"""What a run has told so far: its events, kept for whoever looks, and for whoever looks later."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_dpo.events import Answered, Compared, Event, Note, Progress, Resolved, Saved, StepLogged


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
    training_since: tuple[int, float] | None = None
    """The first step that was seen to end, and when (monotonic)."""

    def seconds_left(self, now: float) -> float | None:
        """How long the remaining steps take at the pace so far; None before two steps."""
        if self.training_since is None or self.step >= self.all_steps:
            return None
        first, since = self.training_since
        return (now - since) / (self.step - first) * (self.all_steps - self.step) if self.step > first else None


@dataclass
class RunState:
    """Collects the events of one run; safe to read from other threads."""

    name: str
    _seen: RunSnapshot = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._seen = RunSnapshot(self.name)

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
                since = self._seen.training_since or (step, time.monotonic())
                steps = (*self._seen.steps, (step, dict(metrics)))
                self._set(steps=steps, step=step, all_steps=total, training_since=since)
            case Resolved(lines):
                self._set(resolved=lines)
            case Note() as note:
                self._set(notes=(*self._seen.notes, note))
            case Compared(rows):
                self._set(compared=rows)
            case Answered(rows):
                self._set(answered=rows)
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

"""What a run leaves for its report: `measured.json` beside the adapter.

Answers before and after, log-ratios of held-out pairs, what is odd about the data, what the guard did, time and memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.stored_run import MEASURED
from lora_dpo.config.recipe import DataSection
from lora_dpo.data.columns import Wanted
from lora_dpo.data.doctor.examination import examine
from lora_dpo.events import Event, OnEvent, Progress
from lora_dpo.model.device import peak_of_process

if TYPE_CHECKING:
    from lora_dpo.training.before_after import Measured
    from lora_dpo.training.guard.training_guard import Outcome
    from lora_dpo.training.prepared import Run

MOST_ROWS = 5_000
"""Larger data is not looked at again for the report: the doctor's pass over it would take too long."""


@dataclass
class Stopwatch:
    """Passes a run's events on, and notes how long each stage took."""

    inner: OnEvent
    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Note the event's time, and pass it on."""
        if isinstance(event, Progress):
            now = time.perf_counter()
            start = self._since.setdefault(event.stage, now)
            self.seconds[event.stage] = now - start
        self.inner(event)

    @property
    def total(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.began


def record(
    run: Run, before: Measured, after: Measured, outcome: Outcome, odd: list[dict[str, Any]] | None, scoring: float
) -> dict[str, Any]:
    """Everything that the report of a run shows and that no other file of its folder holds.

    Args:
        odd: what `findings` gave before training, when the data was certainly there.
        scoring: seconds in which pairs were scored with the reference.
    """
    watch = run.emit if isinstance(run.emit, Stopwatch) else None
    ratios = None
    if before.scores is not None and after.scores is not None:
        sides = (("chosen", 0), ("rejected", 1))
        ratios = {
            name: [new - old for new, old in zip(after.scores[side], before.scores[side], strict=True)]
            for name, side in sides
        }
    asked = [prompt[-1]["content"] for prompt in run.prompts]
    answers = zip(asked, before.texts, after.texts, strict=False)
    return {
        "format": 1,
        "answers": [{"prompt": prompt, "before": asdict(old), "after": asdict(new)} for prompt, old, new in answers],
        "log_ratios": ratios,
        "findings": odd,
        "health": asdict(outcome),
        "seconds": {name: round(value, 2) for name, value in watch.seconds.items()} if watch else {},
        "reference_seconds": round(scoring, 2),
        "total_seconds": round(watch.total, 1) if watch else None,
        "memory": peak_memory(),
    }


OF_ANSWERS: dict[str, dict[str, str]] = {
    "roles": {},
    "double-bos": {},
    "leftover": {},
    "lost-end": {},
    "language": {},
    "mojibake": {"meaning": "The model learns to write the damage."},
    "refusal": {
        "title": "refusals among the good answers",
        "meaning": "They are learnt: the model refuses more, also where it should not.",
    },
    "duplicate": {
        "title": "exact duplicates of an earlier row",
        "meaning": "Its answers are seen more often than the others in each pass, and are overfitted first.",
    },
    "near-duplicate": {
        "title": "near duplicates of an earlier row",
        "meaning": "Almost the same as a duplicate: such answers weigh more than others.",
    },
}
"""The doctor's checks that say something about single answers, too, and what they say there. The others are about what
makes a pair: rows without one are trained on here."""
OF_VOTES: dict[str, dict[str, str]] = {
    **OF_ANSWERS,
    "equal": {"meaning": "The same answer is good and bad at once: the two pull in opposite directions and cancel."},
    "contradiction": {},
    "length-bias": {
        "meaning": "It is the easiest difference between good and bad answers: it is learnt instead of the quality.",
        "advice": "Add answers where it is the other way round.",
    },
}
"""The same with bad answers beside the good ones."""


def findings(data: DataSection, rows: int, method: str = "dpo") -> list[dict[str, Any]] | None:
    """What the doctor finds in the training data; None if there is too much of it to look at again."""
    if rows > MOST_ROWS:
        return None
    sources = [data.train] if isinstance(data.train, str) else data.train
    wanted: Wanted = "pairs" if method == "dpo" else "answers"
    diagnosis = examine(sources, format=data.format, columns=data.columns, wanted=wanted)
    kept = ("check", "severity", "title", "count", "meaning", "advice")
    found = [{key: one[key] for key in kept} for one in diagnosis.as_json()["findings"]]
    if method == "dpo":
        return found
    known = OF_ANSWERS if method == "sft" else OF_VOTES
    return [{**one, **known[one["check"]]} for one in found if one["check"] in known]


def peak_memory() -> dict[str, int]:
    """Bytes at the peak: of this process, and allocated on the GPU if there is one."""
    import torch

    peak = {"process": peak_of_process()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def write_record(folder: Path, found: Mapping[str, Any]) -> None:
    """Write `measured.json`."""
    (folder / MEASURED).write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )

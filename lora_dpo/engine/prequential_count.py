"""Counting, in a run, the pairs that are scored before they are learnt from: prompts seen for the first time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

RIGHT, PROMPTS = "first_sight/right", "first_sight/prompts"
"""Names in the log: prompts seen for the first time, and how many of them were ordered as their labels say."""

STATE = "first-sight.json"


class PrequentialCount:
    """Counts, in a run, the prompts seen for the first time and those of them that were predicted right."""

    def __init__(self) -> None:
        self.seen: set[int] | None = set()
        """None if it is not known what the run has seen: then nothing more is counted."""
        self.right, self.prompts = 0.0, 0

    def note(self, prompts: Sequence[int], margins: Sequence[float], *, moved: bool = True) -> None:
        """Count one optimiser step's pairs, scored before the step.

        Args:
            prompts: a number for each pair's prompt.
            margins: h(chosen) - h(rejected) of each pair, in nats; above 0 is right, and 0 is half right.
            moved: whether the policy differs from the reference yet. If not, the margins are rounding: the prompts
                are seen, but nothing was predicted.
        """
        if self.seen is None:
            return
        fresh: dict[int, list[float]] = {}
        for prompt, margin in zip(prompts, margins, strict=True):
            if prompt not in self.seen:
                fresh.setdefault(prompt, []).append(0.5 if margin == 0 else float(margin > 0))
        self.seen.update(fresh)
        if moved:
            self.right += sum(map(fmean, fresh.values()))
            self.prompts += len(fresh)

    def take(self) -> dict[str, float]:
        """What was counted since the last call, for the log; empty if nothing was."""
        if not self.prompts:
            return {}
        counts = {RIGHT: self.right, PROMPTS: float(self.prompts)}
        self.right, self.prompts = 0.0, 0
        return counts

    def save(self, checkpoint: Path) -> None:
        """Put the state into a checkpoint."""
        if self.seen is not None:
            state = {"seen": sorted(self.seen), "right": self.right, "prompts": self.prompts}
            (checkpoint / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; one of an older version has no state, and ends the count."""
        path = checkpoint / STATE
        if not path.is_file():
            self.seen = None
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self.seen, self.right, self.prompts = set(state["seen"]), state["right"], state["prompts"]

"""Did a run learn a rule from its labels, or did it only drift?

A run on labels without any rule still moves: a few more short answers than long ones among the chosen are enough, and
all its answers become shorter. Held-out pairs and judges then see a change as even as a learnt one. What such a run
cannot do is to predict the labels of prompts that it has not seen yet, and its log says whether it did: every batch is
scored before it is learnt from. Of a prompt's pairs the first are counted and no later ones, in the same pass or the
next: their labels usually agree, so that they are remembered and not predicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from lora_dpo.intervals import Interval, rate
from lora_dpo.report.stored import StoredRun, read_run
from lora_dpo.settings import DEFAULTS

FEWEST = 8
"""Prompts; of fewer nothing is said."""
UNMOVED = 1e-4
"""In logs without counts: the margin up to which policy and reference are the same but for float32's rounding."""
RIGHT, PROMPTS = "first_sight/right", "first_sight/prompts"
"""Names in the log: prompts seen for the first time, and how many of them were ordered as their labels say."""
STATE = "first-sight.json"


class FirstSight:
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


def at_first_sight(folder: Path) -> Interval | None:
    """Reward accuracy on training prompts that the run saw for the first time, from the log in its folder.

    None where no log says it (another method or tool, TRL's own passes), or of too few prompts.
    """
    run = read_run(folder)
    kept = run.measured.get("health", {}).get("kept")
    # The guard may have gone back: later steps are not this adapter's.
    run = replace(run, rows=tuple(row for row in run.rows if kept is None or row["step"] <= kept))
    counted = [row for row in run.trained if PROMPTS in row]
    if counted:
        right, prompts = sum(row[RIGHT] for row in counted), int(sum(row[PROMPTS] for row in counted))
    else:
        right, prompts = _by_batches(run)
    return rate(right, prompts) if prompts >= FEWEST else None


def _by_batches(run: StoredRun) -> tuple[float, int]:
    """The same from the accuracies of whole batches in the first pass, if each pair has a prompt of its own."""
    data = run.passport.data.get("train", {}) if run.passport else {}
    left = data.get("pairs", 0) if data.get("pairs") == data.get("prompts") else 0
    settings = {**DEFAULTS, **(run.recipe.get("trainer") or {})}
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    right, pairs, before = 0.0, 0, 0
    for row in run.trained:
        size = min(left, (row["step"] - before) * batch)  # the last batch of a pass may be smaller
        left, before = left - size, row["step"]
        if "rewards/accuracies" not in row or abs(row.get("rewards/margins", 0.0)) <= UNMOVED:
            continue
        right += row["rewards/accuracies"] * size
        pairs += size
    return right, pairs

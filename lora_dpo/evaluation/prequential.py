"""Did a run learn a rule from its labels, or did it only drift?

A run on labels without any rule still moves: a few more short answers than long ones among the chosen are enough, and
all its answers become shorter. Held-out pairs and judges then see a change as even as a learnt one. What such a run
cannot do is to predict the labels of prompts that it has not seen yet, and its log says whether it did: every batch is
scored before it is learnt from. Of a prompt's pairs the first are counted and no later ones, in the same pass or the
next: their labels usually agree, so that they are remembered and not predicted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_dpo.adapters.stored_run import StoredRun, read_run
from lora_dpo.config.trl_dpo import DEFAULTS
from lora_dpo.engine.prequential_count import PROMPTS, RIGHT
from lora_dpo.evaluation.intervals import Interval, rate

FEWEST = 8
"""Prompts; of fewer nothing is said."""
UNMOVED = 1e-4
"""In logs without counts: the margin up to which policy and reference are the same but for float32's rounding."""


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

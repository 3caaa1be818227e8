"""Did a run learn a rule from its labels, or did it only drift?

A run on labels without any rule still moves: a few more short answers than long ones among the chosen are enough, and
all its answers become shorter. Held-out pairs and judges then see a change as even as a learnt one. What such a run
cannot do is to predict the labels of pairs that it has not seen yet, and its log says whether it did: in the first pass
over the data every batch is scored before it is learnt from.
"""

from __future__ import annotations

from pathlib import Path

from lora_dpo.intervals import Interval, rate
from lora_dpo.report.stored import read_run
from lora_dpo.settings import DEFAULTS

FEWEST = 8
"""Pairs; of fewer nothing is said."""
UNMOVED = 1e-4
"""Margin up to which policy and reference are still the same but for rounding, so that TRL's accuracy is a coin."""


def at_first_sight(folder: Path) -> Interval | None:
    """Reward accuracy on training pairs that the run saw for the first time, from the log in its folder.

    None without a log of rewards: another method or tool, or too few pairs.
    """
    run = read_run(folder)
    settings = {**DEFAULTS, **(run.recipe.get("trainer") or {})}
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    right, pairs, before = 0.0, 0, 0
    for row in run.trained:
        steps, before = row["step"] - before, row["step"]
        if "rewards/accuracies" not in row or row.get("epoch", 0.0) > 1.0:
            continue
        if abs(row.get("rewards/margins", 0.0)) <= UNMOVED:
            continue
        right += row["rewards/accuracies"] * steps * batch
        pairs += steps * batch
    return rate(right, pairs) if pairs >= FEWEST else None

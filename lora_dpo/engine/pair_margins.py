"""The margin of each pair of a run, whenever a step scored it: before the run had learnt from it, and at last.

A step scores its pairs before its update, so this costs no pass. A pair is known by its token ids, as in the reference
cache: the same pair at two places of the data is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STATE = "pair-margins.safetensors"


class SeenMargin(NamedTuple):
    """h(chosen) - h(rejected) of one pair in nats, h = log π_θ - log π_ref, as the steps of a run saw it."""

    first: float | None
    """Before the run had learnt from the pair; None if the policy was still the reference then."""
    last: float | None
    """At its last time; None if the policy was the reference whenever the pair was seen."""
    mean: float | None
    """Over all times at which the policy was not the reference."""
    times: int
    """How many those are."""


class PairMargins:
    """Notes the margins of a run's pairs, step by step, and goes on with them from a checkpoint."""

    def __init__(self) -> None:
        self._seen: dict[bytes, SeenMargin] | None = {}

    @property
    def known(self) -> bool:
        """False if the run does not know what it has seen: it went on from a checkpoint without a state."""
        return self._seen is not None

    def note(self, keys: Sequence[bytes], margins: Sequence[float], *, moved: bool = True) -> None:
        """Note one optimiser step's pairs, scored before the step.

        Args:
            keys: what the reference cache knows each pair by.
            margins: of each pair, in nats. What is not finite is left out.
            moved: whether the policy differs from the reference yet. If not, the margins are rounding.
        """
        if self._seen is None:
            return
        for key, margin in zip(keys, margins, strict=True):
            before = self._seen.get(key)
            if not moved or not math.isfinite(margin):
                self._seen.setdefault(key, SeenMargin(None, None, None, 0))
            elif before is None:
                self._seen[key] = SeenMargin(margin, margin, margin, 1)
            else:
                times = before.times + 1
                mean = margin if before.mean is None else before.mean + (margin - before.mean) / times
                self._seen[key] = SeenMargin(before.first, margin, mean, times)

    def of(self, key: bytes) -> SeenMargin | None:
        """What is known of a pair; None if the run has not seen it, or does not know what it has seen."""
        return None if self._seen is None else self._seen.get(key)

    def save(self, checkpoint: Path) -> None:
        """Put the state into a checkpoint: 52 bytes a pair."""
        import torch
        from safetensors.torch import save_file

        if not self._seen:
            return
        keys = torch.tensor([list(key) for key in self._seen], dtype=torch.uint8)
        rows = [[math.nan if value is None else value for value in seen] for seen in self._seen.values()]
        save_file({"keys": keys, "margins": torch.tensor(rows, dtype=torch.float64)}, checkpoint / STATE)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint. One of an older version has no state: then nothing more is noted, since what this
        run sees next it may have learnt from already."""
        from safetensors.torch import load_file

        path = checkpoint / STATE
        if not path.is_file():
            self._seen = None
            return
        state = load_file(path)
        self._seen = {}
        for key, (first, last, mean, times) in zip(state["keys"].tolist(), state["margins"].tolist(), strict=True):
            self._seen[bytes(key)] = SeenMargin(_known(first), _known(last), _known(mean), int(times))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

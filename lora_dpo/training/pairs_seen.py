"""What the steps of a run made of each pair, by the rows of its data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_dpo.adapters.stored_margins import PairMargin
from lora_dpo.data import TokenPair
from lora_dpo.engine.pair_margins import PairMargins
from lora_dpo.engine.reference_cache import pair_key

if TYPE_CHECKING:
    from lora_dpo.engine.engine import Engine
    from lora_dpo.training.prepared import Run


def margins_of(run: Run, engine: Engine | None) -> list[PairMargin]:
    """The margins of a run's training pairs in the order of its data; none where TRL's own passes trained."""
    return [] if engine is None else _by_rows(run, engine.margins)


def margins_in(run: Run, checkpoint: Path) -> list[PairMargin]:
    """The same from a checkpoint; none where it has no state of them."""
    margins = PairMargins()
    margins.load(checkpoint)
    return _by_rows(run, margins)


def _by_rows(run: Run, margins: PairMargins) -> list[PairMargin]:
    if not margins.known:
        return []
    found = []
    for pair in run.train:
        seen = margins.of(key_of(pair))
        first, last, mean, times = seen if seen is not None else (None, None, None, 0)
        found.append(PairMargin(pair.origin, pair.mark, first, last, mean, times))
    return found


def key_of(pair: TokenPair) -> bytes:
    """What the engine knows a pair by: `PairBatch.keys` of a batch with it in."""
    sides = (pair.chosen, pair.rejected)
    return pair_key(
        [pair.prompt + side for side in sides], [[0] * len(pair.prompt) + [1] * len(side) for side in sides]
    )

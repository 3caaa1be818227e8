"""The reference's log-probabilities of a whole dataset, before the first step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trl

    from lora_dpo.engine.engine import Engine


def scored_references(
    trainer: trl.DPOTrainer, engine: Engine, dataset: Any, on_pair: Callable[[int], None] | None
) -> list[tuple[float, float]]:
    """See `DPOTrainer.score_references`."""
    if not len(dataset):
        return []  # without rows it may have no columns either
    found: dict[int, tuple[float, float]] = {}

    def score(indices: Sequence[int]) -> None:
        for start in range(0, len(indices), 32):
            part = indices[start : start + 32]
            batch = engine.with_reference(trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in part])))
            values = zip(batch["ref_chosen_logps"].tolist(), batch["ref_rejected_logps"].tolist(), strict=True)
            found.update(zip(part, values, strict=True))
            if on_pair:
                on_pair(len(found))

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = [sum(map(len, row)) for row in zip(*(dataset[name] for name in names), strict=True)]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    shared = trainer.args.world_size > 1 and engine.references.path is not None
    score(order[trainer.args.process_index :: trainer.args.world_size] if shared else order)
    if shared:
        trainer.accelerator.wait_for_everyone()
        score([index for index in order if index not in found])  # the others' are on the disk now
    return [found[index] for index in range(len(dataset))]


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, where TRL shows one."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=title, disable=bool(os.environ.get("TQDM_DISABLE", ""))) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show

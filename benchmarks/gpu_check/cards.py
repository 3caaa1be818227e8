"""Whole optimiser steps within the memory of smaller cards: the allocator is limited, and what the engine sees."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.common import GB, SIZES, Check, random_base, step, trainer_of, wait
from benchmarks.shapes import SHAPES, Row, draw

CONTEXT = 0.6
"""GB of a card that CUDA and its libraries take, by estimate: the check's own are outside of the limit."""
LONGEST = 1024


def run(check: Check) -> None:
    """Three steps of 16 long pairs for each size of card."""
    size = SIZES[check.options.size]
    rows = draw(
        dataclasses.replace(SHAPES["long-answer"], longest=2 * LONGEST), 16, vocabulary=min(40000, size.vocabulary)
    )
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            row[side] = row[side][: LONGEST - len(row["prompt_ids"])]
    if not check.on_card:
        rows = [{name: ids[:40] for name, ids in row.items()} for row in rows]
    for card in check.options.cards:
        name = f"cards {check.options.size} {card:g} GB{check.options.label}"
        with limited(int((card - CONTEXT) * GB), on_card=check.on_card):
            try:
                found = three_steps(check, rows)
            except Exception as error:  # that it does not fit is a result, and where it broke is worth more
                frames = traceback.extract_tb(error.__traceback__)[-6:]
                found = {
                    "error": f"{type(error).__name__}: {str(error)[:300]}",
                    "at": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)],
                }
            gc.collect()
        check.notes.save(name, found)
        if "error" in found:
            check.notes.fail(f"{name}: {found['error'].splitlines()[0][:200]}; at {' < '.join(found['at'])}")
            continue
        check.notes.say(
            f"{name}: first step {found['seconds'][0]:.1f} s, third {found['seconds'][-1]:.2f} s; {found['parts']} "
            f"parts of at most {found['tokens']} tokens, {found['checkpointed']} layers checkpointed; "
            f"allocated {found['allocated']:.2f}, reserved {found['reserved']:.2f} GiB"
        )


def three_steps(check: Check, rows: list[Row]) -> dict[str, Any]:
    """Steps with their optimiser, on a base that is loaded within the limit too."""
    from lora_dpo import DPOTrainer

    if check.on_card:
        torch.cuda.reset_peak_memory_stats()
    base = random_base(SIZES[check.options.size], check.device)
    trainer = trainer_of(DPOTrainer, base, rows, len(rows), check.device)
    trainer.create_optimizer()
    seconds = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        step(trainer, rows)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        wait()
        seconds.append(time.perf_counter() - start)
    budget = trainer.engine.whole_step.budget
    found = {
        "seconds": seconds,
        "parts": trainer.engine.last.parts,
        "tokens": budget.tokens,
        "checkpointed": budget.checkpointed,
        "allocated": torch.cuda.max_memory_allocated() / GB if check.on_card else 0.0,
        "reserved": torch.cuda.max_memory_reserved() / GB if check.on_card else 0.0,
        "reference": trainer.engine.scoring_tokens,
    }
    trainer.close()
    return found


@contextlib.contextmanager
def limited(limit: int, *, on_card: bool) -> Iterator[None]:
    """Inside the block the card has `limit` bytes; without one, free memory is said to be that."""
    if not on_card:
        from lora_dpo.engine import engine

        own, engine.free_bytes = engine.free_bytes, lambda device: limit
        try:
            yield
        finally:
            engine.free_bytes = own
        return
    true, total = torch.cuda.mem_get_info, torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    torch.cuda.mem_get_info = lambda *_: (max(0, limit - torch.cuda.memory_reserved()), limit)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.mem_get_info = true
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)

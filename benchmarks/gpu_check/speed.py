"""Pairs a second of ours and of stock TRL on the same pairs, in turn, and the kernels of one step."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_check.common import (
    SIZES,
    Check,
    peak_of,
    random_base,
    step_and_forget,
    stock_trainer,
    trainer_of,
    unknown,
    wait,
)
from benchmarks.shapes import SHAPES, Row, draw, total


@dataclass
class Way:
    """One way to compute the same steps."""

    trainer: Any
    batches: Sequence[Sequence[Row]]
    before: Callable[[], Any] = lambda: None
    seconds: list[float] = field(default_factory=list)
    peak: tuple[float, float] = (0.0, 0.0)

    def run(self) -> None:
        """Every batch once."""
        self.before()
        for batch in self.batches:
            step_and_forget(self.trainer, batch)

    def timed(self) -> None:
        """`run`, with its seconds noted."""
        wait()
        start = time.perf_counter()
        self.run()
        wait()
        self.seconds.append(time.perf_counter() - start)


def run(check: Check) -> None:
    """Each shape of data on one base."""
    base = random_base(SIZES[check.options.size], check.device)
    for shape in check.options.shape:
        one_shape(check, base, shape)
        gc.collect()


def ways(check: Check, base: Any, rows: list[Row]) -> dict[str, Way]:
    """TRL as it comes and tuned; ours with the reference unknown and known."""
    from lora_dpo import DPOTrainer

    size = check.options.batch
    mixed = random.Random(1).sample(rows, len(rows))
    ordered = sorted(rows, key=total)
    steps, grouped = ([each[at : at + size] for at in range(0, len(rows), size)] for each in (mixed, ordered))
    stock = trainer_of(stock_trainer(), base, rows, size, check.device)
    tuned = trainer_of(stock_trainer(), base, rows, size, check.device, gradient_checkpointing=False)
    tuned.precompute_ref_logps = True
    ours = trainer_of(DPOTrainer, base, rows, size, check.device)
    return {
        "TRL as it comes": Way(stock, steps),
        "TRL tuned": Way(tuned, [unknown(batch) for batch in grouped]),
        "ours, first epoch": Way(ours, steps, ours.engine.references._known.clear),
        "ours, references known": Way(ours, steps),
    }


def one_shape(check: Check, base: Any, shape: str) -> None:
    """All ways, `rounds` times in turn after one round that warms up: compiled kernels, every length."""
    size, notes = check.options.size, check.notes
    vocabulary = min(40000, SIZES[size].vocabulary)
    rows = draw(SHAPES[shape], check.options.pairs, vocabulary=vocabulary)
    all_ways = ways(check, base, rows)
    for name in list(all_ways):
        try:
            all_ways[name].run()
        except torch.OutOfMemoryError:
            notes.say(f"{size} {shape}, {name}: out of memory")
            all_ways.pop(name).trainer.model.zero_grad(set_to_none=True)
    for _ in range(check.options.rounds):
        for way in all_ways.values():
            way.peak = peak_of(way.timed)
    spent_by = {name: median(way.seconds) for name, way in all_ways.items()}
    usual, tuned = (spent_by.get(name, float("nan")) for name in ("TRL as it comes", "TRL tuned"))
    found: dict[str, Any] = {}
    for name, way in all_ways.items():
        spent = spent_by[name]
        found[name] = {"seconds": way.seconds, "pairs a second": len(rows) / spent, "peak": way.peak}
        notes.say(
            f"{size} {shape}, {name}: {len(rows) / spent:.2f} pairs/s, {usual / spent:.2f} of TRL as it comes, "
            f"{tuned / spent:.2f} of tuned; peak {way.peak[0]:.2f} allocated, {way.peak[1]:.2f} GiB reserved; rounds "
            f"of {min(way.seconds):.2f} to {max(way.seconds):.2f} s"
        )
    if check.on_card:
        for name in {"TRL as it comes", "ours, references known"} & set(all_ways):
            way = all_ways[name]
            found[name]["step"] = kernels(lambda way=way: step_and_forget(way.trainer, way.batches[0]))
            notes.say(f"   one step of {name}: {found[name]['step']}")
    engine = all_ways["ours, references known"].trainer.engine
    budget = engine.whole_step.budget
    found["budget"] = {
        "tokens": budget.tokens,
        "checkpointed": budget.checkpointed,
        "bytes a token": budget.token_bytes,
        "parts": engine.last.parts,
    }
    notes.say(f"   ours: {found['budget']}")
    notes.save(f"speed {size} {shape}", found)
    all_ways["ours, references known"].trainer.close()


def kernels(run: Callable[[], None]) -> dict[str, Any]:
    """Wall time of a step, the sum of its kernels' times and their number: a step bound by launches shows here."""
    from torch.profiler import ProfilerActivity, profile

    wait()
    start = time.perf_counter()
    run()
    wait()
    spent = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        wait()
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name[:60]] = by_name.get(event.name[:60], 0.0) + event.time_range.elapsed_us()
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {
        "wall ms": round(spent * 1e3, 1),
        "kernels ms": round(sum(by_name.values()) / 1e3, 1),
        "kernels": len(events),
        "longest, ms": {name: round(value / 1e3, 1) for name, value in longest},
    }

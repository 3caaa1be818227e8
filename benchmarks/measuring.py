"""Seconds, tokens, FLOPs and bytes of one way to compute optimiser steps."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import psutil
import torch
from rich.console import Console
from shapes import Row, total
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from lora_dpo.engine.pair_batch import PairBatch

GB = 1e9

Switch = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class Variant:
    """A way to compute the steps of one pool of pairs."""

    name: str
    trainer: Any
    batches: list[list[Row]]
    before: Callable[[], None] = lambda: None
    switch: Switch = contextlib.nullcontext
    """Under which all of it runs."""
    whole: bool = True
    """Whether a step runs at once: what it keeps is counted over the whole of it."""
    seconds: list[float] = field(default_factory=list)
    steps: list[list[Row]] = field(default_factory=list)
    """The optimiser steps that `batches` make up, where a step does not fit at once."""
    tokens: int = 0
    flops: float = 0.0
    kept: float = 0.0
    peak: float = 0.0


def measure(found: list[Variant], rounds: int, console: Console, *, quick: bool = False) -> None:
    """Counts once, which also warms up; then `rounds` rounds of every variant in turn."""
    for variant in found:
        with variant.switch():
            start = time.perf_counter()
            count(variant, found[1].trainer, quick=quick)
            give_back_memory()
            spent, held = time.perf_counter() - start, psutil.Process().memory_info().rss / GB
            console.print(f"  counted {variant.name}, {spent:.0f} s; {held:.1f} GB held", style="dim")
    for number in range(rounds):
        for variant in found:
            with variant.switch():
                variant.seconds.append(seconds_of(variant))
            console.print(f"  round {number + 1}: {variant.name} {variant.seconds[-1]:.1f} s", style="dim")


def run(variant: Variant) -> None:
    """Every batch of the variant once, forward and backward, as the training loop calls it."""
    variant.before()
    for batch in variant.batches:
        trainer = variant.trainer
        trainer.training_step(trainer.model, trainer.data_collator(batch))
        trainer.state.global_step += 1  # so that one step of ten is logged, as in a run
        trainer.model.zero_grad(set_to_none=True)
        trainer._metrics["train"].clear()


def give_back_memory() -> None:
    """Hand freed memory back to the system: what one variant left would count for the next, until none is left."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def seconds_of(variant: Variant) -> float:
    give_back_memory()
    # One thread's own time does not count what else ran on the machine.
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    with peak_memory() as peak:
        start = clock()
        run(variant)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = clock() - start
    variant.peak = max(variant.peak, peak[0])
    return spent


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Most memory during the block, beyond what was held before it: of the GPU, or resident (sampled)."""
    found = [0.0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - held
        return
    process, done = psutil.Process(), threading.Event()
    held = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            found[0] = max(found[0], process.memory_info().rss - held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def count(variant: Variant, unchecked: Any, *, quick: bool = False) -> None:
    """Tokens of a variant's batches, FLOPs (of ours alone: stock TRL would need a whole round more), and the bytes
    that a step keeps for its backward pass where no layer is checkpointed, as the mean over the steps.

    Args:
        unchecked: stock TRL's trainer without checkpointing, for what stock TRL keeps.
        quick: the tokens alone, and for ours one step to warm up.
    """
    steps = variant.steps or variant.batches
    if getattr(variant.trainer, "engine", None) is None:
        variant.tokens = sum(2 * len(batch) * max(map(total, batch)) for batch in variant.batches)
        if not quick:
            variant.kept = fmean(kept_bytes(unchecked, unknown(step)) for step in steps)
        return
    variant.tokens = sum(sum(PairBatch.of(variant.trainer.data_collator(batch)).lengths) for batch in variant.batches)
    if quick:
        run(dataclasses.replace(variant, batches=variant.batches[:1]))
        return
    run(variant)  # warms up: references are scored, the memory is measured, the trunk is kept
    with FlopCounterMode(display=False) as counter:
        run(variant)
    variant.flops = float(counter.get_total_flops())
    if variant.whole:
        variant.kept = fmean(kept_bytes(variant.trainer, step) for step in steps)


def unknown(batch: list[Row]) -> list[Row]:
    """The batch with made-up references, for a trainer that reads them from its rows."""
    return [{**row, "ref_chosen_logps": -100.0, "ref_rejected_logps": -100.0} for row in batch]


def kept_bytes(trainer: Any, batch: list[Row]) -> float:
    """Bytes of distinct storages that the forward pass of a batch keeps for its backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    kept: dict[int, int] = {}
    inputs = trainer._prepare_inputs(trainer.data_collator(batch))
    trainer.model.train()
    engine = getattr(trainer, "engine", None)
    if engine is not None:
        inputs = engine.with_reference(inputs)
        with engine.forward.count_kept() as kept:
            loss = trainer.compute_loss(trainer.model, inputs)
    else:
        seen: dict[int, StorageWeakRef] = {}

        def note(tensor: torch.Tensor) -> None:
            # Counted, not kept: a batch that would not fit is counted too. So an address may be used again.
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address in weights or (address in seen and not seen[address].expired()):
                return
            seen[address] = StorageWeakRef(storage)
            kept[len(kept)] = storage.nbytes()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
            loss = trainer.compute_loss(trainer.model, inputs)
    trainer._metrics["train"].clear()
    del loss
    return float(sum(kept.values()))


def floor_flops(trainer: Any, rows: list[Row]) -> float:
    """4N(P+C+R) + 4HV(C+R) a pair: a frozen base of N body weights, its head, forward and backward, no attention."""
    config = trainer.model.get_base_model().config
    layers = trainer.model.get_base_model().base_model.layers
    # by features, since a packed weight is no matrix; peft's wrappers have the features of what they wrap
    linear = [part for name, part in layers.named_modules() if "base_layer" in name and hasattr(part, "in_features")]
    body = sum(part.in_features * part.out_features for part in linear)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    return 4.0 * body * (prompts + answers) + 4.0 * config.hidden_size * config.vocab_size * answers


def touch_memory(gigabytes: int) -> None:
    """Touch memory once: on a virtual machine the first touch of a page costs many times a later one."""
    block = torch.empty(gigabytes << 28, dtype=torch.int32).fill_(1)
    del block

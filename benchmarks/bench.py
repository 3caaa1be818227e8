"""One optimiser step of ours and of stock TRL, side by side in one process on the same pairs.

    make bench                                           the three shapes, float32
    python benchmarks/bench.py --data pairs.json         your own pairs
    python benchmarks/bench.py --shape hh --ablate       what each part of the engine gives alone

Times are only meaningful as ratios within one run: every round runs every variant once, in turn. The other
columns do not depend on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import platform
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Row, draw, read, total
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from lora_dpo import DPOTrainer, EngineSection, load_base
from lora_dpo.model import load_tokenizer, pick_device
from lora_dpo.shared_prefix import layout as layout_module
from lora_dpo.shared_prefix import model as forward_module
from lora_dpo.steps import pair_lengths

GB = 1e9


@dataclass
class Variant:
    """A way to compute the steps of one pool of pairs."""

    name: str
    trainer: Any
    batches: list[list[Row]]
    before: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    steps: list[list[Row]] = field(default_factory=list)
    """The optimiser steps that `batches` make up, where a step does not fit at once."""
    tokens: int = 0
    flops: float = 0.0
    kept: float = 0.0
    peak: float = 0.0


class Stock(trl.DPOTrainer):
    """Stock TRL on pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def build(kind: Any, base: Any, rows: list[Row], layers: Any, batch: int, **settings: Any) -> Any:
    """A trainer with an all-linear rank-16 adapter on its own copy of the base."""
    model = base()
    engine = settings.pop("engine", None)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=PROJECTIONS, layers_to_transform=layers
    )
    args = trl.DPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        loss_type=["sigmoid"],
        **settings,
    )
    trainer = kind(
        model.model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=model.tokenizer,
        peft_config=lora,
        **({"engine": engine} if engine else {}),
    )
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 10**9, 10  # TRL's default: one step of ten is logged
    return trainer


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(variant: Variant) -> None:
    """Every batch of the variant once, forward and backward, as the training loop calls it."""
    variant.before()
    for batch in variant.batches:
        trainer = variant.trainer
        trainer.training_step(trainer.model, trainer.data_collator(batch))
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
    variant.tokens = sum(sum(pair_lengths(variant.trainer.data_collator(batch))) for batch in variant.batches)
    if quick:
        run(dataclasses.replace(variant, batches=variant.batches[:1]))
        return
    run(variant)  # warms up: references are scored, the memory is measured, the trunk is kept
    with FlopCounterMode(display=False) as counter:
        run(variant)
    variant.flops = float(counter.get_total_flops())
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


def forget_references(trainer: Any) -> Callable[[], None]:
    return trainer.engine.references._known.clear


def bases(options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Makers of a base for stock TRL (packed where it is 4-bit) and for ours (as `load_base` decides)."""

    def make(packed: Any) -> Any:
        return load_base(options.model, quantize=options.quantize, packed=packed, dtype=options.dtype)

    return (lambda: make(True if options.quantize == "nf4" else "auto")), (lambda: make("auto"))


def variants(options: argparse.Namespace, rows: list[Row]) -> list[Variant]:
    """The two baselines and ours, on the same pairs."""
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    size = options.batch
    mixed = [shuffled[start : start + size] for start in range(0, len(rows), size)]
    ordered = sorted(rows, key=total)
    part = options.tuned_batch or size
    grouped = [ordered[start : start + part] for start in range(0, len(rows), part)]
    steps = [unknown(ordered[start : start + size]) for start in range(0, len(rows), size)]

    theirs, ours_base = bases(options)
    off = EngineSection(reference_cache="off")
    stock = build(Stock, theirs, rows, None, size)
    tuned_trainer = build(Stock, theirs, rows, None, part, gradient_checkpointing=False)
    tuned_trainer.precompute_ref_logps = True
    known = [unknown(batch) for batch in grouped]
    ours = build(DPOTrainer, ours_base, rows, None, size, engine=off)
    found = [
        Variant("TRL as it comes", stock, mixed),
        Variant("TRL tuned: no checkpointing, references known, by length", tuned_trainer, known, steps=steps),
        Variant("ours, first epoch", ours, mixed, forget_references(ours)),
        Variant("ours, references known", ours, mixed),
    ]
    if options.top:
        layers = ours.model.config.num_hidden_layers
        top = build(DPOTrainer, ours_base, rows, list(range(layers))[-options.top :], size, engine=off)
        found.append(Variant(f"ours, top {options.top} layers, trunk known", top, mixed))
    return found


def ablations(options: argparse.Namespace, full: Variant) -> list[Variant]:
    """The engine with one part switched off; the first is the whole engine, references known."""
    trainer = full.trainer
    forward = trainer.engine.forward
    found = [Variant("whole engine", trainer, full.batches)]

    def off(name: str, switch: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        variant = Variant(name, trainer, full.batches)
        found.append(variant)
        SWITCHES[name] = switch

    off("without sharing prefixes", lambda: patched(layout_module, "common_prefix", lambda left, right: 0))
    off(
        "with TRL's head: products repeated in the backward pass",
        lambda: patched(forward_module, "head_values", trl_head),
    )
    off("entropy, mean logits and top-1 in every step", lambda: patched(trainer, "_logs_next_step", lambda: True))
    off("without rematerialising", lambda: patched(forward, "rematerialiser", None))
    off("every layer checkpointed", lambda: checkpointed(trainer))
    off("one pair at a time", lambda: patched(trainer.engine.whole_step.budget, "tokens", 1))
    off("the two branches of a pair apart", lambda: patched(trainer.engine.whole_step, "split_pairs", True))
    return found


SWITCHES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {}


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextlib.contextmanager
def checkpointed(trainer: Any) -> Iterator[None]:
    trainer.model.gradient_checkpointing_enable()
    trainer.engine.whole_step.budget._checkpoint(trainer.engine.whole_step.budget.layers)
    try:
        yield
    finally:
        trainer.engine.whole_step.budget._checkpoint(0)


def trl_head(hidden: Any, weight: Any, bias: Any, label: Any, *, scale: float, softcap: Any, extras: Any) -> Any:
    """The same values through TRL's chunked head, on the labelled tokens only."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    values = ChunkedLogProbFunction.apply(
        hidden, weight, bias, label, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, scale, ("log_probs", *extras)
    )
    return forward_module.HeadValues(*values)


def measure(found: list[Variant], rounds: int, console: Console, *, quick: bool = False) -> None:
    """Counts once, which also warms up; then `rounds` rounds of every variant in turn."""
    for variant in found:
        with SWITCHES.get(variant.name, contextlib.nullcontext)():
            start = time.perf_counter()
            count(variant, found[1].trainer, quick=quick)
            give_back_memory()
            spent, held = time.perf_counter() - start, psutil.Process().memory_info().rss / GB
            console.print(f"  counted {variant.name}, {spent:.0f} s; {held:.1f} GB held", style="dim")
    for number in range(rounds):
        for variant in found:
            with SWITCHES.get(variant.name, contextlib.nullcontext)():
                variant.seconds.append(seconds_of(variant))
            console.print(f"  round {number + 1}: {variant.name} {variant.seconds[-1]:.1f} s", style="dim")


CAPTION = (
    "speed: pairs/s as a ratio. kept: by the forward pass of a step for its backward pass, without checkpointing, "
    "mean. peak: most memory beyond what was held before the step."
)


def table(title: str, found: list[Variant], against: list[Variant]) -> Table:
    """One row a variant; speed as ratios to each of `against`."""
    drawn = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    drawn.add_column("", min_width=24)
    for name in (*(f"speed over {base.name.partition(':')[0]}" for base in against), "tokens", "TFLOPs", "kept, GB"):
        drawn.add_column(name, justify="right")
    drawn.add_column("peak, GB", justify="right")
    for variant in found:
        ratios = [
            f"{median(b / v for b, v in zip(base.seconds, variant.seconds, strict=True)):.2f}" for base in against
        ]
        flops = f"{variant.flops / 1e12:.2f}" if variant.flops else "-"
        numbers = [f"{variant.tokens:,}", flops, f"{variant.kept / GB:.2f}"]
        drawn.add_row(variant.name, *ratios, *numbers, f"{variant.peak / GB:.2f}")
    return drawn


def record(options: argparse.Namespace, shape: str, rows: list[Row], found: list[Variant]) -> dict[str, Any]:
    """What one table says, with the machine and the versions."""
    skip = ("trainer", "batches", "steps", "before")
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    return {
        "shape": shape,
        "pairs": len(rows),
        "batch": options.batch,
        "tuned_batch": options.tuned_batch or options.batch,
        "model": options.model,
        "quantize": options.quantize,
        "dtype": options.dtype,
        "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "floor_flops": floor_flops(found[0].trainer, rows),
        "variants": [{name: value for name, value in vars(variant).items() if name not in skip} for variant in found],
    }


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


def cpu_name() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def touch_memory(gigabytes: int) -> None:
    """Touch memory once: on a virtual machine the first touch of a page costs many times a later one."""
    block = torch.empty(gigabytes << 28, dtype=torch.int32).fill_(1)
    del block


def compare(options: argparse.Namespace, shape: str, title: str, rows: list[Row], console: Console) -> None:
    """Measure one pool of pairs, draw the table, and keep the numbers if asked to."""
    found = variants(options, rows)
    against = found[:2]
    if options.ablate:
        found = ablations(options, found[3])
        against = found[:1]
    measure(found, options.rounds, console, quick=options.quick)
    console.print(table(title, found, against))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else []
        old.append(record(options, shape, rows, found))
        options.output.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one shape of data; default: all")
    parser.add_argument("--data", help="a preference file instead of drawn pairs")
    parser.add_argument("--pairs", type=int, default=32, help="how many pairs")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimiser step")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none")
    parser.add_argument("--dtype", default="auto", help="compute dtype, such as float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--top", type=int, default=0, help="also measure an adapter on the top N layers")
    parser.add_argument(
        "--tuned-batch", type=int, default=0, help="pairs that tuned TRL computes at once, where a step does not fit"
    )
    parser.add_argument("--ablate", action="store_true", help="what each part of the engine gives alone")
    parser.add_argument("--quick", action="store_true", help="times and tokens alone: no FLOPs, no kept bytes")
    parser.add_argument("--touch", type=int, default=0, help="GB of memory to touch first")
    parser.add_argument("--output", type=Path, help="a JSON file to add the results to")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console()
    if options.touch:
        touch_memory(options.touch)
    tokenizer = load_tokenizer(options.model)
    pools = {"data": options.data} if options.data else dict.fromkeys(options.shape or SHAPES)
    for shape, path in pools.items():
        rows = (
            read(path, tokenizer, options.pairs)
            if path
            else draw(SHAPES[shape], options.pairs, vocabulary=len(tokenizer))
        )
        title = f"{Path(path).name if path else SHAPES[shape].title}: {len(rows)} pairs in steps of {options.batch}"
        console.print(f"{title}, {options.model}, {options.quantize}, {pick_device()}")
        compare(options, Path(path).name if path else shape, title, rows, console)


if __name__ == "__main__":
    main()

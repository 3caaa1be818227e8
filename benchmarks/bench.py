"""One optimiser step of ours and of stock TRL, side by side in one process on the same pairs.

    make bench                                           the three shapes, float32
    python benchmarks/bench.py --data pairs.json         your own pairs
    python benchmarks/bench.py --shape hh --ablate       what each part of the engine gives alone

Times are only meaningful as ratios within one run: every round runs every variant once, in turn. The other
columns do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from ablation import ablations
from datasets import Dataset
from measuring import GB, Variant, floor_flops, measure, touch_memory, unknown
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Row, draw, read, total

from lora_dpo import DPOTrainer, EngineSection, load_base
from lora_dpo.model.base import load_tokenizer
from lora_dpo.model.device import pick_device


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
    trainer.accelerator.prepare_model(trainer.model)  # as `train` does: puts autocast around its forward
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 10**9, 10  # TRL's default: one step of ten is logged
    return trainer


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
        kept = f"{variant.kept / GB:.2f}" if variant.kept else "-"
        numbers = [f"{variant.tokens:,}", flops, kept]
        drawn.add_row(variant.name, *ratios, *numbers, f"{variant.peak / GB:.2f}")
    return drawn


def record(options: argparse.Namespace, shape: str, rows: list[Row], found: list[Variant]) -> dict[str, Any]:
    """What one table says, with the machine and the versions."""
    skip = ("trainer", "batches", "steps", "before", "switch", "whole")
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


def cpu_name() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def compare(options: argparse.Namespace, shape: str, title: str, rows: list[Row], console: Console) -> None:
    """Measure one pool of pairs, draw the table, and keep the numbers if asked to."""
    found = variants(options, rows)
    against = found[:2]
    if options.ablate:
        found = ablations(found[3])
        against = found[:1]
    measure(found, options.rounds, console, quick=options.quick)
    console.print(table(title, found, against))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else []
        old.append(record(options, shape, rows, found))
        options.output.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")


def options_parser() -> argparse.ArgumentParser:
    """The command line."""
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
    return parser


def main() -> None:
    options = options_parser().parse_args()
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

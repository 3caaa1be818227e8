"""How many swapped labels are among the pairs that a run finds most suspicious.

    python benchmarks/swapped_labels.py --runs 0 1 --output benchmarks/results/swapped-labels.json
    python benchmarks/swapped_labels.py --pairs 89 --passes 3 --runs 2 --output three-passes.json

Takes the recipe of the quickstart, swaps chosen and rejected in a tenth of its pairs, drawn anew in each run, trains
on them, and orders the pairs by the margins that the run kept: before it learnt from a pair, at its last time, and the
mean over its times. Beside them stands what knows nothing of what was learnt: how much longer the rejected answer is.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_dpo.adapters.stored_margins import read_margins
from lora_dpo.config.reading import check_recipe, read_recipe
from lora_dpo.evaluation.intervals import rate
from lora_dpo.events import StepLogged
from lora_dpo.training import train

ROOT = Path(__file__).resolve().parent.parent
SWAPPED, LOOKED_AT = 0.1, 0.2
"""Share of the labels that are swapped, and share of the list that is looked through."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "quickstart.jsonl")
    parser.add_argument("--model", help="another base than the recipe's")
    parser.add_argument("--pairs", type=int, help="so many of them, drawn; by default all")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--runs", type=int, nargs="+", default=[0], help="the seed of each run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs = []
    for seed in args.runs:
        runs.append(one_run(args, seed))
        print(json.dumps(runs[-1]))
    found = {
        "data": args.data.name,
        "passes": args.passes,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "swapped": sum(run["swapped"] for run in runs),
        "in_the_first_fifth": {order: _share(runs, order) for order in runs[0]["found"]},
        "runs": runs,
    }
    print(json.dumps(found["in_the_first_fifth"], indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _share(runs: list[dict[str, Any]], order: str) -> dict[str, float | int | None]:
    """Of all swapped labels, with Wilson's interval."""
    return rate(sum(run["found"][order] for run in runs), sum(run["swapped"] for run in runs)).to_json()


def one_run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    rows = draw.sample(rows, args.pairs) if args.pairs else rows
    swapped = set(draw.sample(range(1, len(rows) + 1), round(SWAPPED * len(rows))))
    for number in swapped:
        row = rows[number - 1]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    with tempfile.TemporaryDirectory() as place:
        noisy = Path(place) / "noisy.jsonl"
        noisy.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        began = time.perf_counter()
        folder = train(_recipe(args, noisy, Path(place) / "adapter", seed), on_event=_tell).folder
        seconds = time.perf_counter() - began
        margins = read_margins(folder)
    said = {number: len(_text(row["rejected"])) - len(_text(row["chosen"])) for number, row in enumerate(rows, 1)}
    orders: dict[str, Callable[[Any], float | None]] = {
        "mean": lambda one: one.mean,
        "before": lambda one: one.before,
        "after": lambda one: one.after,
        "length": lambda one: said[one.origin.row],
    }
    looked_at = int(LOOKED_AT * len(rows))
    found = {}
    for name, key in orders.items():
        known = sorted((value, one.origin.row) for one in margins if (value := key(one)) is not None)
        found[name] = sum(row in swapped for _, row in known[:looked_at])
    return {
        "seed": seed,
        "pairs": len(rows),
        "looked_at": looked_at,
        "swapped": len(swapped),
        "without_margin": sum(one.mean is None for one in margins),
        "found": found,
        "seconds": round(seconds),
    }


def _recipe(args: argparse.Namespace, noisy: Path, output: Path, seed: int) -> Any:
    settings = read_recipe(args.recipe).model_dump(mode="json")
    settings["data"] = {"train": str(noisy)}
    settings["evaluation"] = {"answers": 0, "show": 0}
    settings["health"] = {"action": "none"}
    settings["trainer"] |= {"max_steps": -1, "num_train_epochs": args.passes, "seed": seed}
    settings["output"] = str(output)
    if args.model:
        settings["model"] |= {"name": args.model, "quantize": "none"}
    return check_recipe(settings)


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "".join(said["content"] for said in answer)


def _tell(event: Any) -> None:
    if isinstance(event, StepLogged):
        print(f"step {event.step} of {event.total}", flush=True)


if __name__ == "__main__":
    main()

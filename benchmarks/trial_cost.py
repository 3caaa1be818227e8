"""What a candidate of a search costs, beside the same run by itself.

    python benchmarks/trial_cost.py --output benchmarks/results/trial-cost.json

Each in a process of its own, with a cache of its own that is empty: `lora-dpo train` of a recipe, from the command to
the adapter, with all that it measures; and a search of three candidates that differ in beta alone, so that all have the
same number of steps. A candidate's time is from its beginning to its score; the first one scores the references, those
after it find them. What the search does once (loading, measuring the base) is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        alone, _ = timed(["train", str(args.recipe), f"output={place}/alone"], Path(place) / "cache-alone")
        command = ["tune", str(args.recipe), "--trials", "3", "trainer.beta=0.1,0.12,0.15", f"output={place}/best"]
        whole, status = timed(command, Path(place) / "cache-search")
        trials = json.loads((Path(place) / "best.search" / "trials.json").read_text(encoding="utf-8"))
    seconds = [trial["seconds"] for trial in trials]
    found = {
        "recipe": args.recipe.name,
        "steps": [trial["steps"] for trial in trials],
        "alone_seconds": round(alone, 1),
        "trial_seconds": [round(value, 1) for value in seconds],
        "of_that_measuring": [round(trial["measuring"], 1) for trial in trials],
        "of_that_references": [round(trial["scoring"], 1) for trial in trials],
        "search_seconds": round(whole, 1),
        "once_seconds": round(whole - sum(seconds), 1),
        "ratio": [round(value / alone, 3) for value in seconds],
        "status": status,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "optuna")},
    }
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def timed(command: list[str], cache: Path) -> tuple[float, int]:
    """Seconds that a command took, and its exit status: that of a search may be 4."""
    environment = {**os.environ, "LORA_DPO_CACHE": str(cache)}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lora_dpo", *command], env=environment, cwd=ROOT)
    if done.returncode not in (0, 4):
        raise SystemExit(f"{command[0]} ended with status {done.returncode}.")
    return time.perf_counter() - began, done.returncode


if __name__ == "__main__":
    main()

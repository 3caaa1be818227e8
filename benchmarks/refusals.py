"""How long a wrong command takes to say what is wrong: each as a process of its own, as a user starts it.

    python benchmarks/refusals.py --runs 3 --output benchmarks/results/refusals.json

Run from the repository's folder: the commands name its recipe, data and adapter. None of them writes anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent

REFUSED = {
    "trian configs/quickstart.yaml": "No such command 'trian'. Did you mean 'train'?",
    "train --resum": "No such option",
    "train configs/quikstart.yaml": "Did you mean configs/quickstart.yaml?",
    "train configs/quickstart.yaml lora.rnak=8": "lora.rnak is not a setting. Did you mean lora.rank?",
    "train configs/quickstart.yaml lora.rank=high": "lora.rank is 'high'",
    "train configs/quickstart.yaml trainer.betta=1": "trainer.betta is not a field of TRL's DPOConfig.",
    "train configs/quickstart.yaml trainer.beta=high": "trainer.beta is 'high'",
    "train configs/quickstart.yaml trainer.lr_scheduler_type=cosin": "Did you mean cosine?",
    "train configs/quickstart.yaml trainer.report_to=wanb": "Did you mean wandb?",
    "train configs/methods/sft.yaml trainer.betta=1": "trainer.betta is not a field of TRL's SFTConfig.",
    "train configs/quickstart.yaml data.train=pairs.jsonl": "pairs.jsonl does not exist.",
    "train configs/quickstart.yaml evaluation.questions=q.jsonl": "q.jsonl does not exist.",
    "train configs/quickstart.yaml model.name=models/mine": "models/mine is no model folder",
    "train configs/methods/dpo-after-sft.yaml reference=adapter:quickstar": "Did you mean quickstart?",
    "plan configs/quickstart.yaml trainer.betta=1": "trainer.betta is not a field",
    "plan configs/quickstart.yaml --card huge": "--card is 'huge'",
    "chat quickstar": "There is no adapter quickstar. Did you mean quickstart?",
    "eval quickstar --data data/quickstart-eval.jsonl": "Did you mean quickstart?",
    "eval quickstart --data pairs.jsonl": "pairs.jsonl does not exist.",
    "eval quickstart --data data/quickstart-eval.jsonl --judge rule:json": "Did you mean rules?",
    "merge quickstar --output merged/x": "Did you mean quickstart?",
    "merge quickstart --output merged/x --into base-16": "Did you mean base16?",
    "export quickstar --output x.gguf": "There is no adapter quickstar. Did you mean quickstart?",
    "export quickstart --to ggfu --output x": "Did you mean gguf?",
    "pairs prompts.txt --model smollm2-135m --judge rules:json -o p.jsonl": "prompts.txt does not exist.",
    "pairs data/quickstart.jsonl --adapter quickstar --judge rules:json -o p.jsonl": "Did you mean quickstart?",
    "improve configs/improve/quickstar.yaml": "Did you mean configs/improve/quickstart.yaml?",
    "improve configs/improve/quickstart.yaml trainer.betta=1": "trainer.betta is not a field",
    "serve --model models/mine": "models/mine is no model folder",
    "demo --model models/mine": "models/mine is no model folder",
    "data check pairs.jsonl --model smollm2-135m": "pairs.jsonl does not exist.",
    "data show data/quickstart.jsonl --format orka": "Did you mean orca?",
    "adapters show quickstar": "Did you mean quickstart?",
    "adapters verify quickstar": "Did you mean quickstart?",
    "adapters mix quickstar:1 --output mixed": "Did you mean quickstart?",
    "report quickstar": "There is no folder quickstar.",
    "models fetch smollm": "there is smollm2-135m",
    "docs dota": "Did you mean data?",
}
"""Wrong commands, and what each must say."""


def timed(command: str) -> tuple[float, float, str]:
    """Seconds on the clock, seconds of CPU time, and what was said."""
    before, start = os.times(), time.perf_counter()
    words = [sys.executable, "-m", "lora_dpo", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode not in (1, 2):
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu, done.stderr + done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only commands with one of these in them")
    parser.add_argument("--runs", type=int, default=3, help="how often each is run")
    parser.add_argument("--output", type=Path, help="where the numbers go, as JSON")
    options = parser.parse_args()
    rows = []
    for command in REFUSED:
        if options.words and not any(word in command for word in options.words):
            continue
        runs = [timed(command)[:2] for _ in range(options.runs)]
        seconds, cpu = ([round(one, 3) for one in column] for column in zip(*runs, strict=True))
        rows.append({"command": command, "seconds": seconds, "cpu_seconds": cpu})
        print(f"{median(seconds):6.2f} s  {median(cpu):6.2f} s of CPU   lora-dpo {command}", flush=True)
    slowest = max(rows, key=lambda row: median(row["seconds"]))
    print(f"slowest: {median(slowest['seconds']):.2f} s, lora-dpo {slowest['command']}")
    if options.output:
        versions = {name: version(name) for name in ("torch", "transformers", "trl", "typer", "pydantic")}
        found = {"python": sys.version.split()[0], "versions": versions, "commands": rows}
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The command line: one part in this process, or all of them, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import lora_dpo  # noqa: F401 - before torch: says how its allocator works (docs/gpu.md)

# isort: split

import torch

from benchmarks.gpu_check.common import GB, ROOT, SIZES, Check, Notes, file_name

PARTS = ("equal", "memory", "cards", "speed", "decode")
WITHOUT_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
"""The allocator as torch has it, to be compared with the one that lora-dpo asks for."""


def order(size: str) -> list[tuple[list[str], int]]:
    """What `all` runs: the words of each part, and the seconds after which it is stopped."""
    return [
        (["equal"], 300),
        (["memory", "--size", size], 150),
        (["cards", "--size", size], 200),
        (["cards", "--size", size, "--cards", "12", "--label", ", without expandable segments"], 80),
        (["speed", "--size", size, "--shape", "hh", "--rounds", "2"], 150),
        (["speed", "--size", size, "--shape", "long-answer", "--pairs", "32", "--rounds", "2"], 150),
        (["decode", "--size", size], 120),
    ]


def options_parser() -> argparse.ArgumentParser:
    """The command line."""
    about = sys.modules["benchmarks.gpu_check"].__doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, help="default: 8b from 20 GiB on, 3b from 10, else 1b; on a CPU tiny")
    parser.add_argument("--kind", action="append", help="equal: one model type; default: all")
    parser.add_argument("--length", type=int, nargs="+", help="memory: tokens of a sequence; default: 1024 2048")
    parser.add_argument(
        "--cards", type=float, nargs="+", default=[8, 12, 16, 24], help="cards: their GB; larger ones are left out"
    )
    parser.add_argument("--label", default="", help="cards: added to the names of its results")
    parser.add_argument("--shape", action="append", help="speed: a shape of data; default: hh and long-answer")
    parser.add_argument("--pairs", type=int, default=64, help="speed: how many pairs")
    parser.add_argument("--batch", type=int, default=8, help="speed: pairs of an optimiser step")
    parser.add_argument("--rounds", type=int, default=3, help="speed: rounds of every way in turn")
    parser.add_argument("--cudnn", action="store_true", help="leave cuDNN's attention on, where a card has it")
    parser.add_argument("--output", type=Path, help="a folder; default: benchmarks/results, on a CPU build/gpu-check")
    return parser


def usual_size(total: int | None) -> str:
    """The largest model of which everything that is asked fits, for a card's bytes; None is a CPU."""
    if total is None:
        return "tiny"
    return next((size for size, least in (("8b", 20), ("3b", 10)) if total >= least << 30), "1b")


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """With the defaults that hang on the device."""
    options = options_parser().parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This measures a GPU, and torch sees none. To rehearse on the CPU: make gpu-check DEVICE=cpu")
    cpu = options.device == "cpu"
    options.size = options.size or usual_size(None if cpu else torch.cuda.mem_get_info()[1])
    options.length = options.length or ([256] if cpu else [1024, 2048])
    options.shape = options.shape or ["hh", "long-answer"]
    options.output = options.output or (ROOT / ("build/gpu-check" if cpu else "benchmarks/results"))
    if not cpu:
        total = torch.cuda.mem_get_info()[1]
        options.cards = [card for card in options.cards if card * GB <= total]
    if cpu:
        options.pairs, options.batch, options.rounds = min(options.pairs, 8), min(options.batch, 4), 1
    return options


def files(options: argparse.Namespace) -> tuple[Path, Path]:
    """Where results and log go."""
    card = "cpu-rehearsal" if options.device == "cpu" else torch.cuda.get_device_name()
    stem = options.output / file_name(card)
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".log")


def run_part(options: argparse.Namespace) -> int:
    """One part, here."""
    warnings.filterwarnings("ignore")
    if options.device == "cuda" and not options.cudnn:
        # Consumer cards have no such kernel; where there is one, it makes a plan for each new length, 23 to 37 ms
        torch.backends.cuda.enable_cudnn_sdp(False)
    options.output.mkdir(parents=True, exist_ok=True)
    notes = Notes(files(options)[0])
    notes.save("machine", machine(options))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LORA_DPO_CACHE"] = cache  # what other runs found about models is not believed
        importlib.import_module(f"benchmarks.gpu_check.{options.part}").run(Check(options, notes))
    spent = time.perf_counter() - start
    notes.say(f"{options.part}: {spent:.0f} s; {len(notes.failed) or 'nothing'} not ok")
    notes.save(f"{options.part} {options.label}".strip(" ,"), {"seconds": spent, "not ok": notes.failed})
    return 1 if notes.failed else 0


def run_all(options: argparse.Namespace) -> int:
    """Every part in a process of its own: an illegal access on a card spoils whatever comes after it in the process."""
    options.output.mkdir(parents=True, exist_ok=True)
    results, log = files(options)
    results.unlink(missing_ok=True)
    shared = ["--device", options.device, "--output", str(options.output)] + ["--cudnn"] * options.cudnn
    failed = []
    with log.open("w", encoding="utf-8") as file:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()

        say(f"{json.dumps(machine(options))}\n")
        for words, seconds in order(options.size):
            asked = [*words]
            if words == ["equal"]:
                asked += [word for kind in options.kind or () for word in ("--kind", kind)]
            say(f"\n$ python -m benchmarks.gpu_check {' '.join(asked)}\n")
            if options.device == "cpu":
                seconds = 3600
            code = run_words([*asked, *shared], seconds, say, segments="--label" not in words)
            if code:
                failed.append(words[0])
        say(f"\nnot ok: {', '.join(failed) or 'nothing'}\n{results}\n{log}\n")
    return 1 if failed else 0


def run_words(words: Sequence[str], seconds: int, say: Callable[[str], None], *, segments: bool) -> int:
    """One part in a process of its own; what it prints is said line by line."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({} if segments else WITHOUT_SEGMENTS)}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stop = threading.Timer(seconds, child.kill)
    stop.start()
    try:
        for line in child.stdout or ():
            say(line)
    finally:
        stop.cancel()
    code = child.wait()
    if code < 0:
        say(f"stopped after {seconds} s, or killed ({code})\n")
    return code


def machine(options: argparse.Namespace) -> dict[str, object]:
    """The card and the versions."""
    found: dict[str, object] = {"device": "a rehearsal on a CPU: no figure here is a measurement"}
    if options.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found = {
            "device": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "free": free,
            "total": total,
            "cuda": torch.version.cuda,
        }
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
    return {**found, "cudnn attention": options.cudnn, "versions": {name: version(name) for name in names}}


def main(words: Sequence[str] | None = None) -> int:
    """Run what the words ask for; 1 if something was not as it must be."""
    options = read_options(words)
    return run_all(options) if options.part == "all" else run_part(options)


if __name__ == "__main__":
    sys.exit(main())

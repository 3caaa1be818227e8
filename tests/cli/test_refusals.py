"""What is wrong with a command is told before torch is loaded, which takes a minute on a slow machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, no part of the package
from refusals import REFUSED  # noqa: E402

HEAVY = {"accelerate", "bitsandbytes", "datasets", "gradio", "matplotlib", "peft", "torch", "transformers", "trl"}
SCRIPT = """
import contextlib, io, json, sys
from lora_dpo.cli.commands import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(command)
    print(json.dumps([status, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def refused():
    """By command: exit status, what was said, and which packages are loaded after it. All run in one process."""
    words = [shlex.split(command) for command in REFUSED]
    run = [sys.executable, "-c", SCRIPT, json.dumps(words)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    return dict(zip(REFUSED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("command", REFUSED)
def test_a_wrong_command_is_told_without_loading_torch(command, refused):
    status, said, loaded = refused[command]
    assert status in (1, 2)
    assert " ".join(REFUSED[command].split()) in " ".join(said.split())
    assert HEAVY & set(loaded) == set()


def test_refusals_leave_nothing_in_the_folder(refused):
    for name in ("merged", "mixed", "x", "x.gguf", "p.jsonl", "p.jsonl.samples.jsonl"):
        assert not (ROOT / name).exists(), name

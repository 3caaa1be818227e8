"""Killed, or with a failing disk, at any call that changes a file, every command leaves the whole or nothing.

`crash.c` does the killing, `crashing.py` runs the commands and looks at what they leave.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HELPERS = Path(__file__).parent / "helpers"
JUDGE = "def longest(prompt, answers):\n    return [float(len(set(answer.text))) for answer in answers]\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("crashes are made by a preloaded C library: there is no C compiler, or this is not Linux")
    built = tmp_path_factory.mktemp("crash") / "crash.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(HELPERS / "crash.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return built


@pytest.fixture
def start(tmp_path, tiny_model_folder, tiny_adapter, write_pairs):
    """What every command begins with."""
    folder = tmp_path / "start"
    folder.mkdir()
    for name, count, first in (("pairs", 12, 1), ("held", 4, 101)):
        shutil.move(write_pairs(f"{name}.jsonl", count=count, first=first), folder)
    odd = (folder / "pairs.jsonl").read_text() + '{"prompt": "x", "chosen": "y"}\n'
    (folder / "odd.jsonl").write_text(odd)
    shutil.copytree(tiny_adapter, folder / "adapters" / "mine")
    (folder / "model").symlink_to(tiny_model_folder)
    (folder / "my_judge.py").write_text(JUDGE)
    (folder / "prompts.txt").write_text("".join(f"Say {number}.\n" for number in range(4)))
    (folder / "asked.txt").write_text("".join(f"Tell {number}.\n" for number in range(16)))
    model = {"name": str(tiny_model_folder), "quantize": "none", "dtype": "float32"}
    trainer = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    evaluation = {"answers": 0, "show": 0, "max_new_tokens": 4}
    recipe = {
        "model": model, "output": "out", "lora": {"rank": 4}, "data": {"train": "pairs.jsonl", "eval": "held.jsonl"},
        "evaluation": evaluation, "health": {"prompts": 2, "max_new_tokens": 8}, "trainer": trainer,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rounds = {
        "model": model, "output": "better", "lora": {"rank": 4},
        "improve": {
            "prompts": "prompts.txt", "held_out": "asked.txt", "judge": "my_judge:longest", "rounds": 1, "answers": 3,
            "temperature": 1.0, "max_new_tokens": 12,
        },
        "trainer": {**trainer, "max_steps": 2},
    }  # fmt: skip
    (folder / "rounds.yaml").write_text(yaml.safe_dump(rounds))
    return folder


def crashes(library, start, wanted, *, seed):
    place = start.parent / "place"
    place.mkdir()
    command = [sys.executable, str(HELPERS / "crashing.py"), str(start), str(place), json.dumps(wanted), str(seed)]
    env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    first_lines = [text.partition("\n")[0] for text in found["wrong"]]
    assert not first_lines, "\n".join([*first_lines, *found["wrong"][:3]])
    return found["done"]


@pytest.mark.slow
def test_a_few_crashes_of_quick_commands(library, start):
    wanted = {"split": [6, 2], "fix": [4, 0], "pack": [1, 1], "install": [3, 2], "remove": [2, 0], "votes": [5, 2]}
    done = crashes(library, start, wanted, seed=1)
    assert done["killed"] >= 15


@pytest.mark.slow
@pytest.mark.long
def test_many_crashes_of_commands_that_write_files(library, start):
    wanted = {
        "split": [40, 12], "fix": [20, 10], "convert": [10, 5], "pack": [10, 5], "install": [25, 10],
        "remove": [10, 5], "votes": [50, 20], "forget": [15, 5], "merge": [15, 8], "export": [10, 5],
    }  # fmt: skip
    done = crashes(library, start, wanted, seed=2)
    assert done["killed"] >= 150


@pytest.mark.slow
@pytest.mark.long
def test_many_crashes_of_a_training(library, start):
    done = crashes(library, start, {"train": [24, 10], "resume": [12, 4], "pairs": [10, 4], "improve": [4, 2]}, seed=3)
    assert done["killed"] >= 30

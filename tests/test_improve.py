"""Rounds of sample, judge, train on a tiny model: they chain, stop, go on after a kill, and leave the base as it was."""

import json
from pathlib import Path

import pytest
import torch

import lora_dpo.improve as rounds
from lora_dpo.errors import ConfigError, DataError, OutputError
from lora_dpo.events import Note, Progress, RoundsMeasured, Saved
from lora_dpo.generate import Answer
from lora_dpo.improve import Measurement, improve
from lora_dpo.improve_recipe import ImproveRecipe, dump_improve_recipe, read_improve_recipe
from lora_dpo.model import detach, load_base
from lora_dpo.prepare import Stopped, StopSignal
from lora_dpo.train import train

JUDGE = """
def more_e(prompt, answers):
    return [answer.text.count("e") - 0.01 * len(answer.text) for answer in answers]
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.py").write_text(JUDGE)
    (tmp_path / "prompts.txt").write_text("".join(f"Say {number}.\n" for number in range(6)))
    (tmp_path / "held.txt").write_text("".join(f"Tell {number}.\n" for number in range(8)))


@pytest.fixture
def recipe(tiny_model_folder):
    def make(**changes):
        settings = {
            "model": {"name": str(tiny_model_folder), "quantize": "none", "dtype": "float32"},
            "lora": {"rank": 4},
            "improve": {
                "prompts": "prompts.txt",
                "held_out": "held.txt",
                "judge": "my_judge:more_e",
                "rounds": 2,
                "answers": 3,
                "temperature": 1.0,
                "max_new_tokens": 12,
                "batch_size": 8,
            },
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        }
        for name, change in changes.items():
            settings[name] = {**settings[name], **change} if isinstance(change, dict) else change
        return ImproveRecipe.model_validate(settings)

    return make


def every_answer_ends(monkeypatch):
    """A random model hardly ever ends its turn, and answers that were cut are never chosen."""
    real = rounds.make_pairs.__globals__["sample_answers"]

    def ended(*arguments, **named):
        import dataclasses

        samples = real(*arguments, **named)
        return [
            [dataclasses.replace(s, answer=dataclasses.replace(s.answer, finished=True)) for s in row]
            for row in samples
        ]

    monkeypatch.setitem(rounds.make_pairs.__globals__, "sample_answers", ended)


def test_rounds(recipe, monkeypatch):
    every_answer_ends(monkeypatch)
    events = []
    result = improve(recipe(), on_event=events.append)
    print(result)
    print([e for e in events if isinstance(e, RoundsMeasured | Note | Saved)])

"""Runs of a small model that was taught two ways to answer: healthy ones, and ones on shuffled labels."""

import shutil

import pytest
from taught import write_pairs

from lora_dpo.adapters.loading import load_policy
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.recipe import LoraSection
from lora_dpo.evaluation.evaluate import AssessPlan, assess
from lora_dpo.evaluation.intervals import call
from lora_dpo.events import StopSignal
from lora_dpo.judging import open_judge
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling, generate
from lora_dpo.model.lora import attach_lora
from lora_dpo.training.guard.completion_sampler import CompletionSampler
from lora_dpo.training.prepare import prepare
from lora_dpo.training.run import train

pytestmark = [pytest.mark.outcome, pytest.mark.slow]

SEEDS = range(5)
HEALTHY = 4
"""Of five runs that learn a rule: their course hangs on the CPU's rounding, as on their seed."""
BY_CHANCE = 3
"""Of five runs on shuffled labels: an interval of 95% leaves chance out in one of twenty, of which three of five would
be once in 863 times (10·0.05³·0.95² and less)."""


@pytest.fixture
def recipe(taught, tmp_path):
    """Settings of a run on pairs that prefer the short answer, or on these with half of the labels swapped."""

    def make(*, seed, shuffled):
        data = write_pairs(tmp_path / "pairs.jsonl", range(10, 22), shuffled=seed if shuffled else None)
        held_out = write_pairs(tmp_path / "eval.jsonl", range(50, 52))
        return {
            "model": {"name": str(taught), "quantize": "none", "dtype": "float32"},
            "lora": {"rank": 4},
            "data": {"train": str(data), "eval": str(held_out)},
            "evaluation": {"answers": 8, "max_new_tokens": 48},
            "trainer": {"max_steps": 24, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": seed,
                        "save_strategy": "no"},
            "output": str(tmp_path / "adapter"),
        }  # fmt: skip

    return make


def called(folder, tmp_path):
    held_out = str(write_pairs(tmp_path / "held-out.jsonl", range(60, 66)))
    plan = AssessPlan(answers=60, kl_answers=0, sampling=Sampling(max_new_tokens=48))
    return assess(load_policy(adapter=folder), [held_out], plan=plan, judge=open_judge(["rules:chars<=12"]))


def test_a_healthy_run_raises_no_alarm_and_is_called_better(recipe, tmp_path):
    seen = []
    for seed in SEEDS:
        result = train(check_recipe(recipe(seed=seed, shuffled=False)))
        found = called(result.folder, tmp_path)
        seen.append((result.outcome.alarms, found.called))
        if seen[-1] == ((), "better"):
            assert result.outcome.kept == result.outcome.steps == 24
            assert found.contest.win_rate.low > 0.5
            assert found.verdict().startswith("Better than base: win rate against base 0.")
        shutil.rmtree(result.folder)
        if seen.count(((), "better")) == HEALTHY:
            break
    assert seen.count(((), "better")) == HEALTHY, seen


def test_a_run_on_shuffled_labels_is_called_no_better_than_chance(recipe, tmp_path):
    seen = []
    for seed in SEEDS:
        settings = {**recipe(seed=seed, shuffled=True), "health": {"action": "warn"}}
        result = train(check_recipe(settings))
        found = called(result.folder, tmp_path)
        seen.append((found.called, call(found.learned) == "better"))
        shutil.rmtree(result.folder)
        if seen.count(("no better than chance", False)) == BY_CHANCE:
            break
    assert seen.count(("no better than chance", False)) == BY_CHANCE, seen


@pytest.mark.parametrize("limit", [8, 9, 32])
def test_answers_that_are_known_are_those_of_a_look(limit, taught, recipe, tmp_path):
    settings = {**recipe(seed=0, shuffled=False), "health": {"max_new_tokens": limit}}
    run = prepare(check_recipe(settings), tmp_path / "out", lambda event: None, StopSignal())
    model = attach_lora(load_base(str(taught), quantize="none").model, LoraSection(), seed=0)
    known = generate(model, run.tokenizer, run.prompts, sampling=Sampling(max_new_tokens=48))
    found, fresh = CompletionSampler(run, model).first(known), CompletionSampler(run, model).first()
    assert len(found.tokens) == 6
    assert found == fresh

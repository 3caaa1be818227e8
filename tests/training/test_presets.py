"""Presets: from pairs and one word to a recipe that trains; only what is computed can be changed on the page."""

from __future__ import annotations

import json
import shutil
from math import ceil
from pathlib import Path

import pytest

from lora_dpo.config.reading import read_recipe
from lora_dpo.config.recipe import ModelSection
from lora_dpo.config.trl_dpo import trainer_config
from lora_dpo.data import read_pairs, tokenize_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.training.drafting.lengths import Lengths, estimated_lengths, measured_lengths
from lora_dpo.training.drafting.presets import (
    PRESETS,
    choices,
    draft,
    held_out_prompts,
    hold_out,
    settings_text,
    steps_of,
    with_settings,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def drafted(write_pairs, tmp_path, tiny_model_folder):
    def make(count=40, preset="balanced", **changes):
        source = write_pairs(f"{count}.jsonl", count=count)
        model = ModelSection(name=str(tiny_model_folder), quantize="none", dtype="float32")
        options = {"output": tmp_path / "adapters/mine", "folder": tmp_path / "runs", **changes}
        return draft(model, [source], preset, **options)

    return make


def test_the_balanced_preset_has_the_objective_that_was_measured():
    quickstart, balanced = read_recipe(ROOT / "configs/quickstart.yaml").trainer, PRESETS["balanced"]
    assert quickstart["max_steps"] == balanced.most_steps
    assert quickstart["learning_rate"] == balanced.learning_rate
    assert quickstart["loss_weights"] == [1.0, balanced.sft]


def test_steps_are_passes_over_the_pairs_up_to_a_limit():
    assert steps_of(PRESETS["quick"], 10) == 5  # 2 · 10 / 4
    assert steps_of(PRESETS["balanced"], 10) == 10
    assert steps_of(PRESETS["balanced"], 1000) == 36
    assert steps_of(PRESETS["quick"], 1) == 1


@pytest.mark.parametrize(("count", "steps", "warmup"), [(3, 3, 0), (10, 10, 1), (40, 30, 3)])
def test_the_warm_up_is_at_most_a_tenth_of_the_steps(drafted, count, steps, warmup):
    trainer = drafted(count).recipe.trainer
    assert (trainer["max_steps"], trainer["warmup_steps"]) == (steps, warmup)
    assert trainer_config(trainer, output_dir=Path("x"), dtype="float32").get_warmup_steps(steps) == warmup


def test_of_few_prompts_nothing_is_held_out_and_of_many_some(drafted):
    few, many = drafted(10), drafted(40)
    assert (few.pairs, few.held_out, few.recipe.data.eval) == (10, 0, None)
    assert (many.pairs, many.held_out) == (30, 10)
    train, held_out = (read_pairs(str(name))[0] for name in (many.recipe.data.train, many.recipe.data.eval))
    assert not {str(pair.prompt) for pair in train} & {str(pair.prompt) for pair in held_out}
    assert len(train) == 30


@pytest.mark.parametrize(
    ("prompts", "held_out"),
    [
        *[(0, 0), (5, 0), (11, 0)],  # each is needed
        *[(12, 3), (40, 10), (47, 11)],  # a quarter
        *[(48, 12), (60, 12), (80, 12)],
        *[(81, 13), (100, 15), (140, 21), (180, 27)],  # 15%
        *[(427, 64), (600, 64), (100_000, 64)],
    ],
)
def test_fifteen_percent_are_held_out_at_least_twelve_prompts_but_no_more_than_a_quarter(prompts, held_out):
    assert held_out_prompts(prompts) == held_out


def test_prompts_are_counted_once_however_often_they_come(write_pairs):
    path = write_pairs(count=12)
    path.write_text(path.read_text() * 4)
    train, held_out = hold_out(read_pairs(str(path))[0])
    assert (len(train), len(held_out)) == (36, 12)  # 3 of 12 prompts, four pairs each


BASE = {
    "trainer": {
        "max_steps": 36,
        "warmup_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "beta": 0.1,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 2.0],
        "max_length": 512,
    },
    "lora": {"rank": 4, "alpha": 32},
    "evaluation": {"answers": 12, "max_new_tokens": 96},
}


def chosen(preset="balanced", train=48, held_out=12, lengths=None, **more):
    return choices(PRESETS[preset], train, held_out, lengths or Lengths(longest=60, answer=7), **more)


def test_what_is_chosen_for_short_pairs_and_a_small_base():
    assert chosen() == BASE
    assert chosen(parameters=135_000_000) == BASE


@pytest.mark.parametrize(
    ("parameters", "recipe"), [(3_400_000_000, "configs/8gb-3b.yaml"), (8_200_000_000, "configs/24gb-8b.yaml")]
)
def test_larger_bases_get_the_rank_rate_and_sft_term_of_the_recipes_for_them(parameters, recipe):
    of_its_size, made = read_recipe(ROOT / recipe), chosen(parameters=parameters)
    assert made["lora"] == {"rank": of_its_size.lora.rank, "alpha": of_its_size.lora.alpha}
    for name in ("learning_rate", "loss_type", "loss_weights", "beta"):
        assert made["trainer"][name] == of_its_size.trainer[name], name


@pytest.mark.parametrize(
    ("longest", "limit", "expected"),
    [
        (1, None, 512), (512, None, 512), (513, None, 1024), (1025, None, 2048), (9000, None, 4096),
        (900, 8192, 1024), (900, 800, 800),
    ],
)  # fmt: skip
def test_max_length_holds_all_pairs_within_what_the_base_can_read(longest, limit, expected):
    made = chosen(lengths=Lengths(longest=longest, answer=7, limit=limit))
    assert made["trainer"]["max_length"] == expected


@pytest.mark.parametrize(("answer", "expected"), [(96, 96), (97, 160), (257, 512), (4000, 512)])
def test_answers_may_be_as_long_as_the_good_ones(answer, expected):
    assert chosen(lengths=Lengths(longest=60, answer=answer))["evaluation"]["max_new_tokens"] == expected


def test_no_more_prompts_are_answered_than_are_held_out_and_of_many_sixteen():
    asked = [chosen(held_out=number)["evaluation"].get("answers") for number in (0, 3, 16, 64)]
    assert asked == [None, 3, 16, 16]


def test_lengths_by_a_tokenizer_are_those_of_the_run(write_pairs, tokenizer):
    pairs, _ = read_pairs(str(write_pairs(count=20)))
    tokens, _ = tokenize_pairs(tokenizer, pairs, max_length=None)
    found = measured_lengths(tokenizer, pairs)
    assert found.measured
    assert found.longest == max(len(one.prompt) + max(len(one.chosen), len(one.rejected)) for one in tokens)
    assert found.answer == sorted(len(one.chosen) for one in tokens)[17]  # the 18th of 20
    assert found.limit is None


def test_estimated_lengths_need_no_tokenizer_and_are_half_of_the_bytes_and_a_little(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "äöü?", "chosen": "ja", "rejected": "nein, nein"}\n', encoding="utf-8")
    found = estimated_lengths(read_pairs(str(path))[0])
    assert not found.measured
    assert found.longest == ceil((7 + 10) / 2) + 64
    assert found.answer == 1 + 8


def test_the_same_pairs_give_the_same_files(drafted, tmp_path):
    first = drafted(40).recipe
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert drafted(40, "quick").recipe.data == first.data
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_settings_can_be_changed_and_come_back_as_they_are(drafted):
    recipe = drafted(40).recipe
    text = settings_text(recipe)
    assert with_settings(recipe, text) == recipe
    changed = with_settings(recipe, text.replace("beta: 0.1", "beta: 0.3"))
    assert changed.trainer["beta"] == 0.3
    assert changed.data == recipe.data
    assert with_settings(recipe, "lora: {rank: 2}").lora == recipe.lora.model_copy(update={"rank": 2})
    fewer = with_settings(recipe, text.replace("max_steps: 30", "max_steps: 4")).trainer
    assert (recipe.trainer["warmup_steps"], fewer["max_steps"], fewer["warmup_steps"]) == (3, 4, 0)
    assert with_settings(recipe, "trainer: {max_steps: 4, warmup_steps: 2}").trainer["warmup_steps"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: /etc/passwd}", "data cannot be changed here, only lora, evaluation, trainer"),
        ("model: {name: other}", "model cannot be changed here"),
        ("output: elsewhere", "output cannot be changed here"),
        ("engine: {reference_cache: /tmp}", "engine cannot be changed here"),
        ("evaluation: {questions: /etc/passwd}", "evaluation.questions cannot be changed here"),
        ("trainer: {report_to: wandb}", "trainer.report_to cannot be changed here"),
        ("trainer: {logging_dir: /tmp}", "trainer.logging_dir cannot be changed here"),
        ("trainer: {learning_rat: 1}", "Did you mean learning_rate?"),
        ("lora: {rnak: 2}", "Did you mean lora.rank?"),
        ("lora: 3", "lora is 3: it has settings inside"),
        ("just words", "is not a recipe"),
        ("a: [", "not valid YAML"),
    ],
)
def test_nothing_that_names_a_file_can_be_changed(drafted, text, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        with_settings(drafted(10).recipe, text)


def test_a_large_base_is_moved_less_and_no_further_than_it_can_read(write_pairs, tmp_path, tiny_model_folder):
    large = tmp_path / "large"
    shutil.copytree(tiny_model_folder, large, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((large / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32, "max_position_embeddings": 48}
    (large / "config.json").write_text(json.dumps(config))
    places = {"output": tmp_path / "adapters/mine", "folder": tmp_path / "runs"}
    made = draft(ModelSection(name=str(large)), [write_pairs(count=40)], "balanced", **places).recipe
    assert made.lora.rank == 16
    assert made.trainer["learning_rate"] == pytest.approx(2e-5)
    assert made.trainer["loss_weights"] == [1.0, 0.2]
    assert made.trainer["max_length"] == 48


def test_errors_of_a_draft(drafted):
    with pytest.raises(ConfigError, match="no preset: there is quick, balanced, thorough"):
        drafted(10, "fast")
    with pytest.raises(ConfigError, match="nothing to train on"):
        draft(ModelSection(name="x"), [], "quick", output=Path("a"), folder=Path("b"))

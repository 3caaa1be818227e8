"""Presets: from pairs and one word to a recipe that trains; only what is computed can be changed on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dpo.config.reading import read_recipe
from lora_dpo.config.recipe import ModelSection
from lora_dpo.config.trl_dpo import trainer_config
from lora_dpo.data import read_pairs
from lora_dpo.demo.presets import PRESETS, draft, settings_text, steps_of, with_settings
from lora_dpo.errors import ConfigError

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


@pytest.mark.parametrize(("count", "steps", "warmup"), [(3, 3, 0), (10, 10, 1), (40, 34, 3)])
def test_the_warm_up_is_at_most_a_tenth_of_the_steps(drafted, count, steps, warmup):
    trainer = drafted(count).recipe.trainer
    assert (trainer["max_steps"], trainer["warmup_steps"]) == (steps, warmup)
    assert trainer_config(trainer, output_dir=Path("x"), dtype="float32").get_warmup_steps(steps) == warmup


def test_of_few_prompts_nothing_is_held_out_and_of_many_some(drafted):
    few, many = drafted(10), drafted(40)
    assert (few.pairs, few.held_out, few.recipe.data.eval) == (10, 0, None)
    assert (many.pairs, many.held_out) == (34, 6)  # 15%, rounded up
    train, held_out = (read_pairs(str(name))[0] for name in (many.recipe.data.train, many.recipe.data.eval))
    assert not {str(pair.prompt) for pair in train} & {str(pair.prompt) for pair in held_out}
    assert len(train) == 34


def test_at_most_64_prompts_are_held_out(drafted):
    assert drafted(600).held_out == 64  # not 15%, which would be 90


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
    fewer = with_settings(recipe, text.replace("max_steps: 34", "max_steps: 4")).trainer
    assert (recipe.trainer["warmup_steps"], fewer["max_steps"], fewer["warmup_steps"]) == (3, 4, 0)
    assert with_settings(recipe, "trainer: {max_steps: 4, warmup_steps: 2}").trainer["warmup_steps"] == 2
    assert with_settings(recipe, "lora: {rank: 2}").lora == recipe.lora.model_copy(update={"rank": 2})


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


def test_errors_of_a_draft(drafted):
    with pytest.raises(ConfigError, match="no preset: there is quick, balanced, thorough"):
        drafted(10, "fast")
    with pytest.raises(ConfigError, match="nothing to train on"):
        draft(ModelSection(name="x"), [], "quick", output=Path("a"), folder=Path("b"))

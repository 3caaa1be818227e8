from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import trl
import yaml
from scripts_here import load_script

from lora_dpo.config import trl_fields
from lora_dpo.config.reading import check_recipe, dump_recipe
from lora_dpo.config.trl_common import build_config, check_optimizer
from lora_dpo.config.trl_dpo import DEFAULTS, ELSEWHERE, LOSSES, trainer_config, trainer_settings
from lora_dpo.config.trl_kinds import KINDS, fields_of, installed, live_fields
from lora_dpo.errors import ConfigError

TRL_LOSSES = re.findall(r"if loss_type == \"(\w+)\"", inspect.getsource(trl.DPOTrainer._compute_loss))


def test_the_losses_of_recipes_are_those_that_trl_computes():
    assert len(TRL_LOSSES) > 10
    assert sorted(TRL_LOSSES) == sorted(LOSSES)


def resolve(lora: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Any]:
    recipe = {"model": {"name": "m"}, "data": {"train": "a.jsonl"}, "lora": lora or {}, "trainer": trainer}
    return trainer_settings(check_recipe(recipe))


def refusal(lora: dict[str, Any] | None = None, **trainer: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(lora, **trainer)
    return str(caught.value)


def build(tmp_path: Path, **trainer: Any) -> Any:
    return trainer_config(resolve(**trainer), output_dir=tmp_path, dtype="float32")


# --- names and types ------------------------------------------------------------------------------


def test_yamls_no_is_answered_with_the_choices():
    message = refusal(logging_strategy=False)
    assert message.startswith("trainer.logging_strategy is False: allowed is one of 'no', 'steps', 'epoch'.")
    assert 'write "no"' in message
    assert "instance of" not in refusal(save_strategy=3) + refusal(lr_scheduler_type=True)
    assert resolve(logging_strategy="no")["logging_strategy"] == "no"


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("lr_scheduler_type", "cosin", "cosine"),
        ("optim", "adam_torch", "adamw_torch"),
        ("eval_strategy", "step", "steps"),
    ],
)
def test_a_mistyped_word_is_refused_with_the_words_there_are_and_the_nearest(field, value, right):
    message = refusal(**{field: value})
    assert message.startswith(f"trainer.{field} is {value!r}: allowed is one of '")
    assert f"'{right}'" in message
    assert message.endswith(f"Did you mean {right}?")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("bta", "beta"), ("learning_rat", "learning_rate"), ("los_type", "loss_type"), ("max_step", "max_steps")],
)
def test_an_unknown_trainer_field_is_refused_with_the_nearest_one(wrong, right):
    message = refusal(**{wrong: 1})
    assert f"trainer.{wrong} is not a field of TRL's DPOConfig" in message
    assert f"Did you mean {right}?" in message


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("learning_rate", "5e-7", "number"),
        ("learning_rate", None, "number"),
        ("beta", True, "number"),
        ("max_steps", 2.0, "integer"),
        ("seed", "42", "integer"),
        ("gradient_checkpointing", "yes", "boolean"),
        ("loss_type", 3, "list"),
        ("loss_type", ["sft", 3], "string"),
        ("loss_weights", [1.0, "half"], "number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_allowed(field, value, allowed):
    message = refusal(**{field: value})
    assert f"trainer.{field} is {value!r}" in message
    assert allowed in message


@pytest.mark.parametrize("field", ELSEWHERE)
def test_a_field_that_has_another_place_is_refused_with_that_place(field):
    message = refusal(**{field: True})
    assert f"trainer.{field} has no effect here: {ELSEWHERE[field]}" in message


def test_every_refused_field_and_every_default_is_a_field_of_trl():
    from trl import DPOConfig

    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    assert set(ELSEWHERE) <= fields
    assert set(DEFAULTS) <= fields
    assert not set(ELSEWHERE) & set(DEFAULTS)


def test_given_values_go_over_defaults_and_reach_trl(tmp_path):
    settings = resolve(beta=0.3, save_steps=7)
    assert settings == {**DEFAULTS, "beta": 0.3, "save_steps": 7}
    config = build(tmp_path, beta=0.3, save_steps=7)
    assert (config.beta, config.save_steps, config.learning_rate) == (0.3, 7, DEFAULTS["learning_rate"])
    assert config.output_dir == str(tmp_path)


def test_a_very_small_learning_rate_passes_unrounded(tmp_path):
    assert build(tmp_path, learning_rate=5e-7).learning_rate == 5e-7


def test_an_integer_stands_for_a_float(tmp_path):
    assert build(tmp_path, beta=1, num_train_epochs=2).beta == 1


def test_the_recipe_itself_is_not_changed():
    recipe = check_recipe({"model": {"name": "m"}, "data": {"train": "a"}, "trainer": {"loss_type": "hinge"}})
    trainer_settings(recipe)
    assert recipe.trainer == {"loss_type": "hinge"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"train": "a", "eval": "b"}, "evaluation": {"answers": 3}},
        {"reference": "adapter:a"},
        {"model": {"name": "m", "quantize": "none"}},
        {"trainer": {"loss_type": "hinge", "beta": 0.3}},
    ],
    ids=["minimal", "held-out", "continued", "unquantised", "trainer"],
)
def test_a_dumped_recipe_is_as_good_as_the_one_it_was_made_from(changes):
    recipe = check_recipe({"model": {"name": "m"}, "data": {"train": "a"}, **changes})
    again = check_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert trainer_settings(again) == trainer_settings(recipe)


# --- the table of fields --------------------------------------------------------------------------


def test_the_table_of_fields_is_that_of_the_installed_trl():
    """Without this every mistyped field would bring torch in."""
    script = load_script("make_trl_fields")
    assert installed() == trl_fields.VERSIONS
    assert {kind: live_fields(kind) for kind in KINDS} == trl_fields.FIELDS
    assert script.main(["--check"]) == 0, "make it again with: python scripts/make_trl_fields.py"


def test_each_field_of_the_table_is_one_that_trl_takes():
    for kind in KINDS:
        taken = {field.name for field in dataclasses.fields(getattr(trl, kind)) if field.init}
        assert set(fields_of(kind)) == taken
        assert taken == set(inspect.signature(getattr(trl, kind).__init__).parameters) - {"self"}


def test_with_another_version_trl_itself_is_asked(monkeypatch):
    monkeypatch.setattr(trl_fields, "VERSIONS", {**trl_fields.VERSIONS, "transformers": "0.0"})
    monkeypatch.setattr(trl_fields, "FIELDS", {kind: {} for kind in KINDS})
    monkeypatch.setattr(trl_fields, "TRACKERS", ())
    assert resolve(beta=0.3)["beta"] == 0.3
    assert "Did you mean beta?" in refusal(bta=1)
    assert "Did you mean wandb?" in refusal(report_to="wanb")


def test_an_enumeration_is_its_words_and_a_class_is_anything():
    fields = fields_of("DPOConfig")
    assert get_args(fields["save_strategy"]) == ("no", "steps", "epoch", "best")
    assert fields["debug"] == str | list[Literal["underflow_overflow", "tpu_metrics_debug"]]
    assert fields["max_length"] == int | None
    assert fields["parallelism_config"] == Any | None


# --- losses ---------------------------------------------------------------------------------------


def test_the_default_losses_have_the_default_weights(tmp_path):
    config = build(tmp_path)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])


@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_every_loss_of_trl_is_accepted(tmp_path, loss):
    extra = {"label_smoothing": 0.01} if loss == "exo_pair" else {}
    config = build(tmp_path, loss_type=loss, **extra)
    assert (config.loss_type, config.loss_weights) == ([loss], None)


def test_losses_may_be_a_list_and_then_the_default_weights_are_dropped(tmp_path):
    config = build(tmp_path, loss_type=["hinge", "sft", "ipo"])
    assert (config.loss_type, config.loss_weights) == (["hinge", "sft", "ipo"], None)


def test_given_weights_stay_with_given_losses(tmp_path):
    config = build(tmp_path, loss_type=["hinge", "sft"], loss_weights=[1.0, 3.0])
    assert config.loss_weights == [1.0, 3.0]


def test_weights_without_losses_weigh_the_default_losses(tmp_path):
    config = build(tmp_path, loss_weights=[1.0, 0.5])
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])


def test_as_many_weights_as_losses_are_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="loss_weights"):
        build(tmp_path, loss_type=["hinge"], loss_weights=[1.0, 2.0])


@pytest.mark.parametrize("losses", ["sigmoidd", ["sigmoid", "sfft"]])
def test_an_unknown_loss_is_refused_before_anything_is_loaded(losses):
    message = refusal(loss_type=losses)
    assert "loss_type" in message
    assert "Did you mean s" in message


def test_no_loss_at_all_is_refused():
    assert "loss_type" in refusal(loss_type=[])


def test_exo_pair_without_label_smoothing_is_refused_before_anything_is_loaded():
    assert "label_smoothing" in refusal(loss_type="exo_pair")


def test_an_unknown_f_divergence_is_refused_before_anything_is_loaded():
    assert "f_divergence_type" in refusal(f_divergence_type="js")


def test_an_f_divergence_with_a_loss_that_has_none_is_refused_before_anything_is_loaded():
    assert "f_divergence_type" in refusal(f_divergence_type="js_divergence", loss_type="bco_pair")


def test_a_nearly_right_f_divergence_gets_a_hint():
    assert "Did you mean js_divergence?" in refusal(f_divergence_type="js_divergance")


def test_weighting_with_a_loss_that_sorts_is_refused_before_anything_is_loaded():
    assert "use_weighting" in refusal(use_weighting=True, loss_type="aot")


# --- trackers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trackers", ["none", "all", [], None])
def test_trackers_that_are_always_there(trackers):
    assert resolve(report_to=trackers)["report_to"] == trackers


def test_an_unknown_tracker_is_refused_with_the_nearest_one():
    assert "Did you mean tensorboard?" in refusal(report_to="tensorbord")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["mlflow"])
    assert "'wandb', which is not installed" in refusal(report_to=["mlflow", "wandb"])
    assert resolve(report_to=["mlflow"])["report_to"] == ["mlflow"]


# --- settings that would do nothing ---------------------------------------------------------------


def test_label_smoothing_is_refused_with_losses_that_ignore_it():
    message = refusal(label_smoothing=0.1)
    assert "trainer.label_smoothing changes nothing with loss_type ['sigmoid', 'sft']" in message
    assert "robust" in message


@pytest.mark.parametrize("loss", ["robust", "exo_pair", "aot", "aot_unpaired", ["sft", "robust"]])
def test_label_smoothing_is_accepted_with_losses_that_read_it(tmp_path, loss):
    assert build(tmp_path, label_smoothing=0.1, loss_type=loss).label_smoothing == 0.1


def test_label_smoothing_of_zero_is_harmless_with_any_loss(tmp_path):
    assert build(tmp_path, label_smoothing=0.0).label_smoothing == 0.0


def test_discopop_tau_is_refused_without_discopop(tmp_path):
    assert "only discopop" in refusal(discopop_tau=0.1)
    assert "only discopop" in refusal(discopop_tau=0.1, loss_type="hinge")
    assert build(tmp_path, discopop_tau=0.1, loss_type="discopop").discopop_tau == 0.1


@pytest.mark.parametrize("others", [{}, {"f_divergence_type": "js_divergence"}])
def test_the_alpha_coefficient_is_refused_without_the_alpha_divergence(tmp_path, others):
    assert "f_divergence_type: alpha_divergence" in refusal(f_alpha_divergence_coef=0.4, **others)


def test_the_alpha_coefficient_is_accepted_with_the_alpha_divergence(tmp_path):
    config = build(tmp_path, f_alpha_divergence_coef=0.4, f_divergence_type="alpha_divergence", loss_type="sigmoid")
    assert config.f_alpha_divergence_coef == 0.4


def test_lora_dropout_is_refused_while_trl_switches_dropout_off():
    assert "trainer.disable_dropout: false" in refusal(lora={"dropout": 0.05})
    assert "trainer.disable_dropout: false" in refusal(lora={"dropout": 0.05}, disable_dropout=True)
    assert resolve(lora={"dropout": 0.05}, disable_dropout=False)["disable_dropout"] is False


def test_cutting_prompts_at_their_start_is_refused_because_answers_are_cut_at_their_end():
    assert "truncation_mode" in refusal(truncation_mode="keep_end")


@pytest.mark.parametrize("name", ["answers", "show"])
def test_answers_to_held_out_prompts_are_refused_without_held_out_data(name):
    recipe = {"model": {"name": "m"}, "data": {"train": "a"}, "evaluation": {name: 3}}
    with pytest.raises(ConfigError, match=f"evaluation.{name} .*data.eval"):
        trainer_settings(check_recipe(recipe))
    recipe["data"]["eval"] = "b"
    trainer_settings(check_recipe(recipe))


def test_evaluation_steps_are_refused_without_held_out_data():
    assert "data.eval" in refusal(eval_strategy="steps")


def test_packed_is_refused_without_quantisation():
    recipe = {"model": {"name": "m", "quantize": "none", "packed": True}, "data": {"train": "a"}}
    with pytest.raises(ConfigError, match="packed"):
        trainer_settings(check_recipe(recipe))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0),
        ("beta", -0.1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", math.inf),
        ("loss_weights", [1.0, math.nan]),
        ("num_train_epochs", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("label_smoothing", 0.5),
    ],
)
def test_a_number_that_cannot_train_is_refused_before_anything_is_loaded(field, value):
    assert f"trainer.{field} is {value!r}" in refusal(**{field: value})


# --- TRL's config ---------------------------------------------------------------------------------


def test_what_trl_refuses_is_a_config_error_with_its_own_reason(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer: .*load_best_model_at_end"):
        build(tmp_path, load_best_model_at_end=True)


@pytest.mark.parametrize(("field", "value"), [("use_cpu", True), ("dataloader_pin_memory", False)])
def test_a_field_that_is_set_by_the_hardware_is_taken_or_refused_by_its_name(tmp_path, field, value):
    try:
        config = build(tmp_path, **{field: value})
    except ConfigError as error:
        assert str(error).startswith(f"trainer.{field} ")  # noqa: PT017 - one of two good ends
    else:
        assert getattr(config, field) is value


def test_precision_follows_the_hardware_and_the_models_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = trainer_config(resolve(), output_dir=tmp_path, dtype="bfloat16")
    assert not config.bf16
    assert not config.fp16
    assert config.use_cpu


def test_gradient_checkpointing_is_allowed_unless_refused(tmp_path):
    assert trainer_config(resolve(), output_dir=tmp_path, dtype="float32").gradient_checkpointing
    assert not build(tmp_path, gradient_checkpointing=False).gradient_checkpointing


# --- what TRL and transformers would refuse with a traceback, after the weights are loaded ------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_on_start": True}, "eval_on_start is True, which needs an evaluation during training: set data.eval"),
        ({"save_strategy": "best"}, "save_strategy is 'best', which needs an evaluation"),
        ({"metric_for_best_model": "eval_loss"}, "metric_for_best_model changes nothing without"),
        ({"use_liger_kernel": True}, "liger-kernel is not installed"),
        ({"fsdp": "full_shard"}, "fsdp has no effect here"),
        ({"deepspeed": "zero2.json"}, "deepspeed has no effect here"),
        ({"max_steps": 0}, "max_steps is 0: allowed is 1 or more, or -1"),
        ({"ld_alpha": 2.0}, "ld_alpha is 2.0: allowed is a number from 0 to 1"),
    ],
)
def test_settings_without_what_they_need_are_refused(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "trainer.lr_scheduler_type is .*cosine_with_min_lr: .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "trainer.lr_scheduler_type is .*warmup_stable_decay: .*decay"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 3}}, "lr_scheduler_type is .*'cycles'"),
        ({"load_best_model_at_end": True}, "trainer: .*load_best_model_at_end.* requires"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "trainer: .*requires an eval strategy"),
        ({"optim": "schedule_free_adamw"}, "trainer.optim is .*schedule_free_adamw: .*install"),
        ({"optim": "galore_adamw"}, "trainer.optim is .*galore_adamw: "),
        ({"optim": "adamw_torch", "optim_args": "no_such=1"}, None),  # transformers ignores what it does not know
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_made_is_one_sentence(given, said, tmp_path):
    settings = resolve(**given)
    if said is None:
        return check_optimizer(trainer_config(settings, output_dir=tmp_path, dtype="float32"))
    with pytest.raises(ConfigError, match=said):
        check_optimizer(trainer_config(settings, output_dir=tmp_path, dtype="float32"))


def test_every_optimizer_and_schedule_can_be_made_or_is_one_sentence(tmp_path):
    from transformers.training_args import OptimizerNames, SchedulerType

    made, refused = [], []
    for field, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        for name in names:
            settings = {field: name.value, "eval_strategy": "epoch"}
            try:
                check_optimizer(build_config(trl.DPOConfig, settings, output_dir=tmp_path, dtype="float32"))
            except ConfigError as error:
                refused.append((f"trainer.{field} is ", str(error)))
            else:
                made.append(name.value)
    assert [said for start, said in refused if not said.startswith(start) or "\n" in said] == []
    assert refused
    assert {"adamw_torch", "adafactor", "adamw_bnb_8bit", "cosine", "linear", "reduce_lr_on_plateau"} <= set(made)


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [("polynomial", {"power": "x"}), ("cosine", {"num_cycles": "x"}), ("inverse_sqrt", {"timescale": "x"})],
)
def test_arguments_of_a_schedule_that_only_fail_at_a_step_are_one_sentence(schedule, arguments, tmp_path):
    settings = resolve(lr_scheduler_type=schedule, lr_scheduler_kwargs=arguments)
    with pytest.raises(ConfigError, match=f"trainer.lr_scheduler_type is {schedule}: "):
        check_optimizer(trainer_config(settings, output_dir=tmp_path, dtype="float32"))

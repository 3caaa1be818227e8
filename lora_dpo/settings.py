"""The recipe's `trainer:` section as TRL's `DPOConfig`, with nothing ignored in silence."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lora_dpo.config import Recipe, nearest
from lora_dpo.errors import ConfigError

if TYPE_CHECKING:
    from trl import DPOConfig

DEFAULTS: dict[str, Any] = {
    # TRL's 1e-6 is meant for whole models; an adapter needs more, and 2e-4 ruined a small model (docs/decisions.md).
    "learning_rate": 5e-5,
    # The plain sigmoid loss may push both answers' probabilities down; an SFT term on the chosen answer holds it.
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.2],
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 42,
}
"""What a recipe starts from; any of these can be set under `trainer:`."""

ELSEWHERE = {
    "output_dir": "set output: instead",
    "resume_from_checkpoint": "pass --resume instead",
    "model_init_kwargs": "set model: instead",
    "trust_remote_code": "set model.trust_remote_code instead",
    "bf16": "set model.dtype: bfloat16 instead",
    "fp16": "set model.dtype: float16 instead",
    "bf16_full_eval": "set model.dtype instead",
    "fp16_full_eval": "set model.dtype instead",
    "padding_free": "TRL ignores it in DPO",
    "truncation_mode": "answers are cut at their end when they are tokenised",
    "pad_token": "it comes from the tokenizer",
    "disable_tqdm": "progress is drawn from the run's events",
    "do_train": "a run always trains",
    "do_eval": "held-out pairs are evaluated whenever data.eval is set",
    "do_predict": "nothing is predicted in a run",
    "sync_ref_model": "the reference is the same base, so there is no second model to move",
    "ref_model_mixup_alpha": "the reference is the same base, so there is no second model to move",
    "ref_model_sync_steps": "the reference is the same base, so there is no second model to move",
    "remove_unused_columns": "rows are token ids already",
    "dataset_num_proc": "rows are tokenised before training starts",
}
"""Fields of DPOConfig that a run would ignore or that have another place: refused, with the reason."""

LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
"""TRL's losses. TRL itself notices a wrong name at the first step only."""

NEEDS_LOSS = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}
"""Fields that TRL reads for these losses only; with any other loss they would change nothing."""


def trainer_settings(recipe: Recipe) -> dict[str, Any]:
    """Check the `trainer:` section against DPOConfig's fields and fill in the defaults.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or a field that would do nothing.
    """
    from trl import DPOConfig

    fields = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    hints = typing.get_type_hints(DPOConfig)
    given = dict(recipe.trainer)
    if isinstance(given.get("loss_type"), str):
        given["loss_type"] = [given["loss_type"]]
    for name, value in given.items():
        if name not in fields:
            raise ConfigError(f"trainer.{name} is not a field of TRL's DPOConfig.{nearest(name, fields)}")
        if name in ELSEWHERE:
            raise ConfigError(f"trainer.{name} has no effect here: {ELSEWHERE[name]}.")
        _check_type(name, value, hints[name])
    for loss in given.get("loss_type", ()):
        if loss not in LOSSES:
            raise ConfigError(
                f"trainer.loss_type has {loss!r}: allowed are {', '.join(LOSSES)}.{nearest(loss, LOSSES)}"
            )
    settings = {**DEFAULTS, **given}
    if "loss_type" in given and "loss_weights" not in given:
        settings.pop("loss_weights")  # the default weights belong to the default losses
    _refuse_inert(given, settings)
    _refuse_inert_sections(recipe, settings)
    if recipe.lora.dropout > 0 and settings.get("disable_dropout", True):
        raise ConfigError(
            f"lora.dropout is {recipe.lora.dropout}, but TRL switches all dropout off: "
            "set trainer.disable_dropout: false."
        )
    return settings


def trainer_config(settings: dict[str, Any], *, output_dir: Path, dtype: str) -> DPOConfig:
    """TRL's `DPOConfig` for checked settings. Raises `ConfigError` with TRL's own reason."""
    import torch
    from trl import DPOConfig

    cuda = torch.cuda.is_available()
    settings = {"gradient_checkpointing": cuda, **settings}  # on a CPU memory is there, and time is not
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return DPOConfig(
                output_dir=str(output_dir),
                bf16=cuda and dtype == "bfloat16",
                fp16=cuda and dtype == "float16",
                use_cpu=not cuda,
                disable_tqdm=True,
                dataloader_pin_memory=cuda,
                **settings,
            )
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def _check_type(name: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        allowed = " or ".join(dict.fromkeys(_plain(problem["msg"]) for problem in error.errors()))
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is {allowed}.") from None


def _plain(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Input should ")


def _refuse_inert(given: dict[str, Any], settings: dict[str, Any]) -> None:
    losses = settings["loss_type"]
    for name, users in NEEDS_LOSS.items():
        if given.get(name) and not set(losses) & set(users):
            raise ConfigError(
                f"trainer.{name} changes nothing with loss_type {losses}: only {', '.join(users)} use it."
            )
    divergence = given.get("f_divergence_type", "reverse_kl")
    if "f_alpha_divergence_coef" in given and divergence != "alpha_divergence":
        raise ConfigError("trainer.f_alpha_divergence_coef needs f_divergence_type: alpha_divergence.")


def _refuse_inert_sections(recipe: Recipe, settings: dict[str, Any]) -> None:
    if recipe.model.quantize == "none" and recipe.model.packed != "auto":
        raise ConfigError("model.packed changes nothing with quantize: none. Remove it.")
    if recipe.data.eval is None:
        if settings.get("eval_strategy", "no") != "no":
            raise ConfigError("trainer.eval_strategy needs held-out pairs: set data.eval.")
        for name in {"answers", "show"} & recipe.evaluation.model_fields_set:
            raise ConfigError(f"evaluation.{name} is about held-out prompts: set data.eval.")

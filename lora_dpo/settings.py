"""The recipe's `trainer:` section as TRL's `DPOConfig`, with nothing ignored in silence."""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lora_dpo.config import EvaluationSection, Recipe, nearest
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

NO_UPLOADS = "a run uploads nothing; share the adapter folder yourself when training is done"

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
    "use_cpu": "a GPU is used if there is one; hide it with CUDA_VISIBLE_DEVICES= before the command",
    "push_to_hub": NO_UPLOADS,
    "hub_always_push": NO_UPLOADS,
    "hub_model_id": NO_UPLOADS,
    "hub_private_repo": NO_UPLOADS,
    "hub_revision": NO_UPLOADS,
    "hub_strategy": NO_UPLOADS,
    "hub_token": NO_UPLOADS,
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

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""TRL's f-divergences. TRL itself notices a wrong name at the first step only."""

DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses of chosen minus rejected, where the unknown β·log Z(x) of another divergence than reverse_kl cancels."""

AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
ABOVE_ZERO = ("beta", "learning_rate", "num_train_epochs")


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
        _check_number(name, value)
    _check_loss_names(given)
    settings = {**DEFAULTS, **given}
    if "loss_type" in given and "loss_weights" not in given:
        settings.pop("loss_weights")  # the default weights belong to the default losses
    _check_losses(settings)
    _check_trackers(settings)
    _refuse_inert(given, settings)
    _refuse_inert_sections(recipe, settings)
    _refuse_head(recipe)
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
    # With the engine, checkpointing is allowed here and used only for steps that would not fit without it.
    settings = {"gradient_checkpointing": True, "dataloader_pin_memory": cuda, **settings}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            config = DPOConfig(
                output_dir=str(output_dir),
                bf16=cuda and dtype == "bfloat16",
                fp16=cuda and dtype == "float16",
                use_cpu=not cuda,
                disable_tqdm=True,
                **settings,
            )
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0].rstrip('.')}.") from error
    if config.n_gpu > 1:
        config._n_gpu = 1  # one base on one GPU; transformers would copy the model to every visible one
    return config


def _check_type(name: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        allowed = " or ".join(dict.fromkeys(_plain(problem["msg"]) for problem in error.errors()))
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is {allowed}.") from None


def _check_number(name: str, value: Any) -> None:
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is a finite number.")
    if name in AT_LEAST_ONE and value < 1:
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is 1 or more.")
    if name in ABOVE_ZERO and value <= 0:
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is a number above 0.")
    if name == "label_smoothing" and not 0 <= value < 0.5:
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is 0 or more, and below 0.5.")


def _check_loss_names(given: dict[str, Any]) -> None:
    losses = given.get("loss_type")
    if losses == []:
        raise ConfigError(f"trainer.loss_type is []: name at least one of {', '.join(LOSSES)}.")
    for loss in losses or ():
        if loss not in LOSSES:
            raise ConfigError(
                f"trainer.loss_type has {loss!r}: allowed are {', '.join(LOSSES)}.{nearest(loss, LOSSES)}"
            )


def _check_losses(settings: dict[str, Any]) -> None:
    """What TRL would refuse too, but only when the weights are loaded."""
    losses = settings["loss_type"]
    if "exo_pair" in losses and not settings.get("label_smoothing"):
        raise ConfigError("The loss exo_pair needs a trainer.label_smoothing above 0, such as 0.001.")
    # sft is one mean over the batch, which TRL cannot weight by pairs: it fails at the first step
    if settings.get("use_weighting") and {"aot", "aot_unpaired", "sft"} & set(losses):
        raise ConfigError(f"trainer.use_weighting does not work with loss_type {losses}. Remove one of them.")
    divergence = settings.get("f_divergence_type", "reverse_kl")
    if divergence not in DIVERGENCES:
        raise ConfigError(
            f"trainer.f_divergence_type is {divergence!r}: allowed are {', '.join(DIVERGENCES)}."
            f"{nearest(divergence, DIVERGENCES)}"
        )
    without = [loss for loss in losses if loss not in DIVERGENCE_LOSSES]
    if divergence != "reverse_kl" and without:
        raise ConfigError(
            f"trainer.f_divergence_type {divergence} does not exist for loss_type {', '.join(without)}. "
            f"Losses that have it: {', '.join(DIVERGENCE_LOSSES)}."
        )


def _check_trackers(settings: dict[str, Any]) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    asked, known = settings["report_to"] or [], (*INTEGRATION_TO_CALLBACK, "all", "none")
    for tracker in [asked] if isinstance(asked, str) else asked:
        if tracker not in known:
            raise ConfigError(
                f"trainer.report_to has {tracker!r}: allowed are {', '.join(known)}.{nearest(tracker, known)}"
            )
        if tracker not in (*get_available_reporting_integrations(), "all", "none"):
            raise ConfigError(f"trainer.report_to has {tracker!r}, which is not installed. Install it, or use none.")


def _refuse_head(recipe: Recipe) -> None:
    targets = recipe.lora.targets
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise ConfigError(
            "lora.targets has lm_head, but TRL multiplies with that layer's own weight, so an adapter on it would "
            "never be trained. Remove it."
        )


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
    sorting = sorted({"aot", "aot_unpaired"} & set(settings["loss_type"]))
    if recipe.data.pair_weight != "equal" and sorting:
        raise ConfigError(
            f"data.pair_weight weights pairs, but the loss {sorting[0]} compares answers across pairs. "
            "Remove one of them."
        )
    if recipe.model.quantize == "none" and recipe.model.packed != "auto":
        raise ConfigError("model.packed changes nothing with quantize: none. Remove it.")
    if recipe.data.eval is None:
        if settings.get("eval_strategy", "no") != "no":
            raise ConfigError("trainer.eval_strategy needs held-out pairs: set data.eval.")
        for name in ("answers", "show"):
            # The default is no wish (a recipe that was written out has it, too), and 0 asks for nothing.
            if getattr(recipe.evaluation, name) in (0, EvaluationSection.model_fields[name].default):
                continue
            raise ConfigError(f"evaluation.{name} is about held-out prompts: set data.eval.")

"""The recipe's `trainer:` section as TRL's config object, with nothing ignored in silence.

This file knows DPO; what other methods read is in `trl_sft_kto.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_dpo.config.reading import nearest
from lora_dpo.config.recipe import EvaluationSection, Recipe
from lora_dpo.config.trl_common import ELSEWHERE as COMMON_ELSEWHERE
from lora_dpo.config.trl_common import NO_SECOND_MODEL, build_config, check_given, check_held_out, check_trackers
from lora_dpo.config.trl_sft_kto import METHODS, answer_settings
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

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
    **COMMON_ELSEWHERE,
    "padding_free": "TRL ignores it in DPO",
    "truncation_mode": "answers are cut at their end when they are tokenised",
    "pad_token": "it comes from the tokenizer",
    "sync_ref_model": NO_SECOND_MODEL,
    "ref_model_mixup_alpha": NO_SECOND_MODEL,
    "ref_model_sync_steps": NO_SECOND_MODEL,
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


def trainer_settings(recipe: Recipe) -> dict[str, Any]:
    """Check the `trainer:` section against the fields of the method's TRL config and fill in the defaults.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or a field that would do nothing.
    """
    settings = _dpo_settings(recipe) if recipe.method == "dpo" else answer_settings(recipe)
    check_held_out(settings)
    _refuse_inert_sections(recipe, settings)
    _refuse_head(recipe)
    return settings


def _dpo_settings(recipe: Recipe) -> dict[str, Any]:
    given = dict(recipe.trainer)
    if isinstance(given.get("loss_type"), str):
        given["loss_type"] = [given["loss_type"]]
    check_given(given, "DPOConfig", ELSEWHERE)
    _check_loss_names(given)
    settings = {**DEFAULTS, **given}
    if "loss_type" in given and "loss_weights" not in given:
        settings.pop("loss_weights")  # the default weights belong to the default losses
    _check_losses(settings)
    check_trackers(settings)
    _refuse_inert(given, settings)
    if recipe.lora.dropout > 0 and settings.get("disable_dropout", True):
        raise ConfigError(
            f"lora.dropout is {recipe.lora.dropout}, but TRL switches all dropout off: "
            "set trainer.disable_dropout: false."
        )
    return settings


def trainer_config(settings: dict[str, Any], *, output_dir: Path, dtype: str, method: str = "dpo") -> Any:
    """TRL's config object (`DPOConfig`, `SFTConfig`, `KTOConfig`) for checked settings.

    Raises:
        ConfigError: TRL refuses them; with TRL's own reason.
    """
    import torch
    import trl

    if method == "dpo":
        # With the engine, checkpointing is allowed here and used only for steps that would not fit without it.
        settings = {"gradient_checkpointing": True, **settings}
        return build_config(trl.DPOConfig, settings, output_dir=output_dir, dtype=dtype)
    settings = {"gradient_checkpointing": torch.cuda.is_available(), **settings}
    if method == "sft":
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}  # rows are token ids and labels already
    kind = getattr(trl, METHODS[method].config)
    return build_config(kind, settings, output_dir=output_dir, dtype=dtype)


def _check_loss_names(given: dict[str, Any]) -> None:
    losses = given.get("loss_type")
    if losses == []:
        raise ConfigError(f"trainer.loss_type is []: name at least one of {', '.join(LOSSES)}.")
    for loss in losses or ():
        if loss not in LOSSES:
            raise ConfigError(
                f"trainer.loss_type has {shown(loss)}: allowed are {', '.join(LOSSES)}.{nearest(loss, LOSSES)}"
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
            f"trainer.f_divergence_type is {shown(divergence)}: allowed are {', '.join(DIVERGENCES)}."
            f"{nearest(divergence, DIVERGENCES)}"
        )
    without = [loss for loss in losses if loss not in DIVERGENCE_LOSSES]
    if divergence != "reverse_kl" and without:
        raise ConfigError(
            f"trainer.f_divergence_type {divergence} does not exist for loss_type {', '.join(without)}. "
            f"Losses that have it: {', '.join(DIVERGENCE_LOSSES)}."
        )


def _refuse_head(recipe: Recipe) -> None:
    targets = recipe.lora.targets
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise ConfigError(
            "lora.targets has lm_head, but TRL multiplies with that layer's own weight, so an adapter on it would "
            "never be trained. Remove it."
        )


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
    sorting = sorted({"aot", "aot_unpaired"} & set(settings["loss_type"])) if recipe.method == "dpo" else []
    if recipe.data.pair_weight != "equal" and sorting:
        raise ConfigError(
            f"data.pair_weight weights pairs, but the loss {sorting[0]} compares answers across pairs. "
            "Remove one of them."
        )
    if recipe.model.quantize == "none" and recipe.model.packed != "auto":
        raise ConfigError("model.packed changes nothing with quantize: none. Remove it.")
    if not recipe.data.has_held_out:
        if settings.get("eval_strategy", "no") != "no":
            raise ConfigError("trainer.eval_strategy needs held-out pairs: set data.eval or data.hold_out.")
        for name in ("answers", "show"):
            # The default is no wish (a recipe that was written out has it, too), and 0 asks for nothing.
            if getattr(recipe.evaluation, name) in (0, EvaluationSection.model_fields[name].default):
                continue
            raise ConfigError(f"evaluation.{name} is about held-out prompts: set data.eval or data.hold_out.")

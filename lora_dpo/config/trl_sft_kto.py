"""The recipe's `trainer:` section for SFT (imitates good answers) and KTO (learns from single answers, good or bad).

Both train the same adapter on the same one base with TRL's own trainers; their fields of `trainer:` are those of
TRL's `SFTConfig` and `KTOConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_dpo.config.reading import nearest
from lora_dpo.config.recipe import EngineSection, Recipe
from lora_dpo.config.trl_common import ELSEWHERE, NO_SECOND_MODEL, check_given, check_trackers
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

TITLES = {
    "dpo": "preference-tuned with Direct Preference Optimization",
    "sft": "fine-tuned on good answers (SFT)",
    "kto": "preference-tuned with KTO, on single answers that are good or bad",
}
"""What a model card says that was done."""

_COMMON_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 42,
}

_TOKENISED = "answers are token ids before training starts, and only they are trained on"


@dataclass(frozen=True)
class Method:
    """What one method's `trainer:` section may hold."""

    config: str
    """TRL's class of its fields."""
    defaults: dict[str, Any]
    elsewhere: dict[str, str]
    losses: tuple[str, ...]


METHODS = {
    "sft": Method(
        "SFTConfig",
        {
            # TRL's 2e-5 is meant for whole models
            "learning_rate": 1e-4,
            **_COMMON_DEFAULTS,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
        },
        {
            **ELSEWHERE,
            **dict.fromkeys(
                ("assistant_only_loss", "chat_template_path", "completion_only_loss", "dataset_kwargs",
                 "dataset_text_field", "eos_token", "eval_packing", "packing", "packing_strategy", "padding_free",
                 "pad_token", "shuffle_dataset", "truncation_mode"),
                _TOKENISED,
            ),
        },
        ("nll", "dft"),
    ),
    "kto": Method(
        "KTOConfig",
        {
            # as for DPO: TRL's 1e-6 is meant for whole models
            "learning_rate": 5e-5,
            **_COMMON_DEFAULTS,
            # its KL term is estimated from the answers of one batch
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
        },
        {
            **ELSEWHERE,
            "sync_ref_model": NO_SECOND_MODEL,
            "ref_model_mixup_alpha": NO_SECOND_MODEL,
            "ref_model_sync_steps": NO_SECOND_MODEL,
            "precompute_ref_log_probs": "the reference is scored in every step, on the same base",
            "precompute_ref_batch_size": "the reference is scored in every step, on the same base",
        },
        ("kto", "apo_zero_unpaired"),
    ),
}  # fmt: skip


def answer_settings(recipe: Recipe) -> dict[str, Any]:
    """Check the `trainer:` section of an SFT or KTO recipe and fill in the defaults.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or a setting that this method would ignore.
    """
    method = METHODS[recipe.method]
    given = dict(recipe.trainer)
    check_given(given, method.config, method.elsewhere)
    settings = {**method.defaults, **given}
    loss = settings.get("loss_type", method.losses[0])
    if loss not in method.losses:
        raise ConfigError(
            f"trainer.loss_type is {shown(loss)}: with method: {recipe.method} allowed are {', '.join(method.losses)}."
            f"{nearest(loss, method.losses)}"
        )
    check_trackers(settings)
    _refuse_inert(recipe)
    if recipe.method == "kto":
        _check_kto(recipe, settings)
    return settings


def _refuse_inert(recipe: Recipe) -> None:
    """Settings of the recipe that are about pairs."""
    changed = [
        name for name in EngineSection.model_fields if getattr(recipe.engine, name) != getattr(EngineSection(), name)
    ]
    if changed:
        raise ConfigError(
            f"engine.{changed[0]} changes nothing with method: {recipe.method}: the engine runs pairs. Remove it."
        )
    if recipe.data.pair_weight != "equal":
        raise ConfigError(
            f"data.pair_weight changes nothing with method: {recipe.method}, which looks at each answer alone. "
            "Remove it."
        )
    if recipe.data.min_gap is not None:
        raise ConfigError(
            f"data.min_gap changes nothing with method: {recipe.method}, which looks at each answer alone. Remove it."
        )


def _check_kto(recipe: Recipe, settings: dict[str, Any]) -> None:
    """What TRL would refuse too, but only when the weights are loaded."""
    if recipe.lora.dropout > 0 and settings.get("disable_dropout", True):
        raise ConfigError(
            f"lora.dropout is {recipe.lora.dropout}, but TRL switches all dropout off: "
            "set trainer.disable_dropout: false."
        )
    if settings.get("loss_type", "kto") != "kto":
        return
    if settings["per_device_train_batch_size"] < 2:
        raise ConfigError(
            "trainer.per_device_train_batch_size is 1, but KTO estimates its KL term from the other answers of a "
            "batch. Set 2 or more."
        )
    if settings.get("train_sampling_strategy", "sequential") != "sequential":
        raise ConfigError(
            f"trainer.train_sampling_strategy is {shown(settings['train_sampling_strategy'])}, but KTO pairs each "
            "answer with its neighbour in a fixed order. Leave it out: answers are shuffled once, by the seed."
        )

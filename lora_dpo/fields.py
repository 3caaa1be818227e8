"""What every method's `trainer:` section has in common: types, ranges, trackers, and fields that have another place."""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lora_dpo.config import nearest
from lora_dpo.errors import ConfigError

NO_UPLOADS = "a run uploads nothing; share the adapter folder yourself when training is done"
NO_SECOND_MODEL = "the reference is the same base, so there is no second model to move"

ELSEWHERE = {
    "output_dir": "set output: instead",
    "resume_from_checkpoint": "pass --resume instead",
    "model_init_kwargs": "set model: instead",
    "trust_remote_code": "set model.trust_remote_code instead",
    "bf16": "set model.dtype: bfloat16 instead",
    "fp16": "set model.dtype: float16 instead",
    "bf16_full_eval": "set model.dtype instead",
    "fp16_full_eval": "set model.dtype instead",
    "disable_tqdm": "progress is drawn from the run's events",
    "do_train": "a run always trains",
    "do_eval": "held-out pairs are evaluated whenever data.eval is set",
    "do_predict": "nothing is predicted in a run",
    "remove_unused_columns": "rows are token ids already",
    "save_only_model": "a run could not go on from such a checkpoint",
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
"""Fields of every TRL config that a run would ignore or that have another place: refused, with the reason."""

AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
ABOVE_ZERO = ("beta", "learning_rate", "num_train_epochs")


def check_given(given: dict[str, Any], kind: type, elsewhere: dict[str, str]) -> None:
    """Hold a `trainer:` section against the fields of TRL's config class.

    Raises:
        ConfigError: an unknown field, one that has another place, a wrong type, or a number out of range.
    """
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        if name not in fields:
            raise ConfigError(f"trainer.{name} is not a field of TRL's {kind.__name__}.{nearest(name, fields)}")
        if name in elsewhere:
            raise ConfigError(f"trainer.{name} has no effect here: {elsewhere[name]}.")
        _check_type(name, value, hints[name])
        _check_number(name, value)


def check_trackers(settings: dict[str, Any]) -> None:
    """Raise `ConfigError` unless every tracker in `report_to` is known and installed."""
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


def build_config(kind: type, settings: dict[str, Any], *, output_dir: Path, dtype: str) -> Any:
    """TRL's config object for checked settings. Raises `ConfigError` with TRL's own reason."""
    import torch

    cuda = torch.cuda.is_available()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            config = kind(
                output_dir=str(output_dir),
                bf16=cuda and dtype == "bfloat16",
                fp16=cuda and dtype == "float16",
                use_cpu=not cuda,
                disable_tqdm=True,
                **{"dataloader_pin_memory": cuda, **settings},
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
        allowed = _choices(hint) or " or ".join(dict.fromkeys(_plain(problem["msg"]) for problem in error.errors()))
        quote = ' YAML reads an unquoted no as false: write "no".' if value is False and "'no'" in allowed else ""
        raise ConfigError(f"trainer.{name} is {value!r}: allowed is {allowed}.{quote}") from None


def _choices(hint: Any) -> str:
    """The values of an enumeration among a field's types; empty if there is none."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Enum)]
    values = [repr(member.value) for kind in kinds for member in kind]
    return f"one of {', '.join(values)}" if values else ""


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


def _plain(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Input should ")

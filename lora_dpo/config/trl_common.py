"""What every method's `trainer:` section has in common: types, ranges, trackers, and fields that have another place."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lora_dpo.config.reading import nearest
from lora_dpo.config.trl_kinds import fields_of, known_trackers
from lora_dpo.errors import ConfigError
from lora_dpo.quiet import quiet_libraries
from lora_dpo.systems import wants_apple_gpu
from lora_dpo.text import shown

NO_UPLOADS = "a run uploads nothing; share the adapter folder yourself when training is done"
NO_SECOND_MODEL = "the reference is the same base, so there is no second model to move"

NO_SECOND_DEVICE = "a run has one base on one device; a script with lora_dpo.DPOTrainer can shard"

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
    "do_eval": "held-out pairs are evaluated whenever there are any",
    "do_predict": "nothing is predicted in a run",
    "remove_unused_columns": "rows are token ids already",
    "save_only_model": "a run could not go on from such a checkpoint",
    "dataset_num_proc": "rows are tokenised before training starts",
    "fsdp": NO_SECOND_DEVICE,
    "fsdp_config": NO_SECOND_DEVICE,
    "deepspeed": NO_SECOND_DEVICE,
    "parallelism_config": NO_SECOND_DEVICE,
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


def have_trl() -> None:
    """Import TRL in one thread, before several do: it puts another module into its own place meanwhile.

    Of two threads that import it at once, one is given the empty module that was there before.
    """
    import trl  # noqa: F401


def check_given(given: dict[str, Any], kind: str, elsewhere: dict[str, str]) -> None:
    """Hold a `trainer:` section against the fields of TRL's config class of that name; torch is not loaded for it.

    Raises:
        ConfigError: an unknown field, one that has another place, a wrong type, or a number out of range.
    """
    fields = fields_of(kind) if given else {}
    for name, value in given.items():
        if name not in fields:
            raise ConfigError(f"trainer.{name} is not a field of TRL's {kind}.{nearest(name, fields)}")
        if name in elsewhere:
            raise ConfigError(f"trainer.{name} has no effect here: {elsewhere[name]}.")
        _check_type(name, value, fields[name])
        _check_number(name, value)


def check_trackers(settings: dict[str, Any]) -> None:
    """Raise `ConfigError` unless every tracker in `report_to` is known and installed."""
    asked = settings["report_to"] or []
    named = [tracker for tracker in ([asked] if isinstance(asked, str) else asked) if tracker not in ("all", "none")]
    known = (*known_trackers(), "all", "none") if named else ()
    for tracker in named:
        if tracker not in known:
            raise ConfigError(
                f"trainer.report_to has {shown(tracker)}: allowed are {', '.join(known)}.{nearest(tracker, known)}"
            )
        from transformers.integrations import get_available_reporting_integrations

        if tracker not in get_available_reporting_integrations():
            raise ConfigError(
                f"trainer.report_to has {shown(tracker)}, which is not installed. Install it, or use none."
            )


def build_config(kind: type, settings: dict[str, Any], *, output_dir: Path, dtype: str) -> Any:
    """TRL's config object for checked settings. Raises `ConfigError` with TRL's own reason."""
    import torch

    cuda = torch.cuda.is_available()
    with trl_refusals(kinds=(*REFUSALS, TypeError)), quiet_libraries():
        config = kind(
            output_dir=str(output_dir),
            bf16=cuda and dtype == "bfloat16",
            fp16=cuda and dtype == "float16",
            use_cpu=not (cuda or wants_apple_gpu()),
            disable_tqdm=True,
            **{"dataloader_pin_memory": cuda, **settings},
        )
    if config.n_gpu > 1:
        config._n_gpu = 1  # one base on one GPU; transformers would copy the model to every visible one
    return config


REFUSALS = (ValueError, NotImplementedError, ImportError)
ARGUMENTS = (*REFUSALS, TypeError, AttributeError, KeyError)
"""Where nothing but the library's code runs, wrong arguments end in these, too."""


@contextlib.contextmanager
def trl_refusals(what: str = "", kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """What TRL, transformers or torch refuse while they are set up becomes a `ConfigError` with their own reason.

    Args:
        what: the settings that the reason is about, such as `.optim is lion`.
        kinds: the exceptions that are refusals.
    """
    try:
        yield
    except kinds as error:
        # str of a KeyError is its key alone
        said = f"there is no {error}" if isinstance(error, KeyError) else next(iter(str(error).split("\n")), "")
        raise ConfigError(f"trainer{what}: {said.strip().rstrip('.')}.") from error


def check_optimizer(config: Any) -> None:
    """Make optimizer and schedule once for a single number: what they lack is found before any weights are loaded.

    Raises:
        ConfigError: a package that is not installed, or an argument that is missing or unknown.
    """
    import torch
    from transformers import Trainer, get_scheduler

    with trl_refusals(f".optim is {_value(config.optim)}", ARGUMENTS), quiet_libraries():
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
        if set(arguments) & {"optimizer_dict", "params", "model"}:
            return  # per layer, from the model itself
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **arguments)
    with trl_refusals(f".lr_scheduler_type is {_value(config.lr_scheduler_type)}", ARGUMENTS):
        schedule = get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=1,
            num_training_steps=4,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
        if _value(config.lr_scheduler_type) not in ("reduce_lr_on_plateau", "greedy"):  # these step by a metric
            for _ in range(4):
                optimizer.step()
                schedule.step()


def _value(name: Any) -> Any:
    return name.value if isinstance(name, Enum) else name


def check_held_out(settings: dict[str, Any]) -> None:
    """Raise `ConfigError` for settings that need an evaluation during training, where there is none."""
    evaluated = settings.get("eval_strategy", "no") != "no"
    for name, value in NEEDS_EVALUATION.items():
        if not evaluated and settings.get(name) == value:
            raise ConfigError(
                f"trainer.{name} is {value!r}, which needs an evaluation during training: set data.eval or "
                "data.hold_out, and trainer.eval_strategy."
            )
    best = settings.get("save_strategy") == "best" or settings.get("load_best_model_at_end")
    metric = settings.get("metric_for_best_model")
    if metric is not None and not best:
        raise ConfigError(
            "trainer.metric_for_best_model changes nothing without load_best_model_at_end or save_strategy: best. "
            "Remove it."
        )
    if metric is None and settings.get("save_strategy") == "best":
        raise ConfigError("trainer.save_strategy is 'best': say by what, such as metric_for_best_model: eval_loss.")


NEEDS_EVALUATION: dict[str, Any] = {"eval_on_start": True, "save_strategy": "best"}
"""Values of fields that work on what an evaluation finds, and that TRL's config takes without one."""


def _check_type(name: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        words = get_args(hint) if get_origin(hint) is Literal else ()
        allowed = f"one of {', '.join(map(repr, words))}" if words else _kinds(error)
        quote = ' YAML reads an unquoted no as false: write "no".' if value is False and "no" in words else ""
        near = nearest(value, words) if isinstance(value, str) else ""
        raise ConfigError(f"trainer.{name} is {shown(value)}: allowed is {allowed}.{quote}{near}") from None


def _kinds(error: ValidationError) -> str:
    """`a valid number or a valid list`: what a type would have taken."""
    said = (problem["msg"].removeprefix("Input should be ") for problem in error.errors())
    return " or ".join(dict.fromkeys(text.removeprefix("Input should ") for text in said))


def _check_number(name: str, value: Any) -> None:
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"trainer.{name} is {shown(value)}: allowed is a finite number.")
    if name in AT_LEAST_ONE and value < 1:
        raise ConfigError(f"trainer.{name} is {shown(value)}: allowed is 1 or more.")
    if name in ABOVE_ZERO and value <= 0:
        raise ConfigError(f"trainer.{name} is {shown(value)}: allowed is a number above 0.")
    if name == "max_steps" and value == 0:
        raise ConfigError("trainer.max_steps is 0: allowed is 1 or more, or -1 for num_train_epochs.")
    if name == "ld_alpha" and value is not None and not 0 <= value <= 1:
        raise ConfigError(f"trainer.{name} is {shown(value)}: allowed is a number from 0 to 1.")
    if name == "use_liger_kernel" and value and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "trainer.use_liger_kernel is true, but liger-kernel is not installed. Install it, or leave it out."
        )
    if name == "label_smoothing" and not 0 <= value < 0.5:
        raise ConfigError(f"trainer.{name} is {shown(value)}: allowed is 0 or more, and below 0.5.")

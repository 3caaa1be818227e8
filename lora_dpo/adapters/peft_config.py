"""What PEFT is told about an adapter: built here from fields that were checked, never the adapter's own file.

PEFT hands patterns of a config to Python's `re`, and tries every name of a list on every module. So patterns become
the names of the base's modules that they match, and of long lists the names that no module has are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.lora_config import CONFIG, AdapterConfig
from lora_dpo.adapters.module_names import ByModule, in_use, is_name, matching
from lora_dpo.adapters.parameter_lora import targets_of
from lora_dpo.errors import AdapterError
from lora_dpo.model.lora import base_of
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

FEW = 64
"""Names or patterns that PEFT gets as they are."""
MAX_VALUES = 256
"""Different ranks or alphas by pattern: each is a regular expression in PEFT, and Python keeps 512 of them."""

_AS_IT_IS = (
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "task_type", "base_model_name_or_path", "revision"),
    "ensure_weight_tying",
)
_PARTS_OF_ADAPTERS = re.compile(r"(^|\.)(base_layer|original_module|modules_to_save|lora_\w+)(\.|$)")


def live_config(config: AdapterConfig, model: torch.nn.Module) -> LoraConfig:
    """The PEFT config of an adapter for a model, which may have other adapters on it.

    Raises:
        AdapterError: more different ranks or alphas than PEFT could look through.
    """
    from peft import LoraConfig

    raw = config.raw
    if isinstance(config.targets, str) and raw.get("layers_to_transform") is not None:
        raise AdapterError(f"{CONFIG} has layers_to_transform beside a pattern, which PEFT does not take.")
    modules = [name for name, _ in base_of(model).named_modules() if name and not _PARTS_OF_ADAPTERS.search(name)]
    fields: dict[str, Any] = {name: raw[name] for name in _AS_IT_IS if raw.get(name) is not None}
    if isinstance(fields.get("init_lora_weights"), str):
        fields["init_lora_weights"] = True  # the file's own values follow: none is to be computed of the base
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if raw.get(name):
            fields[name] = _names(raw[name], modules)
    if config.parameters:
        fields["target_parameters"] = config.parameters
    known = [*modules, *(target.name for target in targets_of(config, base_of(model)).values())]
    fields["rank_pattern"] = _by_name("rank_pattern", config.rank_pattern, config.ranks, known)
    fields["alpha_pattern"] = _by_name("alpha_pattern", config.alpha_pattern, config.alphas, known)
    return LoraConfig(**fields)


def _names(given: str | list[str], modules: Sequence[str]) -> str | list[str]:
    """Names of modules for a field that takes names, or one pattern as text."""
    if isinstance(given, str):
        return given if given.lower() == "all-linear" else matching(given, modules)
    plain_names = [name for name in given if is_name(name)]
    return plain_names if len(plain_names) <= FEW else in_use(plain_names, modules)


def _by_name(field: str, given: Mapping[str, Any], found: ByModule[Any], modules: Sequence[str]) -> dict[str, Any]:
    """A few names with their values as they are; else one expression for all modules that have a value."""
    if len(given) <= FEW and all(map(is_name, given)):
        return dict(given)
    by_value: dict[Any, list[str]] = {}
    for module, value in found.of(modules).items():
        by_value.setdefault(value, []).append(re.escape(module))
    if len(by_value) > MAX_VALUES:
        raise AdapterError(
            f"{CONFIG} has {len(by_value):,} different values in {plain(field)}; at most {MAX_VALUES} are read."
        )
    return {"|".join(names): value for value, names in by_value.items()}

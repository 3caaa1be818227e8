"""An adapter's `adapter_config.json`, read and checked without loading any model.

Also the names of PEFT's files, and how broken ones are told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from lora_dpo.adapters.module_names import MAX_NAME, MAX_NAMES, MAX_PATTERNS, ByModule, is_name, is_pattern
from lora_dpo.errors import AdapterError
from lora_dpo.text import plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

MAX_JSON = 1 << 20

MAX_RANK = 4096

MAX_PARAMETERS = 1024
"""Names of stacked weights: PEFT tries each on every parameter. Two or three, or as many in each layer."""

# Ways to adapt that PEFT knows and that are not W + scale·B·A on the base's own layers.
_FOREIGN = (
    "layer_replication",
    "trainable_token_indices",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
)

_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "true", "false")
"""Ways to begin that leave the base as it is. EVA (Paischer et al. 2024) and MiCA (2026) take A or B from data, or from
the base's smallest singular vectors; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take something out of the base."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that decide what the adapter computes."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    fan_in_fan_out: bool
    targets: Any
    base: str | None
    revision: str | None
    raw: dict[str, Any] = field(repr=False)
    parameters: list[str] = field(default_factory=list)
    """PEFT's `target_parameters`: stacked weights that are adapted, such as a mixture's experts."""

    @cached_property
    def ranks(self) -> ByModule[int]:
        """`rank_pattern`, to be asked for many modules at once."""
        return ByModule(self.rank_pattern)

    @cached_property
    def alphas(self) -> ByModule[float]:
        """`alpha_pattern`, to be asked for many modules at once."""
        return ByModule(self.alpha_pattern)

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of B·A: alpha / r (Hu et al. 2021, section 4.1), alpha / √r with rsLoRA (Kalajdzievski 2023)."""
        alpha = float(self.alphas.of([module]).get(module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json`. Raises `AdapterError` for anything that is no plain LoRA."""
    path = folder / CONFIG
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path} describes {plain(kind)}, not LORA. Only LoRA adapters are supported.")
    ranks, alphas = _numbers(path, raw)
    found = [name for name in _FOREIGN if raw.get(name)]
    if (bias := raw.get("bias")) in ("all", "lora_only"):
        found.append(f"bias: {bias}")
    if found:
        raise AdapterError(
            f"{path} uses {', '.join(found)}: only LoRA, DoRA and whole saved modules are supported, live and merged. "
            "Use it with plain peft, or train it again without."
        )
    for name in ("target_modules", "exclude_modules"):
        _check_modules(path, name, raw.get(name))
    for name in ("modules_to_save", "layers_pattern"):
        _check_modules(path, name, raw.get(name), patterns=False)
    _check_modules(path, "target_parameters", raw.get("target_parameters"), patterns=False)
    if len(raw.get("target_parameters") or []) > MAX_PARAMETERS:
        raise AdapterError(
            f"{path}: target_parameters has more than {MAX_PARAMETERS:,} names, which is all that are read."
        )
    _check_library(folder, raw.get("auto_mapping"))
    init = raw.get("init_lora_weights", True)
    began = None if not isinstance(init, list | dict) and init in _INITS else f"init_lora_weights {plain(init)}"
    if changed := began or ("kasa_config" if raw.get("kasa_config") else None):  # KaSA cuts off the base's small parts
        raise AdapterError(
            f"{path} says {changed}: such an adapter belongs to a changed base. "
            "Ask its maker for one converted to plain LoRA."
        )
    _check_kinds(path, raw)
    return AdapterConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        targets=raw.get("target_modules"),
        base=raw.get("base_model_name_or_path") or None,
        revision=raw.get("revision"),
        raw=raw,
        parameters=list(raw.get("target_parameters") or []),
    )


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes. Raises `AdapterError`."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise AdapterError(f"{path} has {size:,} bytes; at most {limit:,} are read.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read ({plain(error)}). Take the adapter from its source again."
        ) from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path} cannot be read (no JSON object). Take the adapter from its source again.")
    return found


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what a broken file makes its reader raise into an `AdapterError` that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path} is no whole safetensors file ({plain(error)}). Take the adapter from its source again."
        ) from error


def _numbers(path: Path, raw: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, float]]:
    """`rank_pattern` and `alpha_pattern`, after they and `r` and `lora_alpha` were checked."""
    patterns = [raw.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    for name, pattern in zip(("rank_pattern", "alpha_pattern"), patterns, strict=True):
        if not isinstance(pattern, dict):
            raise AdapterError(f"{path}: {name} is {plain(pattern)}, no table of modules.")
        _check_modules(path, name, list(pattern))
        if odd := [key for key in pattern if "(?!" in key or "(?=" in key]:
            raise AdapterError(f"{path} names modules by {plain(odd[0])} ({name}): no pattern that is accepted.")
    for rank in (raw.get("r"), *patterns[0].values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= MAX_RANK:
            raise AdapterError(f"{path} has rank {plain(rank)}: allowed is 1 to {MAX_RANK}.")
    for alpha in (raw.get("lora_alpha"), *patterns[1].values()):
        if not _is_number(alpha):
            raise AdapterError(f"{path} has lora_alpha {plain(alpha)}, which is not a finite number.")
    return patterns[0], patterns[1]


def _check_modules(path: Path, field: str, given: object, *, patterns: bool = True) -> None:
    """Names of modules, or regular expressions where PEFT takes them, of forms that cannot run for hours."""
    texts = given if isinstance(given, list) else [] if given is None else [given]
    if len(texts) > MAX_NAMES:
        raise AdapterError(f"{path}: {field} has {len(texts):,} names; at most {MAX_NAMES:,} are read.")
    others = [text for text in texts if not is_name(text)]
    if patterns and len(others) > MAX_PATTERNS:
        raise AdapterError(f"{path}: {field} has {len(others):,} patterns; at most {MAX_PATTERNS} are read.")
    if odd := [text for text in others if not (patterns and is_pattern(text))]:
        raise AdapterError(f"{path} names modules by {plain(odd[0])} ({field}): no pattern that is accepted.")


def _check_kinds(path: Path, raw: dict[str, Any]) -> None:
    """The other fields that PEFT is given (`peft_config.live_config`), each of its type."""
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Fields(BaseModel):
        model_config = ConfigDict(strict=True)
        bias: Literal["none", "all", "lora_only"] | None = None
        lora_dropout: float | None = Field(None, ge=0, le=1)
        fan_in_fan_out: bool | None = None
        use_rslora: bool | None = None
        use_dora: bool | None = None
        ensure_weight_tying: bool | None = None
        layers_to_transform: (
            Annotated[int, Field(ge=0, le=MAX_NAMES)]
            | Annotated[list[Annotated[int, Field(ge=0, le=MAX_NAMES)]], Field(max_length=MAX_NAMES)]
            | None
        ) = None
        task_type: Annotated[str, Field(max_length=MAX_NAME)] | None = None
        base_model_name_or_path: str | None = None
        revision: str | None = None

    try:
        Fields.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise AdapterError(
            f"{path}: {field} is {plain(raw[field])}: {plain(first['msg'])}. Ask its maker for one that peft saved."
        ) from None


def _check_library(folder: Path, mapping: object) -> None:
    """`auto_mapping` names a Python module that PEFT may import."""
    if mapping is None:
        return
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if not (isinstance(library, str) and re.fullmatch(r"(transformers|peft)(\.\w+)*", library)):
        raise AdapterError(
            f"{folder / CONFIG} would import {plain(library)}: only transformers' own models are allowed."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e6

"""What an adapter's two PEFT files hold, read and checked without loading any model.

    adapter_config.json         rank, alpha, targets, variants
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight and its like

Names of modules here are those of the base model (`model.layers.0.self_attn.q_proj`). A file may come
from anywhere: nothing in it is trusted, and text of it is shown with `plain`.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lora_dpo.adapters.module_names import MAX_NAME, MAX_NAMES, MAX_PATTERNS, ByModule, is_name, is_pattern
from lora_dpo.errors import AdapterError
from lora_dpo.model.tensor_file import open_tensors, state_of

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_JSON = 1 << 20
MAX_RANK = 4096
MAX_DIMENSION = 1 << 24
MAX_TENSORS = 100_000
"""Of one file. A LoRA on all experts of Qwen3-235B has 72,192."""
FLOATS = ("F32", "F16", "BF16")

# Ways to adapt that PEFT knows and that are not W + scale·B·A on the base's own layers.
_FOREIGN = (
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
_INITS = (True, False, None, "gaussian", "orthogonal", "true", "false")


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


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LoraModule:
    """The tensors that belong to one adapted module of the base. A is `[r, in]`, B is `[out, r]`."""

    a: Stored
    b: Stored
    magnitude: Stored | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank as stored."""
        return self.a.shape[0]


@dataclass
class AdapterTensors:
    """An adapter's tensors by what they are for."""

    lora: dict[str, LoraModule]
    saved: dict[str, Stored]
    """Whole parameters that replace the base's (`modules_to_save`), by the base's parameter name."""
    copies: dict[str, Stored]
    """The base's own embedding and head, by parameter name: peft stores them beside LoRA that targets them, and puts
    them in the base's place when it loads the adapter."""


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
    _check_library(folder, raw.get("auto_mapping"))
    init = raw.get("init_lora_weights", True)
    if isinstance(init, list | dict) or init not in _INITS:
        raise AdapterError(
            f"{path} says init_lora_weights {plain(init)}: such an adapter belongs to a changed base. "
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
    )


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors that a safetensors file lists; its header has been checked against its size.

    Raises:
        AdapterError: truncated, or a header that lies.
    """
    with _file_errors(path), open_tensors(path, "numpy") as file:
        names = list(file.keys())
        _check_tensor_names(path, names)
        parts = {name: file.get_slice(name) for name in names}
        found = {name: Stored(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    if not found:
        raise AdapterError(f"{path} holds no tensors. Take the adapter from its source again.")
    return found


def sort_tensors(path: Path, header: Mapping[str, Stored], config: AdapterConfig) -> AdapterTensors:
    """Say what each tensor is for, and check ranks and dtypes. Raises `AdapterError` naming the tensor."""
    found = AdapterTensors({}, {}, {})
    parts: dict[str, dict[str, Stored]] = {}
    for name, stored in header.items():
        if stored.dtype not in FLOATS:
            raise AdapterError(f"{path}: the tensor {plain(name)} is {stored.dtype}; adapters hold float weights.")
        if not stored.shape or max(stored.shape) > MAX_DIMENSION or min(stored.shape) < 1:
            raise AdapterError(f"{path}: the tensor {plain(name)} has the impossible shape {list(stored.shape)}.")
        if not name.startswith(PREFIX):
            raise AdapterError(f"{path}: {plain(name)} is no tensor of a LoRA adapter.")
        bare = name.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        if ".original_module." in bare:
            continue  # beside embeddings that were made larger peft stores the base's own, too
        suffix = next((suffix for suffix in _PARTS if bare.endswith(suffix)), None)
        if suffix:
            parts.setdefault(bare.removesuffix(suffix), {})[_PARTS[suffix]] = stored
        elif ".base_layer." in bare:
            found.copies[bare.replace(".base_layer.", ".")] = stored
        else:
            found.saved[bare] = stored
    ranks = config.ranks.of(list(parts))
    found.lora = {
        module: _lora_module(path, module, part, config.dora, ranks.get(module, config.rank))
        for module, part in parts.items()
    }
    if not found.lora and not found.saved:
        raise AdapterError(f"{path} holds no LoRA weights. Take the adapter from its source again.")
    return found


def read_adapter(folder: Path) -> tuple[AdapterConfig, AdapterTensors]:
    """Config and sorted tensors of an adapter folder. Raises `AdapterError`."""
    config = read_config(folder)
    path = folder / WEIGHTS
    return config, sort_tensors(path, read_header(path), config)


def check_fit(folder: Path, config: AdapterConfig, tensors: AdapterTensors, model: torch.nn.Module, base: str) -> None:
    """Check names and shapes against a base model (or its skeleton). Raises `AdapterError` naming the tensor."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    misfit = f"The adapter {folder} does not fit {base}:"
    for name, lora in tensors.lora.items():
        if name not in modules:
            raise AdapterError(f"{misfit} there is no {plain(name)} in it.")
        shape = _weight_shape(modules[name])
        if shape is None:
            raise AdapterError(f"{misfit} {plain(name)} is a {type(modules[name]).__name__}, not a linear layer.")
        out, into = shape
        a, b = (lora.a.shape[1], lora.b.shape[0])
        wanted = (out, into) if lora.embedding else (into, out)
        if (a, b) != wanted or (lora.magnitude and lora.magnitude.shape[0] not in (out, into)):
            raise AdapterError(
                f"{misfit} size mismatch in {plain(name)}, {a} to {b} here, {wanted[0]} to {wanted[1]} there."
            )
    _refuse_added_tokens(misfit, tensors, modules)
    for name, stored in tensors.copies.items():
        shape = _weight_shape(modules.get(name.removesuffix(".weight")))
        if shape != stored.shape:
            there = list(shape) if shape else "nothing"
            raise AdapterError(f"{misfit} the copy of {plain(name)} is {list(stored.shape)} here and {there} there.")
    for name, stored in tensors.saved.items():
        if name not in parameters or tuple(parameters[name].shape) != stored.shape:
            there = list(parameters[name].shape) if name in parameters else "nothing"
            raise AdapterError(f"{misfit} {plain(name)} is {list(stored.shape)} here and {there} there.")


def _refuse_added_tokens(misfit: str, tensors: AdapterTensors, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raise `AdapterError` for embeddings, or a head, with more rows than the base's: those of tokens that are new."""
    for name, stored in (*tensors.saved.items(), *tensors.copies.items()):
        shape = _weight_shape(modules.get(name.removesuffix(".weight")))
        if shape and len(stored.shape) == 2 and stored.shape[0] > shape[0] and stored.shape[1] == shape[1]:
            raise AdapterError(
                f"{misfit} {plain(name)} has {stored.shape[0] - shape[0]} rows more than there ({shape[0]}), such as "
                "those of tokens that were added, which is not supported. Use it with plain peft on a base that was "
                "resized so."
            )


def check_finite(folder: Path) -> None:
    """Read every weight once. Raises `AdapterError` naming a tensor with NaN or infinite values."""
    import torch

    for name, tensor in weights(folder):
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"The adapter {folder} holds NaN or infinite weights (in {plain(name)}). Take an earlier checkpoint."
            )


def weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the adapter's tensors one by one. Raises `AdapterError` if the file is broken, or changed meanwhile."""
    path = folder / WEIGHTS
    with _file_errors(path):
        before = state_of(path)
        file = open_tensors(path)
        names = list(file.keys())
    for name in names:
        with _file_errors(path):
            tensor = file.get_tensor(name)
        yield name, tensor
    with _file_errors(path):
        changed = state_of(path) != before
    if changed:
        raise AdapterError(f"{path} was written to while it was read. Try again when it is whole.")


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


def plain(value: object, limit: int = 90) -> str:
    """Text from outside, on one line and short: all but letters and digits in ASCII, so that nothing in it paints."""
    text = "".join(letter if _is_seen(letter) else ascii(letter)[1:-1] for letter in str(value).strip())
    return text if len(text) <= limit else text[: limit - 1] + "~"


def revealed(value: object) -> str:
    """`plain` in ASCII alone: for names that may look like another one."""
    text = str(value).strip()[:90]
    return "".join(letter if letter.isascii() and letter.isalnum() else ascii(letter)[1:-1] for letter in text)


def _is_seen(letter: str) -> bool:
    """Whether a letter or digit shows, and as itself: some letters of Hangul have no shape."""
    return letter.isalnum() and (letter.isascii() or unicodedata.normalize("NFKC", letter) == letter)


_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


def _lora_module(path: Path, module: str, part: dict[str, Stored], dora: bool, wanted: int) -> LoraModule:
    embedding = "embedding_A" in part or "embedding_B" in part
    a, b = part.get("embedding_A" if embedding else "A"), part.get("embedding_B" if embedding else "B")
    if a is None or b is None:
        missing = "lora_A" if a is None else "lora_B"
        raise AdapterError(f"{path}: {plain(module)} has no {missing}. Take the adapter from its source again.")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(f"{path}: the tensors of {plain(module)} are no matrices.")
    for rank, stored in ((a.shape[0], a), (b.shape[1], b)):
        if rank != wanted:
            raise AdapterError(f"{path}: {plain(stored.name)} has rank {rank}, but its config says {wanted}.")
    magnitude = part.get("magnitude")
    if (magnitude is not None) != dora:
        raise AdapterError(f"{path}: {plain(module)} and the config disagree on DoRA (use_dora: {dora}).")
    return LoraModule(a, b, magnitude, embedding)


def _weight_shape(module: torch.nn.Module | None) -> tuple[int, int] | None:
    """`(out, in)` of a linear layer or `(rows, width)` of an embedding, also where 4-bit weights are packed."""
    layer: Any = getattr(module, "base_layer", module)  # an adapter is on it already
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    if hasattr(layer, "num_embeddings"):
        return layer.num_embeddings, layer.embedding_dim
    if type(layer).__name__ == "Conv1D":  # GPT-2's layout, [in, out]
        return layer.weight.shape[1], layer.weight.shape[0]
    return None


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path} is no whole safetensors file ({plain(error)}). Take the adapter from its source again."
        ) from error


def _check_tensor_names(path: Path, names: list[str]) -> None:
    if len(names) > MAX_TENSORS:
        raise AdapterError(f"{path} lists {len(names):,} tensors; an adapter has at most {MAX_TENSORS:,}.")
    if odd := [name for name in names if len(name) > MAX_NAME or not name.isprintable()]:
        raise AdapterError(f"{path}: {plain(odd[0])} is no name of a tensor ({len(odd[0]):,} characters).")


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

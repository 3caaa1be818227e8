"""An adapter's weights, read by their header, sorted and checked: ranks, dtypes, finite values.

    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight and its like

Names of modules here are those of the base model (`model.layers.0.self_attn.q_proj`). A file may come
from anywhere: nothing in it is trusted, and text of it is shown with `plain`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dpo.adapters.lora_config import PREFIX, WEIGHTS, AdapterConfig, file_errors, read_config
from lora_dpo.adapters.module_names import MAX_NAME
from lora_dpo.errors import AdapterError
from lora_dpo.model.tensor_file import open_tensors, state_of
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch

MAX_DIMENSION = 1 << 24
MAX_TENSORS = 100_000
"""Of one file. A LoRA on all experts of Qwen3-235B has 72,192."""
FLOATS = ("F32", "F16", "BF16")
_BITS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""How a dtype's bits are read, and its exponent's: where all of these are set, it is an infinity or no number."""
_CHANGED = "{path} was written to while it was read. Try again when it is whole."


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


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors that a safetensors file lists; its header has been checked against its size.

    Raises:
        AdapterError: truncated, or a header that lies.
    """
    with file_errors(path), open_tensors(path, "numpy") as file:
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
        base_of = name.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        if ".original_module." in base_of:
            continue  # beside embeddings that were made larger peft stores the base's own, too
        suffix = next((suffix for suffix in _PARTS if base_of.endswith(suffix)), None)
        if suffix:
            parts.setdefault(base_of.removesuffix(suffix), {})[_PARTS[suffix]] = stored
        elif ".base_layer." in base_of:
            found.copies[base_of.replace(".base_layer.", ".")] = stored
        else:
            found.saved[base_of] = stored
    ranks = config.ranks.of(list(parts))
    found.lora = {
        module: _lora_module(path, module, part, config, ranks.get(module, config.rank))
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


def check_finite(folder: Path) -> None:
    """Read every weight once, by its bits: torch takes longer to import than most adapters to read.

    Raises:
        AdapterError: a tensor has NaN or infinite values, or the file was written to meanwhile.
    """
    import numpy

    path = folder / WEIGHTS
    with file_errors(path), path.open("rb") as file:
        before, bad = state_of(path), None
        try:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
            for name in header.keys() - {"__metadata__"}:
                kind, exponent = _BITS[header[name]["dtype"]]
                begin, end = header[name]["data_offsets"]
                file.seek(8 + start + begin)
                data = file.read(end - begin)
                if len(data) < end - begin:
                    raise ValueError("it ends early")
                bits = numpy.frombuffer(data, kind)
                if ((bits & exponent) == exponent).any():
                    bad = name
                    break
        except (ValueError, KeyError, TypeError) as error:  # its header was whole when it was read before
            raise AdapterError(_CHANGED.format(path=path)) from error
        if state_of(path) != before:
            raise AdapterError(_CHANGED.format(path=path))
    if bad is not None:
        raise AdapterError(
            f"The adapter {folder} holds NaN or infinite weights (in {plain(bad)}). Take an earlier checkpoint."
        )


def weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the adapter's tensors one by one. Raises `AdapterError` if the file is broken, or changed meanwhile."""
    path = folder / WEIGHTS
    with file_errors(path):
        before = state_of(path)
        file = open_tensors(path)
        names = list(file.keys())
    for name in names:
        with file_errors(path):
            tensor = file.get_tensor(name)
        yield name, tensor
    with file_errors(path):
        changed = state_of(path) != before
    if changed:
        raise AdapterError(_CHANGED.format(path=path))


_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


def _lora_module(path: Path, module: str, part: dict[str, Stored], config: AdapterConfig, wanted: int) -> LoraModule:
    embedding = "embedding_A" in part or "embedding_B" in part
    a, b = part.get("embedding_A" if embedding else "A"), part.get("embedding_B" if embedding else "B")
    if a is None or b is None:
        missing = "lora_A" if a is None else "lora_B"
        raise AdapterError(f"{path}: {plain(module)} has no {missing}. Take the adapter from its source again.")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(f"{path}: the tensors of {plain(module)} are no matrices.")
    stacked = bool(config.parameters) and a.shape[0] == b.shape[1]  # r for each expert: `check_fit` knows how many
    for rank, stored in ((a.shape[0], a), (b.shape[1], b)):
        if rank != wanted and not stacked:
            raise AdapterError(f"{path}: {plain(stored.name)} has rank {rank}, but its config says {wanted}.")
    magnitude = part.get("magnitude")
    if (magnitude is not None) != config.dora:
        raise AdapterError(f"{path}: {plain(module)} and the config disagree on DoRA (use_dora: {config.dora}).")
    return LoraModule(a, b, magnitude, embedding)


def _check_tensor_names(path: Path, names: list[str]) -> None:
    if len(names) > MAX_TENSORS:
        raise AdapterError(f"{path} lists {len(names):,} tensors; an adapter has at most {MAX_TENSORS:,}.")
    if odd := [name for name in names if len(name) > MAX_NAME or not name.isprintable()]:
        raise AdapterError(f"{path}: {plain(odd[0])} is no name of a tensor ({len(odd[0]):,} characters).")

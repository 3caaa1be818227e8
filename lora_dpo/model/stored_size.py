"""How many bytes a base's stored weights have, and how many of them are on this disk. Nothing is asked of the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_dpo.files import looks_local
from lora_dpo.model.base import resolve_model
from lora_dpo.model.identity import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StoredSize:
    """Bytes of the weights as they are stored."""

    total: int
    here: int
    """What is on this disk already."""
    source: Literal["files", "index", "parameters"]
    """How that is known: from the files, from the hub's index of them, or from the structure alone."""


def stored_size(name: str, skeleton: PreTrainedModel, *, revision: str | None = None) -> StoredSize:
    """Bytes of a base's weights.

    Args:
        name: as `load_base` takes it.
        skeleton: its structure without an adapter, for a hub model of which nothing but that is here.

    Raises:
        ModelError: a packaged model that is not here, or no model folder.
    """
    path = resolve_model(name)
    if looks_local(path):
        files = weight_files(path) or [file for end in ("*.bin", "*.gguf") for file in sorted(Path(path).glob(end))]
        here = sum(file.stat().st_size for file in files)
        return StoredSize(here, here, "files") if here else StoredSize(_by_parameters(skeleton), 0, "parameters")
    whole = _cached(path, "model.safetensors", revision)
    if whole is not None:
        return StoredSize(whole.stat().st_size, whole.stat().st_size, "files")
    index = _cached(path, "model.safetensors.index.json", revision)
    if index is None:
        return StoredSize(_by_parameters(skeleton), 0, "parameters")
    content = json.loads(index.read_text(encoding="utf-8"))
    shards = [_cached(path, shard, revision) for shard in set(content["weight_map"].values())]
    here = sum(shard.stat().st_size for shard in shards if shard is not None)
    if None not in shards:
        return StoredSize(here, here, "files")
    return StoredSize(int(content["metadata"]["total_size"]), here, "index")


def _cached(path: str, file: str, revision: str | None) -> Path | None:
    """A hub model's file in the hub's cache on this disk."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _by_parameters(skeleton: PreTrainedModel) -> int:
    return int(sum(parameter.numel() for parameter in skeleton.parameters()) * stored_itemsize(skeleton))


def stored_itemsize(skeleton: PreTrainedModel) -> int:
    """Bytes of a stored number, by the model's config; float32 where it does not say."""
    import torch

    dtype = getattr(skeleton.config, "dtype", None)
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    return int(found.itemsize)

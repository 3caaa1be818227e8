"""What a base model is: the hashes and the commit that tell it from others of its name."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ModelError
from lora_dpo.files import looks_local
from lora_dpo.model.tensor_file import State, open_tensors, state_of
from lora_dpo.text import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary with its ids: equal tokenizers read text alike."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _sha256(json.dumps(vocabulary))


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the chat template; of several, in the order of their names: that of files is anyhow."""
    template = tokenizer.chat_template
    return _sha256(json.dumps(template, sort_keys=True) if isinstance(template, dict) else str(template))


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's files on this disk are of: "main" moves, a commit does not.

    Args:
        path: as `resolve_model` returns it.
        revision: the branch, tag or commit that was asked for.

    Returns:
        The commit; for a model folder, and where nothing is on this disk yet, `revision` itself.
    """
    from huggingface_hub import try_to_load_from_cache

    found = None if Path(path).exists() else try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision  # …/snapshots/COMMIT/config.json


def weight_fingerprint(path: str, *, revision: str | None = None) -> str | None:
    """A hash that tells base models apart without reading all their weights.

    Covers each stored tensor's name, shape and up to 64 elements of its middle row, as multiples of 2^-12 after
    rounding to bf16: bf16 weights have the same fingerprint in bf16, fp16 and float32 files, whatever the shards.
    (float32 weights keep theirs in bf16, not in fp16, which rounds them elsewhere.) A head that is tied to the
    embeddings is left out, since some files store it and some do not. None without safetensors files. Computed once, as
    long as the files stay as they are.
    """
    files = tuple((file, state_of(file)) for file in weight_files(path, revision=revision))
    return _fingerprint(files, tied=bool(files) and _is_tied(path, revision))


@lru_cache(maxsize=64)
def _fingerprint(files: tuple[tuple[Path, State], ...], *, tied: bool) -> str | None:
    import torch

    digest = hashlib.sha256()
    found: dict[str, Path] = {}
    for file, _ in files:
        with open_tensors(file) as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if tied:
        found.pop("lm_head.weight", None)
    by_file: dict[Path, Any] = {file: open_tensors(file) for file in set(found.values())}
    for name in sorted(found):
        part = by_file[found[name]].get_slice(name)
        shape = part.get_shape()
        digest.update(f"{name}{shape}".encode())
        row = part[shape[0] // 2] if shape and shape[0] else torch.zeros(0)
        values = torch.as_tensor(row).reshape(-1)
        values = values[:: max(1, values.numel() // 64)][:64]
        # fp16 has no exponent for bf16's smallest weights: on this grid they are 0 in both
        steps = (values.to(torch.bfloat16).float() * 4096).round().clamp(-(2**31), 2**31 - 128)
        digest.update(steps.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:32] if found else None


def weight_files(path: str, *, revision: str | None = None) -> list[Path]:
    """The safetensors files that hold a model's weights; those of its index, if it has one.

    Raises:
        ModelError: the index is none.
    """
    from transformers.utils import cached_file

    config = cached_file(path, "config.json", revision=revision, local_files_only=looks_local(path))
    folder = Path(config).parent
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = {str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{index} is no index of weights ({plain(repr(error))}). Download the model again."
            ) from error
        return sorted(folder / name for name in names)
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _is_tied(path: str, revision: str | None) -> bool:
    from transformers.utils import cached_file

    found = cached_file(path, "config.json", revision=revision, local_files_only=looks_local(path))
    config = json.loads(Path(found).read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
    return bool(tied)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

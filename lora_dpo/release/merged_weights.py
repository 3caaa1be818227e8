"""Base and adapter as one stream of merged weights, one tensor in memory at a time.

    W' = W + s·B·A                        s = alpha / r; alpha / √r with rsLoRA (Hu et al. 2021, section 4.1)
    W' = m · (W + s·B·A) / ‖W + s·B·A‖    DoRA: norm of each output row (Liu et al. 2024, eq. 5)

Sums are made in float32. The tensors come from the base's own files; no model is built.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_dpo.adapters.adapter import check_fit, open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.folder import (
    check_holding,
    check_weights_of_base,
    unverified,
)
from lora_dpo.adapters.hub import hub_errors
from lora_dpo.adapters.lora_config import WEIGHTS, AdapterConfig
from lora_dpo.adapters.passport import read_passport
from lora_dpo.adapters.peft_files import LoraModule, check_finite
from lora_dpo.errors import AdapterError, ModelError
from lora_dpo.model.base import load_skeleton, model_errors, nf4_value, resolve_model
from lora_dpo.model.identity import chat_template_sha256, tokenizer_sha256, weight_files, weight_fingerprint
from lora_dpo.model.tensor_file import open_tensors
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch

    from lora_dpo.adapters.passport import Passport

Into = Literal["base16", "trained-base"]

_CONFIG = "config.json"
_OF_A_MODEL = (
    *(_CONFIG, "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*chat_template*"),
    *("LICENSE*", "README.md"),
)
"""The files of a hub repository that a merge reads; others hold the same weights once more in other forms."""


@dataclass
class Merged:
    """What a merge would write: names and shapes now, values one by one on demand."""

    base: str
    path: Path
    """The base's folder."""
    config: Any
    """The base's config, `tie_word_embeddings` already as in the result."""
    shapes: dict[str, tuple[int, ...]]
    _files: dict[str, tuple[Path, str]]
    """Where each result's base tensor is: file and stored name."""
    _lora: dict[str, LoraModule] = field(default_factory=dict)
    _saved: dict[str, str] = field(default_factory=dict)
    _adapter: AdapterConfig | None = None
    _folder: Path | None = None
    _nf4: frozenset[str] = frozenset()
    _dtype: str = "float32"
    untied: bool = False
    """The base has one matrix for embeddings and head, the result two."""
    differences: list[str] = field(default_factory=list)
    """What is not quite as the passport has it, for `folder.warn_of`: another revision, quantisation, tokenizer or
    chat template, or no passport."""

    def adapted(self, name: str) -> bool:
        """True if the adapter changes this parameter."""
        return name.removesuffix(".weight") in self._lora or name in self._saved

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter of the result: float32 where something was computed, else as it is stored."""
        with _Files() as files:
            for name in self.shapes:
                yield name, self._tensor(name, files)

    def _tensor(self, name: str, files: _Files) -> torch.Tensor:
        import torch

        module = name.removesuffix(".weight")
        if name in self._saved and self._folder:
            return files.get(self._folder / WEIGHTS, self._saved[name])
        weight = files.get(*self._files[name])
        if module in self._nf4:
            weight = nf4_value(weight.to(getattr(torch, self._dtype)))
        lora = self._lora.get(module)
        if lora is None or self._adapter is None or self._folder is None:
            return weight
        a, b, magnitude = (
            files.get(self._folder / WEIGHTS, part.name).float() if part else None
            for part in (lora.a, lora.b, lora.magnitude)
        )
        scale = self._adapter.scale_of(module, lora.rank)
        transposed = self._adapter.fan_in_fan_out and not lora.embedding
        if a is None or b is None:
            raise AdapterError(f"{self._folder} has no pair of matrices for {plain(module)}.")
        weight = weight.to(torch.float32, copy=True)  # a float32 file's own pages would be written to otherwise
        return merge_weight(
            weight, a, b, scale=scale, magnitude=magnitude, transposed=transposed, embedding=lora.embedding
        )


def merge_weight(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    magnitude: torch.Tensor | None = None,
    transposed: bool = False,
    embedding: bool = False,
) -> torch.Tensor:
    """The merged weight of one layer, in float32; `weight` is overwritten.

    Args:
        weight: `[out, in]`; `[in, out]` if `transposed`; `[rows, width]` of an embedding.
        a: `[r, in]` (of an embedding `[r, rows]`).
        b: `[out, r]` (of an embedding `[width, r]`).
        magnitude: DoRA's m, `[out]`.
    """
    rows = weight.T if transposed or embedding else weight
    rows.addmm_(b, a, alpha=scale)
    if magnitude is not None:
        rows.mul_((magnitude.reshape(-1) / rows.norm(dim=1))[:, None])
    return weight


def trained_into(adapter: Path) -> Into:
    """Which base an adapter was trained on, by its passport; base16 if nothing says so. Raises `AdapterError`."""
    passport = read_passport(adapter)
    return "base16" if passport is None or passport.quantize == "none" else "trained-base"


def plan_merge(adapter: Path, *, into: Into = "base16", model: str | None = None) -> Merged:
    """Check that an adapter fits its base, and say what the merge would hold; no weight is read yet.

    Args:
        into: "base16", or "trained-base" for the NF4 values that the adapter was trained on.
        model: another place of the same base; by default the one that the passport names.

    Raises:
        AdapterError: no adapter there, made for another base, or it does something that a weight cannot hold.
        ModelError: the base is not there, or holds packed 4-bit weights.
    """
    opened = open_adapter(adapter)
    passport, config, tensors = opened.passport, opened.config, opened.tensors
    check_finite(adapter)
    if into == "trained-base" and passport is not None and passport.quantize == "none":
        raise AdapterError(f"{adapter} was trained on unquantised weights: use --into base16, it is the same base.")
    name, revision = (model, None) if model else base_of(opened)  # another place has its own revisions
    live = "Use the adapter live, with lora-dpo chat or serve."
    merged, skeleton = _open_base(name, revision, live if passport else "Name its 16-bit original with --model.")
    if passport:
        fingerprint = weight_fingerprint(str(merged.path))
        merged.differences += check_weights_of_base(
            passport, adapter, name=name, revision=revision, fingerprint=fingerprint
        )
        quantize = "none" if into == "base16" else "nf4"
        merged.differences += _check_tokenizer(passport, adapter, name, merged.path, quantize=quantize)
    check_fit(opened, skeleton, name)
    if passport is None:
        merged.differences.append(unverified(adapter, name, quantize="none" if into == "base16" else "nf4"))
    if config.dora and any(lora.embedding for lora in tensors.lora.values()):
        raise AdapterError(f"{adapter} cannot be merged: it uses DoRA on embeddings. Use it live.")
    merged._folder, merged._adapter, merged._lora = adapter, config, tensors.lora
    merged._saved = {name: stored.name for name, stored in tensors.saved.items()}
    merged._files |= {name: (adapter / WEIGHTS, stored.name) for name, stored in tensors.copies.items()}
    if into == "trained-base":
        merged._nf4 = _linear_modules(skeleton)
        merged._dtype = passport.dtype if passport else "float32"
    _untie(merged, skeleton)
    return merged


def plan_base(model: str, revision: str | None = None, *, into: Into = "base16") -> Merged:
    """A base without an adapter, in the same form.

    Args:
        into: "base16" as it is stored, or "trained-base": its NF4 values, for an adapter that was trained on them.

    Raises:
        ModelError: the base is not there, or holds packed 4-bit weights.
    """
    merged, skeleton = _open_base(model, revision, "Name its 16-bit original instead.")
    if into == "trained-base":
        merged._nf4 = _linear_modules(skeleton)
    _untie(merged, skeleton)
    return merged


def _check_tokenizer(passport: Passport, adapter: Path, name: str, path: Path, *, quantize: str) -> list[str]:
    from transformers import AutoTokenizer

    with model_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(path)
    hashes = {"tokenizer": tokenizer_sha256(tokenizer), "template": chat_template_sha256(tokenizer)}
    return check_holding(passport, adapter, name=name, quantize=quantize, **hashes)


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], computed: Collection[str], *, itemsize: int, shard: int
) -> int:
    """Main memory that a merge takes at most, in bytes, beside Python and its libraries (about 0.5 GB).

    Four float32 copies of the largest matrix that is computed with (the weight, its NF4 value, scratch, the cast) or
    the largest other one as it is stored and cast, and the shard that is being filled.
    """
    single = max(_numel(shape) * (16 if name in computed else 4 + itemsize) for name, shape in shapes.items())
    return single + shard


def _open_base(name: str, revision: str | None, instead: str) -> tuple[Merged, torch.nn.Module]:
    """The base's weights, unchanged, and its skeleton; `instead` is what to do with one that is stored quantised."""
    from transformers import AutoConfig

    with model_errors(name):
        folder = _files_of(name, revision, (_CONFIG,))
        raw = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if raw.get("quantization_config"):
            how = plain(raw["quantization_config"].get("quant_method", "quantised"))
            raise ModelError(
                f"{name} is stored quantised ({how}), so it is neither merged into nor exported: that would round it "
                f"once more. {instead}"
            )
        folder = _files_of(name, revision, _OF_A_MODEL)
        files = weight_files(str(folder))
        if not files:
            raise ModelError(f"{name} has no safetensors files. Name a copy that has them with --model.")
        if absent := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{name} is not whole: {len(absent)} of its {len(files)} files of weights are missing "
                f"({plain(absent[0])}). Download it again, or name a whole copy with --model."
            )
        skeleton = load_skeleton(str(folder))
        stored = {key: (file, key) for file in files for key in _keys(file)}
        places = _match(name, stored, skeleton)
        state = skeleton.state_dict()
        config = AutoConfig.from_pretrained(folder)
        shapes = {key: tuple(state[key].shape) for key in places}
        return Merged(name, folder, config, shapes, places), skeleton


def _files_of(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """A model's folder; a hub repository's files of these names are downloaded if they are not in the cache."""
    from huggingface_hub import snapshot_download

    path = resolve_model(name)
    if Path(path).is_dir():
        return Path(path)
    with hub_errors(path, ModelError):
        found = snapshot_download(path, revision=revision, allow_patterns=list(patterns), library_name="lora-dpo")
    if not (Path(found) / _CONFIG).is_file():
        raise ModelError(f"{name} is no model: there is no {_CONFIG} in it.")
    return Path(found)


def _match(name: str, stored: dict[str, tuple[Path, str]], skeleton: Any) -> dict[str, tuple[Path, str]]:
    """The model's parameter names with the place of each in the files."""
    prefix = f"{skeleton.base_model_prefix}."
    state = skeleton.state_dict()
    places = {}
    for key in state:
        short = key.removeprefix(prefix)
        found = stored.get(key) or stored.get(short)
        if found:
            places[key] = found
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    missing = [key for key in state if key not in places and key not in tied]
    if missing:
        raise ModelError(
            f"{name} stores its weights under other names than the model has ({plain(missing[0])} is not there): "
            "transformers renames or joins them when it loads them, so they are neither merged one by one nor "
            "exported. Use an adapter of it live, with lora-dpo chat or serve."
        )
    return places


def _untie(merged: Merged, skeleton: Any) -> None:
    """Tied embeddings stay one tensor, unless the adapter changes the embeddings or the head: then both are written."""
    text = merged.config.get_text_config()
    if not (getattr(merged.config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)):
        return
    names = {module: name for name, module in skeleton.named_modules()}
    into = names[skeleton.get_input_embeddings()] + ".weight"
    head = names[skeleton.get_output_embeddings()] + ".weight"
    if not (merged.adapted(into) or merged.adapted(head)):
        return
    merged.untied = head not in merged.shapes
    # A head that is stored beside tied embeddings stays what it is: transformers reads it if the two differ.
    merged._files.setdefault(head, merged._files[into])
    merged.shapes.setdefault(head, merged.shapes[into])
    merged.config.tie_word_embeddings = False
    text.tie_word_embeddings = False


def _linear_modules(skeleton: Any) -> frozenset[str]:
    """The layers that 4-bit loading quantises: every linear one but the head."""
    import torch

    head = skeleton.get_output_embeddings()
    modules = skeleton.named_modules()
    return frozenset(name for name, part in modules if isinstance(part, torch.nn.Linear) and part is not head)


class _Files:
    """Open safetensors files, each once."""

    def __init__(self) -> None:
        self.open: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *reason: object) -> None:
        self.open.clear()

    def get(self, file: Path, name: str) -> torch.Tensor:
        if file not in self.open:
            self.open[file] = open_tensors(file)
        tensor: torch.Tensor = self.open[file].get_tensor(name)
        return tensor


def _keys(file: Path) -> list[str]:
    from safetensors import SafetensorError

    try:
        with open_tensors(file) as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ModelError(f"{file} is no whole safetensors file ({plain(error)}). Download it again.") from error


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size

"""Base and adapter as one stream of merged weights, one tensor in memory at a time.

    W' = W + s·B·A                        s = alpha / r; alpha / √r with rsLoRA (Hu et al. 2021, section 4.1)
    W' = m · (W + s·B·A) / ‖W + s·B·A‖    DoRA: norm of each output row (Liu et al. 2024, eq. 5)

Sums are made in float32. The tensors come from the base's own files; no model is built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.adapter import check_fit, open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.folder import (
    check_holding,
    check_weights_of_base,
    unverified,
)
from lora_dpo.adapters.lora_config import WEIGHTS, AdapterConfig
from lora_dpo.adapters.parameter_lora import Target, targets_of
from lora_dpo.adapters.peft_files import LoraModule, check_finite
from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.errors import AdapterError, ModelError
from lora_dpo.model.base import load_skeleton, model_errors
from lora_dpo.model.identity import chat_template_sha256, tokenizer_sha256, weight_files, weight_fingerprint
from lora_dpo.model.quantised import is_quantised, nf4_value, orientations, stored_shape, stored_value
from lora_dpo.model.stored_form import BITSANDBYTES, StoredForm, stored_form
from lora_dpo.model.tensor_file import OpenFiles, open_tensors
from lora_dpo.release.merge_base import CONFIG, OF_A_MODEL, Into, check_into, files_of
from lora_dpo.release.merged_experts import Piece, merge_piece, merge_stacked, renamed
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch

    from lora_dpo.adapters.passport import Passport


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
    _stacked: dict[str, tuple[str, Target]] = field(default_factory=dict)
    """Stacked weights that the adapter changes, by the model's names, with what its tensors of them are filed under."""
    _pieces: Mapping[str, Piece] = field(default_factory=dict)
    """Parts of stacked weights, by their stored names: the result has them like that, too."""
    _saved: dict[str, str] = field(default_factory=dict)
    _adapter: AdapterConfig | None = None
    _folder: Path | None = None
    _nf4: bool = False
    """Plain weights are made NF4 values on their way."""
    _layers: Mapping[str, bool] = field(default_factory=dict)
    """Layers that are quantised, and whether their weight is stored `[in, out]`."""
    _stored: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    """All tensors of a base that is stored quantised: what a weight stands for is in several."""
    _dtype: str | None = None
    """What the quantised values were computed in, where something says so."""
    form: StoredForm | None = None
    """How the base is stored quantised, if it is: its values are merged into."""
    untied: bool = False
    """The base has one matrix for embeddings and head, the result two."""
    differences: list[str] = field(default_factory=list)
    """What is not quite as the passport has it, for `folder.warn_of`: another revision, quantisation, tokenizer or
    chat template, or no passport."""

    chat_template_kwargs: TemplateKwargs = field(default_factory=dict)
    """Keywords that the adapter was trained with: defaults of the chat template that is written."""

    def adapted(self, name: str) -> bool:
        """True if the adapter changes this parameter."""
        parameter = self._pieces[name].parameter if name in self._pieces else name
        return name.removesuffix(".weight") in self._lora or name in self._saved or parameter in self._stacked

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter of the result: float32 where something was computed, else as it is stored."""
        with OpenFiles() as files:
            for name in self.shapes:
                yield name, self._tensor(name, files)

    def _tensor(self, name: str, files: OpenFiles) -> torch.Tensor:
        import torch

        module = name.removesuffix(".weight")
        if name in self._saved and self._folder:
            return files.get(self._folder / WEIGHTS, self._saved[name])
        weight = self._base_value(name, files)
        piece = self._pieces.get(name)
        if (found := self._stacked.get(piece.parameter if piece else name)) is not None:
            return self._with_experts(weight, piece, *found, files)
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

    def _with_experts(
        self, weight: torch.Tensor, piece: Piece | None, module: str, target: Target, files: OpenFiles
    ) -> torch.Tensor:
        import torch

        if self._adapter is None or self._folder is None:
            return weight
        lora = self._lora[module]
        a, b = (files.get(self._folder / WEIGHTS, part.name).float() for part in (lora.a, lora.b))
        scale = self._adapter.scale_of(target.name, target.rank)
        weight = weight.to(torch.float32, copy=True)
        if piece is not None:
            return merge_piece(weight, piece, target, a, b, scale=scale)
        return merge_stacked(weight, target, a, b, scale=scale)

    def _base_value(self, name: str, files: OpenFiles) -> torch.Tensor:
        """A base's weight as it is merged into: as stored, or what its quantised form stands for."""
        import torch

        path, key = self._files[name]
        transposed = self._layers.get(name.removesuffix(".weight"))
        if self._nf4 and transposed is not None and path != self._folder:
            weight = files.get(path, key).to(getattr(torch, self._dtype or "float32"))
            return nf4_value(weight, transposed=transposed)
        # a mixture's stored matrices are no layers of the model: what lies beside a weight says whether it is quantised
        quantised = is_quantised(key, self._stored)
        if path == self._folder or not (quantised or (self._stored and transposed is not None)):
            return files.get(path, key)
        value = stored_value(lambda one: files.get(*self._stored[one]), key, self._stored.keys())
        if quantised and transposed and self.form and self.form.kind != "fp8":
            value = value.T  # bitsandbytes has GPT-2's layers turned
        return value.to(getattr(torch, self._dtype)) if self._dtype else value


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


def plan_merge(adapter: Path, *, into: Into = "base16", model: str | None = None) -> Merged:
    """Check that an adapter fits its base, and say what the merge would hold; no weight is read yet.

    Args:
        into: "base16", or "trained-base" for the NF4 values that the adapter was trained on, or those of its base as it
            is stored quantised.
        model: another place of the same base; by default the one that the passport names.

    Raises:
        AdapterError: no adapter there, made for another base, or it does something that a weight cannot hold.
        ModelError: the base is not there, or is stored quantised where a plain one is needed, or in another form.
    """
    opened = open_adapter(adapter)
    passport, config, tensors = opened.passport, opened.config, opened.tensors
    check_finite(adapter)
    name, revision = (model, None) if model else base_of(opened)  # another place has its own revisions
    live = "Use the adapter live, with lora-dpo chat or serve."
    merged, skeleton = _open_base(name, revision, live if passport else "Name its 16-bit original with --model.")
    fingerprint = weight_fingerprint(str(merged.path))
    check_into(into, passport, adapter, name=name, form=merged.form, fingerprint=fingerprint)
    if passport:
        merged.differences += check_weights_of_base(
            passport, adapter, name=name, revision=revision, fingerprint=fingerprint
        )
        quantize = "none" if into == "base16" else merged.form.held if merged.form else "nf4"
        merged.differences += _check_tokenizer(passport, adapter, name, merged.path, quantize=quantize)
    check_fit(opened, skeleton, name)
    if passport is None:
        merged.differences.append(unverified(adapter, name, quantize="none" if into == "base16" else "nf4"))
    if config.dora and any(lora.embedding for lora in tensors.lora.values()):
        raise AdapterError(f"{adapter} cannot be merged: it uses DoRA on embeddings. Use it live.")
    merged._folder, merged._adapter, merged._lora = adapter, config, tensors.lora
    merged.chat_template_kwargs = opened.chat_template_kwargs
    stacked = targets_of(config, skeleton).items()
    merged._stacked = {target.name: (module, target) for module, target in stacked if target.experts > 1}
    merged._saved = {name: stored.name for name, stored in tensors.saved.items()}
    merged._files |= {name: (adapter / WEIGHTS, stored.name) for name, stored in tensors.copies.items()}
    merged._nf4 = into == "trained-base" and merged.form is None
    merged._dtype = passport.dtype if passport and into == "trained-base" else None
    _untie(merged, skeleton)
    return merged


def plan_base(model: str, revision: str | None = None, *, into: Into = "base16") -> Merged:
    """A base without an adapter, in the same form.

    Args:
        into: "base16" as it is stored, or "trained-base": its NF4 values, for an adapter that was trained on them. One
            that is stored quantised has its own values, either way.

    Raises:
        ModelError: the base is not there, or is stored quantised in a form that is not read here.
    """
    merged, skeleton = _open_base(model, revision, "Name its 16-bit original instead.")
    merged._nf4 = into == "trained-base" and merged.form is None
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
    """The base's weights, unchanged, and its skeleton; `instead` is what to do with one in a form not read here."""
    from transformers import AutoConfig

    form = stored_form(str(files_of(name, revision, (CONFIG,))))
    if form is not None and form.kind not in (*BITSANDBYTES, "fp8"):
        raise ModelError(
            f"{name} is stored quantised ({plain(form.kind)}), in a form whose values are not read here, so it is "
            f"neither merged into nor exported. {instead}"
        )
    folder = files_of(name, revision, OF_A_MODEL)
    files = weight_files(str(folder))
    if not files:
        raise ModelError(f"{name} has no safetensors files. Name a copy that has them with --model.")
    if absent := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{name} is not whole: {len(absent)} of its {len(files)} files of weights are missing "
            f"({plain(absent[0])}). Download it again, or name a whole copy with --model."
        )
    skeleton = load_skeleton(str(folder))
    with model_errors(name):
        config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the result is not
    stored = {key: (file, key) for file in files for key in _keys(file)}
    places, pieces = _match(name, stored, skeleton)
    shapes = _shapes(places, pieces, stored if form is not None else {}, skeleton)
    merged = Merged(name, folder, config, shapes, places, form=form, _layers=orientations(skeleton, form))
    merged._pieces = pieces
    merged._stored = stored if form is not None else {}
    return merged, skeleton


def _shapes(
    places: Mapping[str, tuple[Path, str]],
    pieces: Collection[str],
    stored: Mapping[str, tuple[Path, str]],
    skeleton: Any,
) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, and that what a quantised one (of `stored`) stands for can be computed."""
    state = skeleton.state_dict()
    found = {}
    with OpenFiles() as files:
        for name, (file, key) in places.items():
            if stored:
                shape = stored_shape(
                    lambda one: files.looks(*stored[one]), lambda one: files.get(*stored[one]), key, stored
                )
            else:
                _, shape = files.looks(file, key)
            found[name] = shape if name in pieces else tuple(state[name].shape)
    return found


def _match(
    name: str, stored: dict[str, tuple[Path, str]], skeleton: Any
) -> tuple[dict[str, tuple[Path, str]], dict[str, Piece]]:
    """The model's parameter names, or those of pieces that they are stored in, with the place of each in the files."""
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
    pieces: dict[str, Piece] = {}
    if missing:
        names, pieces = renamed(stored, skeleton)
        names = names if pieces else {}  # a class that only renames its weights was never tried
        places |= {key: stored[names[key]] for key in missing if key in names}
        places |= {key: stored[key] for key in pieces}
        there = {piece.parameter for piece in pieces.values()} | names.keys()
        missing = [key for key in missing if key not in there]
    if missing:
        raise ModelError(
            f"{name} stores its weights under other names than the model has ({plain(missing[0])} is not there): "
            "transformers renames or joins them when it loads them, so they are neither merged one by one nor "
            "exported. Use an adapter of it live, with lora-dpo chat or serve."
        )
    return places, pieces


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

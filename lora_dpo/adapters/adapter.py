"""One adapter folder, opened once: every check, listing, merge and export of it starts from this value."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.lora_config import WEIGHTS, AdapterConfig
from lora_dpo.adapters.parameter_lora import Target, targets_of
from lora_dpo.adapters.passport import PASSPORT, Passport, check_folder, parse_passport
from lora_dpo.adapters.peft_files import AdapterTensors, LoraModule, read_adapter
from lora_dpo.config.recipe import Quantize
from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.errors import AdapterError
from lora_dpo.files import sha256_of
from lora_dpo.model.tensor_file import State, state_of
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on the disk. Its weights are not held: `peft_files.weights` reads them."""

    folder: Path
    config: AdapterConfig
    tensors: AdapterTensors
    """By their header: names, shapes and dtypes."""
    passport: Passport | None
    """None for an adapter made by another tool."""

    @property
    def base(self) -> tuple[str | None, str | None]:
        """Name and revision of the base that it was made for, by its passport or PEFT config; None if none says."""
        if self.passport:
            return self.passport.base, self.passport.base_revision
        return self.config.base, self.config.revision

    @property
    def named_base(self) -> tuple[str, str | None]:
        """The same, of an adapter that has to say. Raises `AdapterError`."""
        name, revision = self.base
        if not name:
            raise AdapterError(f"{self.folder} does not say what base it was made for. Name it with --model.")
        return name, revision

    @property
    def quantize(self) -> Quantize:
        """How to load its base as it was trained on: as stored, or as the checkpoint is quantised and else in NF4.

        Other quantised weights are not made here, so their 16-bit original is taken as it is.
        """
        return "auto" if self.passport is None or self.passport.quantize.startswith("nf4") else "none"

    @property
    def chat_template_kwargs(self) -> TemplateKwargs:
        """Keywords for the chat template that it was trained with; none if nothing says so."""
        return self.passport.chat_template_kwargs if self.passport is not None else NO_KWARGS


def open_adapter(folder: str | Path) -> Adapter:
    """Read and check what needs neither a base nor the weights' values: config, header, passport, its hash of them.

    Raises:
        AdapterError: no adapter there, or the first thing that is wrong, by name.
    """
    check_folder(Path(folder))
    return adapter_in(Path(folder))


def adapter_in(folder: Path) -> Adapter:
    """The same of a folder that has not its own name yet, since it is still being written or taken in."""
    passport = parse_passport(folder / PASSPORT) if (folder / PASSPORT).is_file() else None
    config, tensors = read_adapter(folder)
    _check_weights(passport, folder)
    return Adapter(folder, config, tensors, passport)


def check_fit(adapter: Adapter, model: torch.nn.Module, base: str) -> None:
    """Check names and shapes against a base model (or its skeleton). Raises `AdapterError` naming the tensor."""
    tensors = adapter.tensors
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    misfit = f"The adapter {adapter.folder} does not fit {base}:"
    stacked = targets_of(adapter.config, model)
    for name, lora in tensors.lora.items():
        if name in stacked:
            _check_stacked(misfit, name, lora, stacked[name])
            continue
        if lora.rank != (wanted_rank := adapter.config.ranks.of([name]).get(name, adapter.config.rank)):
            raise AdapterError(f"{misfit} {plain(name)} has rank {lora.rank}, but its config says {wanted_rank}.")
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


def _check_stacked(misfit: str, name: str, lora: LoraModule, target: Target) -> None:
    """Raise `AdapterError` unless the tensors of a stacked weight have a pair of matrices for each of its experts."""
    wanted, here = target.shapes, (lora.a.shape, lora.b.shape)
    if lora.embedding or lora.magnitude or here != wanted:
        raise AdapterError(
            f"{misfit} size mismatch in {plain(name)}, {list(here[0])} and {list(here[1])} here, {list(wanted[0])} and "
            f"{list(wanted[1])} for {plain(target.name)} there."
        )


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


def weights_sha256(folder: Path) -> str:
    """Hex SHA-256 of an adapter's weights, read again only where they changed. Raises `AdapterError`."""
    path = (folder / WEIGHTS).absolute()
    try:
        return _sha256(path, state_of(path))
    except OSError as error:  # removed or closed to us since it was looked at
        raise AdapterError(f"{folder / WEIGHTS} cannot be read ({plain(error)}).") from error


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, state: State) -> str:
    return sha256_of(path)


def _check_weights(passport: Passport | None, folder: Path) -> None:
    """Raise `AdapterError` if the weights were exchanged after the passport was written."""
    if passport and passport.adapter_sha256 and passport.adapter_sha256 != weights_sha256(folder):
        raise AdapterError(
            f"The weights in {folder} are not those of its passport (another SHA-256). Take the adapter from its "
            f"source again, or remove {PASSPORT} to use it unverified."
        )

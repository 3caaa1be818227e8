"""Layers below the lowest adapted one: the same function for policy and reference, so they run once.

The trunk runs without gradient; its output, `[S, E]` for a stream of S tokens, is kept per pair and given to
the top layers in every later pass over the pair, of the policy, of the reference, and in later epochs.

Exact for a recipe whose adapters are on the top layers only (`lora.layers: top-N`); what is traded is the
adapter's capacity, not the numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_dpo.engine.layout import Layout
from lora_dpo.model.tensor_file import read_tensors


def lowest_adapted_layer(model: Any) -> int:
    """Number of decoder layers below the first with an adapter or a trainable weight; 0 if the embedding has one."""
    layers = decoder_layers(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    last = getattr(model.base_model, "norm", None)  # called otherwise, it counts as if it came before the layers
    above = {id(parameter) for parameter in last.parameters()} if last is not None else set()
    if any(p.requires_grad and id(p) not in inside | above for p in model.parameters()):
        return 0
    for number, layer in enumerate(layers):
        adapted = any("lora_" in name for name, _ in layer.named_parameters())
        if adapted or any(parameter.requires_grad for parameter in layer.parameters()):
            return number
    return len(layers)


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers of a base model."""
    return model.base_model.layers


class TrunkCache:
    """Trunk outputs per pair, `[S, E]` each: in memory up to a limit, then in a folder if one is given."""

    def __init__(self, *, memory_bytes: int, folder: Path | None = None, disk_bytes: int = 0) -> None:
        self.memory_left, self.disk_left = memory_bytes, disk_bytes
        self.folder = folder
        self._held: dict[bytes, torch.Tensor] = {}
        self._stored: dict[bytes, Path] = {}

    def get(self, key: bytes) -> torch.Tensor | None:
        """The output noted for a pair, or None."""
        if key in self._stored:
            hidden_SE: torch.Tensor = read_tensors(self._stored[key])["hidden"]
            return hidden_SE
        return self._held.get(key)

    def close(self) -> None:
        """Forget everything, on the disk too: what is kept is of this run's trunk."""
        self._held.clear()
        for path in self._stored.values():
            path.unlink(missing_ok=True)
        self._stored.clear()
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def put(self, key: bytes, hidden_SE: torch.Tensor) -> None:
        """Note a pair's output if there is room."""
        size = hidden_SE.nbytes
        if key in self._held or key in self._stored:
            return
        if size <= self.memory_left:
            self._held[key] = hidden_SE.to("cpu", copy=True)
            self.memory_left -= size
        elif self.folder is not None and size <= self.disk_left:
            from safetensors.torch import save_file

            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{key.hex()}.safetensors"
            save_file({"hidden": hidden_SE.to("cpu").contiguous()}, path)
            self._stored[key] = path
            self.disk_left -= size


def trunk_hidden(
    model: Any,
    run: Callable[[Layout], torch.Tensor],
    layout: Layout,
    rows: Sequence[Sequence[int]],
    depth: int,
    cache: TrunkCache,
) -> torch.Tensor:
    """Hidden states `[S, E]` below layer `depth`, from the cache where every pair of the stream is in it.

    Args:
        run: runs the backbone over a layout.
        rows: the token ids of the stream's sequences, n chosen and then n rejected.
    """
    half = len(rows) // 2
    keys = [_pair_key(rows[index], rows[half + index]) for index in range(half)]
    found = [cache.get(key) for key in keys]
    if all(part is not None for part in found):
        device = layout.ids_S.device
        return torch.cat([part.to(device) for part in found])  # type: ignore[union-attr]
    with torch.no_grad(), _only_below(model, depth) as taken:
        run(layout)
    (hidden_SE,) = taken
    for key, span in zip(keys, layout.spans, strict=True):
        cache.put(key, hidden_SE[span.start : span.end])
    return hidden_SE


@contextlib.contextmanager
def from_trunk(model: Any, depth: int, hidden_SE: torch.Tensor) -> Iterator[None]:
    """Inside the block the layers below `depth` are left out: layer `depth` is given `hidden_SE`."""
    layers = decoder_layers(model)
    stand_ins = [_Pass(layer, hidden_SE[None]) for layer in layers[:depth]]
    with replaced_layers(model, [*stand_ins, *layers[depth:]]):
        yield


@contextlib.contextmanager
def _only_below(model: Any, depth: int) -> Iterator[list[torch.Tensor]]:
    """Inside the block layers from `depth` on are left out; what layer `depth` would be given is noted."""
    layers = decoder_layers(model)
    taken: list[torch.Tensor] = []
    above = [_Pass(layers[depth], note=taken), *map(_Pass, layers[depth + 1 :])]
    with replaced_layers(model, [*layers[:depth], *above]):
        yield taken


@contextlib.contextmanager
def replaced_layers(model: Any, layers: list[torch.nn.Module]) -> Iterator[None]:
    """Inside the block a base model has these decoder layers."""
    own = decoder_layers(model)
    model.base_model.layers = torch.nn.ModuleList(layers)
    try:
        yield
    finally:
        model.base_model.layers = own


class StandIn(torch.nn.Module):
    """Stands for a decoder layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = layer  # not as a part of it

    def __getattr__(self, name: str) -> Any:
        """What a backbone asks of its layers, such as their kind, is that of the layer."""
        return getattr(self.__dict__["stands_for"], name)


class _Pass(StandIn):
    """Hands on what it is given, or `hidden` in its place."""

    def __init__(
        self, layer: torch.nn.Module, hidden: torch.Tensor | None = None, note: list[torch.Tensor] | None = None
    ) -> None:
        super().__init__(layer)
        self.hidden, self.note = hidden, note

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.note is not None:
            self.note.append(hidden_states[0])
        return hidden_states if self.hidden is None else self.hidden


def _pair_key(chosen: Sequence[int], rejected: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for row in (chosen, rejected):
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(torch.tensor(row, dtype=torch.int32).numpy().tobytes())
    return digest.digest()

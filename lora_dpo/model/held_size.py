"""How many bytes a base's weights take as they are held, and where they are held: counted on its structure alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_dpo.config.recipe import Stream
from lora_dpo.errors import ConfigError
from lora_dpo.model.device import free_bytes
from lora_dpo.model.quantised import quantised_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_dpo.model.stored_form import StoredForm

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of an NF4 weight: 4 bits, and of each block of 64 an 8-bit scale, of each 256 scales a float32."""

Streamed = Literal["off", "embeddings", "on"]
"""What visits the device: nothing, embeddings and head, or decoder layers as well."""


@dataclass(frozen=True)
class HeldSize:
    """Bytes of a base's frozen weights."""

    whole: int
    ends: int
    """Of these, embeddings and head."""
    layers: int
    """Of these, the decoder layers together."""
    layer: int
    """The largest of them."""

    def on_device(self, streamed: Streamed) -> int:
        """What lies on the device all the time, and of layers that visit the two that are there at once."""
        if streamed == "off":
            return self.whole
        return self.whole - self.ends - (self.layers - 2 * self.layer if streamed == "on" else 0)

    def at_home(self, streamed: Streamed) -> int:
        """What lies in main memory."""
        return {"off": 0, "embeddings": self.ends, "on": self.ends + self.layers}[streamed]


def held_size(model: Any, *, itemsize: int, packed: bool, form: StoredForm | None = None) -> HeldSize:
    """Bytes of the frozen weights as they are held: linear layers packed (in NF4, or as stored) or not, the rest never.

    Of scales, an 8-bit form has one a row: they are not counted. A form that does not say its bits is taken for 4.
    """
    linear = {id(part.weight) for part in quantised_layers(model, form).values()}
    each = NF4_BYTES if form is None or form.bits in (4, None) else form.bits / 8

    def size(parameters: Iterable[torch.nn.Parameter]) -> int:
        frozen = {id(one): one for one in parameters if not one.requires_grad}
        return int(sum(one.numel() * (each if packed and key in linear else itemsize) for key, one in frozen.items()))

    ends = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    layers = [size(layer.parameters()) for layer in getattr(model.base_model, "layers", ())]
    return HeldSize(size(model.parameters()), size(ends), sum(layers), max(layers, default=0))


def weight_bytes(model: Any, *, itemsize: int, packed: bool, form: StoredForm | None = None) -> int:
    """The same, of all of them together."""
    return held_size(model, itemsize=itemsize, packed=packed, form=form).whole


def streamed_for(
    stream: Stream,
    place: torch.device,
    skeleton: Callable[[], PreTrainedModel],
    compute: torch.dtype,
    form: StoredForm | None,
    *,
    packed: bool,
) -> Streamed:
    """Which weights of a base visit the device, by what a recipe asks for.

    Args:
        skeleton: gives its structure, if that is needed.

    Raises:
        ConfigError: none can visit this device.
    """
    if stream in ("embeddings", "on"):
        if place.type == "mps":
            raise ConfigError(f"model.stream is {stream}, which is for NVIDIA GPUs: leave it out.")
        return "on" if stream == "on" else "embeddings"
    if stream == "off" or place.type != "cuda":
        return "off"
    needed = weight_bytes(skeleton().requires_grad_(False), itemsize=compute.itemsize, packed=packed, form=form)
    return "on" if needed > free_bytes(place) else "off"

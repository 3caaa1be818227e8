"""Adapters while answers are written: a token at a time, where launching kernels is what takes the time.

Shape suffixes: M tokens (rows times positions), I inputs and O outputs of a linear layer, r rank.

peft computes x·Aᵀ·Bᵀ·s + y in the adapter's float32 and casts to and fro, twelve kernels a layer or so. Here
y += s·(x·Aᵀ)·Bᵀ is two, in the dtype that the base computes in, with copies of A and B if theirs is another one. The
adapter itself stays as it is: a copy lives as long as the answers that are being written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lora_dpo.model.plain_lora import plain_adapter

if TYPE_CHECKING:
    import torch


class AnsweringAdapter:
    """Short forward passes for a model's LoRA layers, as they are when it is made. No layer without an adapter has one.

    Args:
        model: a model, with an adapter on it or not; its weights must not change before its answers are written.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forwards: list[tuple[Any, Callable[..., Any]]] = []
        if not hasattr(model, "peft_config"):
            return
        from peft import PeftModel

        if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
            return
        name, usual = model.active_adapters[0], model.get_input_embeddings().weight.dtype
        for layer in model.modules():
            if plain_adapter(layer) == name and "forward" not in vars(layer):  # else somebody else's
                weight = layer.base_layer.weight  # the embeddings of an adapter that trains them whole are float32
                dtype = weight.dtype if weight.is_floating_point() else layer.base_layer.compute_dtype
                self._forwards.append((layer, _short_forward(layer, name, dtype or usual)))

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside the block the layers compute so. One pass long: between two of them the layers are peft's own."""
        for layer, forward in self._forwards:
            vars(layer)["forward"] = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)


def _short_forward(layer: Any, name: str, dtype: torch.dtype) -> Callable[..., Any]:
    import torch

    a_Ir = layer.lora_A[name].weight.detach().to(dtype).t()
    b_rO = layer.lora_B[name].weight.detach().to(dtype).t()
    own = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = not (args or kwargs) and plain_adapter(layer) == name
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype
        if not wanted or x.dtype != dtype or torch.is_grad_enabled() or casts:
            return own(x, *args, **kwargs)
        y = layer.base_layer(x)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]).mm(a_Ir), b_rO, alpha=layer.scaling[name])
        return y

    return forward

"""Whether a LoRA layer is the plain one, whose forward pass may be written in fewer operations than peft's."""

from __future__ import annotations

from typing import Any

KINDS = frozenset({"Linear", "Linear4bit", "Linear8bitLt"})
"""peft's LoRA layers whose forward pass is y + s·B·A·x; others (experts, embeddings, convolutions) keep their own."""


def is_lora(part: Any) -> bool:
    """Whether a module is a linear layer with LoRA on it, plain or not."""
    from peft.tuners.lora import LoraLayer

    return isinstance(part, LoraLayer) and type(part).__name__ in KINDS


def plain_adapter(layer: Any) -> str | None:
    """The name of the one active adapter that adds s·B·A·x to a frozen linear layer, and no more; else None.

    Not other kinds of adapter, dropout, a bias, several at once, one that is merged or switched off, nor where somebody
    else has given the base another forward pass.
    """
    import torch

    if not is_lora(layer) or layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    (name,) = active
    drops = layer.training and not isinstance(layer.lora_dropout[name], torch.nn.Identity)
    halves = (layer.lora_A[name], layer.lora_B[name])
    if drops or any(type(half) is not torch.nn.Linear or half.bias is not None for half in halves):
        return None
    return name if _is_frozen_linear(layer.base_layer) else None


def _is_frozen_linear(base: Any) -> bool:
    import torch

    linear = type(base) is torch.nn.Linear or type(base).__module__.startswith("bitsandbytes.")
    return linear and "forward" not in vars(base) and not any(weight.requires_grad for weight in base.parameters())

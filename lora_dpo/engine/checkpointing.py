"""Activation checkpointing of some layers, whose inputs wait on the card or in main memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_lowest(layers: Sequence[Any], count: int, *, offload: bool) -> None:
    """Checkpoint the `count` lowest layers: in the backward pass they come last, when the others are free again.

    Args:
        layers: transformers' decoder layers, which ask a function of their own to checkpoint them.
        offload: whether their inputs wait in main memory.
    """
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
        if offload:
            layer._gradient_checkpointing_func = checkpoint_on_host


def checkpoint_on_host(function: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
    """Run a layer without keeping anything but what it is given, and that in main memory; run it again for gradients.

    The gradient is that of `torch.utils.checkpoint`. Copies go through pinned memory where there is a GPU, and each
    layer waits for its own.

    Args:
        function: the layer's forward pass.
        hidden: what it is given first, `[1, S, E]`.
    """
    if not hidden.requires_grad:  # else a layer above frozen ones would have no backward pass
        hidden = hidden.detach().requires_grad_()
    with torch.autograd.graph.save_on_cpu(pin_memory=hidden.is_cuda):
        return checkpoint(function, hidden, *others, use_reentrant=True)

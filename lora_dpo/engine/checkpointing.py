"""Activation checkpointing of some layers, whose inputs wait on the card or in main memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_lowest(
    layers: Sequence[Any], count: int, *, offload: bool, before: Callable[[int], None] | None = None
) -> None:
    """Checkpoint the `count` lowest layers: in the backward pass they come last, when the others are free again.

    Args:
        layers: transformers' decoder layers, which ask a function of their own to checkpoint them.
        offload: whether their inputs wait in main memory.
        before: called with a layer's number, counted from 0 here, whenever it is run or run again.
    """
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
        if offload or before is not None:
            first = None if before is None else functools.partial(before, number)
            layer._gradient_checkpointing_func = functools.partial(_checkpoint, offload, first)


def checkpoint_on_host(function: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
    """Run a layer without keeping anything but what it is given, and that in main memory; run it again for gradients.

    The gradient is that of `torch.utils.checkpoint`. Copies go through pinned memory where there is a GPU, and each
    layer waits for its own.

    Args:
        function: the layer's forward pass.
        hidden: what it is given first, `[1, S, E]`.
    """
    return _checkpoint(True, None, function, hidden, *others)


def _checkpoint(
    offload: bool,
    before: Callable[[], None] | None,
    function: Callable[..., Any],
    hidden: torch.Tensor,
    *others: Any,
) -> Any:
    if not hidden.requires_grad:  # else a layer above frozen ones would have no backward pass
        hidden = hidden.detach().requires_grad_()

    def run(*given: Any) -> Any:
        if before is not None:
            before()
        return function(*given)

    place = torch.autograd.graph.save_on_cpu(pin_memory=hidden.is_cuda) if offload else contextlib.nullcontext()
    with place:
        return checkpoint(run, hidden, *others, use_reentrant=True)

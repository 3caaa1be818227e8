"""Recurrent layers on a stream of pairs: the prompt once, then each answer from the state that the prompt left.

Linear attention, state-space and short-convolution layers carry a state from token to token. On the flat stream it
would run from one answer into the next. So such a layer's own forward is called on a pair's prefix, and on each branch
with the state after the prefix in place of a cache. Nothing is written in place: gradients flow through the state into
the prefix.

Shape suffixes: B rows, S stream tokens, E hidden size.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from lora_dpo.engine.layout import Span

SEAM = frozenset({"get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state"})
"""What a recurrent layer asks of a cache in transformers."""
CACHES = ("cache_params", "past_key_values")
"""Under which keyword it is given one."""


class States:
    """The states of one layer after some tokens, in the form of transformers' `Cache`; nothing is written in place."""

    def __init__(self) -> None:
        self._conv: dict[int, torch.Tensor] = {}
        self._recurrent: dict[int, torch.Tensor] = {}

    def branch(self) -> States:
        """States that begin as these do."""
        twin = States()
        twin._conv, twin._recurrent = dict(self._conv), dict(self._recurrent)
        return twin

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last columns `[B, E, K]` of a convolution's input; None before the first tokens."""
        return self._conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state of a recurrence, of a shape of the layer's own; None before the first tokens."""
        return self._recurrent.get(state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append columns `[B, E, T]`; returns them after what was kept, and keeps the last `conv_kernel_size`."""
        before = self._conv.get(state_idx)
        if before is None:
            width = conv_kernel_size or conv_states.shape[-1]
            whole = torch.nn.functional.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        else:
            width = before.shape[-1]
            whole = torch.cat([before, conv_states], dim=-1)
        self._conv[state_idx] = whole[..., -width:]
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Keep a recurrence's state; returns it."""
        self._recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there were tokens before."""
        return bool(self._conv or self._recurrent)

    def is_recording_past(self, layer_idx: int | None = None) -> bool:
        """Yes: a layer then calls `update_conv_state` for a single token too, in place of writing over its state."""
        return True


def recurrent_layers(layers: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The modules of decoder layers that keep a state from token to token."""
    return [module for layer in layers for module in layer.modules() if _cache_of(module) is not None]


_forked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Modules that have another forward now: without any, which is usual, no model is searched for them at each token."""


def fork(layers: Sequence[torch.nn.Module], spans: Sequence[Span]) -> None:
    """Let recurrent layers run on the stream of these pairs, until `join`."""
    for module in recurrent_layers(layers):
        _own_forward(module)
        module.forward = _Forked(module, spans)
        _forked.add(module)


def join(layers: Sequence[torch.nn.Module]) -> None:
    """Give recurrent layers their own forward back."""
    for module in recurrent_layers(layers) if _forked else ():
        _own_forward(module)


def _own_forward(module: torch.nn.Module) -> None:
    forked = vars(module).get("forward")
    if isinstance(forked, _Forked):
        _forked.discard(module)
        del module.forward
        if forked.was_set:
            module.forward = forked.plain


class _Forked:
    """A recurrent layer's forward over a stream of pairs."""

    def __init__(self, module: torch.nn.Module, spans: Sequence[Span]) -> None:
        self.plain, self.was_set = module.forward, "forward" in vars(module)
        """Its own forward, and whether that was put into this instance (as accelerate does to move weights)."""
        self.spans = spans
        self.cache = str(_cache_of(module))

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`[1, S, E]` to `[1, S, E]`."""
        own = {name: value for name, value in kwargs.items() if name not in (*CACHES, "attention_mask")}
        done = []
        for span in self.spans:
            states = States()
            if span.prefix > span.start:
                done.append(self.plain(hidden_states[:, span.start : span.prefix], **{self.cache: states}, **own))
            for begin, end in ((span.prefix, span.chosen), (span.chosen, span.end)):
                if end > begin:
                    done.append(self._after(hidden_states[:, begin:end], states.branch(), own))
        return torch.cat(done, dim=1)

    def _after(self, part_1TE: torch.Tensor, states: States, own: dict[str, Any]) -> torch.Tensor:
        # A layer takes a single token after a state for a step of decoding, which writes the state in place:
        # a second token, whose output is dropped, makes it a part of a text.
        alone = part_1TE.shape[1] == 1 and states.has_previous_state()
        given = torch.cat([part_1TE, torch.zeros_like(part_1TE)], dim=1) if alone else part_1TE
        out: torch.Tensor = self.plain(given, **{self.cache: states}, **own)
        return out[:, : part_1TE.shape[1]]


def _cache_of(module: torch.nn.Module) -> str | None:
    kind: Any = type(module)
    return _cache_keyword(kind)


@functools.cache
def _cache_keyword(kind: Any) -> str | None:
    """Under which keyword a class of modules is given the cache whose states it reads; None if it reads none."""
    methods = (inspect.unwrap(one) for base in kind.__mro__ for one in vars(base).values() if inspect.isfunction(one))
    if not any(SEAM & set(method.__code__.co_names) for method in methods):
        return None
    known = inspect.signature(kind.forward).parameters
    return next((name for name in CACHES if name in known), None)

"""Each layer on all pairs of a stream, some pairs after the other, before the next layer: weights that visit come once.

Shape suffixes: S tokens of the stream, E hidden width.

A layer mixes the tokens of a pair and of no two pairs, so it may run on any whole pairs alone. Each such segment is
checkpointed by itself, and autograd takes them back latest first: those of one layer before any of the layer below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_dpo.engine.attention import PLAN, StreamPlan
from lora_dpo.engine.layout import Span
from lora_dpo.engine.trunk_cache import StandIn, decoder_layers, replaced_layers


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some whole pairs that follow each other: tokens `start:end` of the stream."""

    start: int
    end: int
    plan: StreamPlan

    def of(self, value: Any, tokens: int) -> Any:
        """A part of what a layer is given: of each tensor `[1, S, …]` the segment's tokens, of others the whole."""
        if isinstance(value, tuple):
            return tuple(self.of(one, tokens) for one in value)
        if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (1, tokens):
            return value[:, self.start : self.end]
        return value


def segments_of(spans: Sequence[Span], most: int) -> list[Segment]:
    """The pairs of a stream in segments of at most `most` tokens; a longer pair has one of its own."""
    groups: list[list[Span]] = []
    for span in spans:
        if not groups or span.end - groups[-1][0].start > most:
            groups.append([])
        groups[-1].append(span)
    return [_segment(group) for group in groups]


def _segment(spans: Sequence[Span]) -> Segment:
    first = spans[0].start
    moved = [Span(*(place - first for place in dataclasses.astuple(span))) for span in spans]
    return Segment(first, spans[-1].end, StreamPlan(moved))


@contextmanager
def in_segments(model: Any, spans: Sequence[Span], most: int) -> Iterator[None]:
    """Inside the block the layers of a base model run on segments of the stream of these pairs."""
    segments = segments_of(spans, most)
    if len(segments) == 1:
        yield
        return
    layers: list[torch.nn.Module] = [
        one if isinstance(one, StandIn) else _InSegments(one, segments) for one in decoder_layers(model)
    ]
    with replaced_layers(model, layers):
        yield


class _InSegments(StandIn):
    """Runs a layer on one segment after the other."""

    def __init__(self, layer: torch.nn.Module, segments: Sequence[Segment]) -> None:
        super().__init__(layer)
        self.segments = segments

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = hidden_states.shape[1]
        # split, not sliced: its backward pass is one concatenation
        given = torch.split(hidden_states, [segment.end - segment.start for segment in self.segments], dim=1)
        done = []
        for segment, hidden in zip(self.segments, given, strict=True):
            own = {name: segment.of(value, tokens) for name, value in kwargs.items()}
            own[PLAN] = segment.plan
            done.append(self.stands_for(hidden, *segment.of(args, tokens), **own))
        return torch.cat(done, dim=1)

"""Attention over a flat stream of pairs: no mask over the whole stream is ever built.

Shape suffixes: H query heads, K key-value heads, G queries a key head (H = K·G), S stream tokens, D head width.

Per pair: the prefix sees itself causally; each branch sees the prefix and, causally, itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lora_dpo.engine.layout import Span

NAME = "lora_dpo_shared_prefix"
PLAN = "lora_dpo_plan"
"""Name of the keyword that carries the plan through the backbone to the attention layers."""


class StreamPlan:
    """Where the pairs of a stream lie, and what of that all layers share: masks, and places of keys."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self._masks: dict[tuple[int, int, int | None, torch.dtype], torch.Tensor] = {}
        self._seen: torch.Tensor | None = None

    def seen(self, device: torch.device) -> torch.Tensor:
        """`[T]`: of each pair in turn the places that its prefix and chosen branch see, then those of its rejected one.

        A prefix is in it twice, so its gradient is a sum of two terms, the same in whatever order they come.
        """
        if self._seen is None:
            places = [place for span in self.spans for place in span.seen]
            self._seen = torch.tensor(places, dtype=torch.long).to(device)
        return self._seen

    def mask(self, queries: int, before: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """`[Q, before + Q]`: 0 where a query sees, -inf where not, in the dtype and on the device of `like`."""
        key = (queries, before, window, like.dtype)
        if key not in self._masks:
            # Rows a multiple of 8 apart: others are copied by CUDA's memory-efficient attention in every layer.
            wide = -(-(before + queries) // 8) * 8
            sees_QT = torch.ones(queries, wide, dtype=torch.bool, device=like.device).tril(before)
            if window is not None:
                sees_QT = sees_QT.triu(before - window + 1)
            blank_QT = torch.zeros(sees_QT.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = blank_QT.masked_fill(~sees_QT, float("-inf"))[:, : before + queries]
        return self._masks[key]


def pair_attention(
    query_HSD: torch.Tensor,
    key_KSD: torch.Tensor,
    value_KSD: torch.Tensor,
    plan: StreamPlan,
    scale: float | None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every pair on its own.

    Args:
        query_HSD: `[H, S, D]`; keys and values are `[K, S, D]`, each shared by H / K query heads.
        window: how many tokens back a layer sees, itself included (sliding-window attention).
        softcap: bound c of the scores, c·tanh(score / c) (Gemma 2).
        sink_H: `[H]`, the score of a token that every query sees and that has no value (gpt-oss).

    Returns:
        `[S, H, D]`.
    """
    groups = query_HSD.shape[0] // key_KSD.shape[0]
    query_KGSD = query_HSD.view(-1, groups, *query_HSD.shape[1:])
    sink_KG = None if sink_H is None else sink_H.view(-1, groups)
    # Split, not sliced: the backward pass of a split is one concatenation, of a slice a stream of zeros to be added up.
    queries = torch.split(query_KGSD, [size for span in plan.spans for size in span.queries], dim=2)
    seen_T = plan.seen(key_KSD.device)
    lengths = [size for span in plan.spans for size in span.keys]
    keys, values = (torch.split(part.index_select(1, seen_T), lengths, dim=1) for part in (key_KSD, value_KSD))
    before = [known for span in plan.spans for known in (0, span.prefix - span.start)]
    done = [
        _attend(
            query, _for_groups(key, groups), _for_groups(value, groups), known, plan, scale, window, softcap, sink_KG
        )
        for query, key, value, known in zip(queries, keys, values, before, strict=True)
        if query.shape[2]
    ]
    return torch.cat([part.permute(2, 0, 1, 3).flatten(1, 2) for part in done])


def _for_groups(part_KTD: torch.Tensor, groups: int) -> torch.Tensor:
    """`[K, G, T, D]` without a copy: one key head serves G query heads, on an axis of stride 0."""
    return part_KTD.unsqueeze(1).expand(-1, groups, -1, -1)


def _attend(
    query_KGQD: torch.Tensor,
    key_KGTD: torch.Tensor,
    value_KGTD: torch.Tensor,
    before: int,
    plan: StreamPlan,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sink_KG: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of Q queries that follow the first `before` of T = before + Q keys; `[K, G, Q, D]`."""
    queries, keys = query_KGQD.shape[2], key_KGTD.shape[2]
    if window is not None and keys <= window:
        window = None
    if softcap is None and window is None and sink_KG is None and before == 0:
        return scaled_dot_product_attention(query_KGQD, key_KGTD, value_KGTD, is_causal=True, scale=scale)
    if softcap is None and window is None and sink_KG is None and is_fused_lower_right(query_KGQD.device):
        return lower_right(query_KGQD, key_KGTD, value_KGTD, scale)
    mask_QT = plan.mask(queries, before, window, query_KGQD)
    if softcap is None and sink_KG is None:
        return scaled_dot_product_attention(query_KGQD, key_KGTD, value_KGTD, attn_mask=mask_QT, scale=scale)
    scores = query_KGQD @ key_KGTD.transpose(2, 3) * (query_KGQD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask_QT
    if sink_KG is not None:
        # no rounding of a float32 sink to 16 bits: the wider type of the two is taken
        scores = torch.cat([scores, sink_KG[..., None, None].expand(-1, -1, queries, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value_KGTD.dtype)
    return weights[..., :keys] @ value_KGTD


def is_fused_lower_right(device: torch.device) -> bool:
    """Whether fused kernels there can do causal attention of the last Q of T tokens without a mask."""
    return device.type == "cuda"


def lower_right(
    query_KGQD: torch.Tensor, key_KGTD: torch.Tensor, value_KGTD: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of the last Q of T tokens by CUDA's fused kernels, which need no mask; `[K, G, Q, D]`.

    A mask would turn flash attention off, and be padded and copied in every layer.
    """
    bias = causal_lower_right(query_KGQD.shape[2], key_KGTD.shape[2])
    return scaled_dot_product_attention(query_KGQD, key_KGTD, value_KGTD, attn_mask=bias, scale=scale)


def _interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer, with `[1, heads, S, D]` tensors; returns `[1, S, H, D]`."""
    plan = kwargs.get(PLAN)
    if not isinstance(plan, StreamPlan) or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError("shared-prefix attention was called without its plan")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Queries and keys come out of RoPE in float32. Left to autocast, every slice of every pair is cast by itself,
        # and the expanded keys are written out once for each query head.
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    out = pair_attention(query[0], key[0], value[0], plan, scaling, window=window, softcap=softcap, sink_H=sinks)  # type: ignore[arg-type]
    return out[None], None


# A new name beside transformers' own: nothing of anyone else's is replaced.
AttentionInterface.register(NAME, _interface)

"""Attention over a flat stream of pairs: no mask over the whole stream is ever built.

Shape suffixes: H query heads, K key-value heads, S stream tokens, D head width.

Per pair: the prefix sees itself causally; each branch sees the prefix and, causally, itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lora_dpo.shared_prefix.layout import Span

NAME = "lora_dpo_shared_prefix"
SPANS = "lora_dpo_spans"
"""Name of the keyword that carries the spans through the backbone to the attention layers."""


def pair_attention(
    query_HSD: torch.Tensor, key_KSD: torch.Tensor, value_KSD: torch.Tensor, spans: Sequence[Span], scale: float | None
) -> torch.Tensor:
    """Attention of every pair on its own. `[H, S, D]` queries, `[K, S, D]` keys and values → `[H, S, D]`."""
    groups = query_HSD.shape[0] // key_KSD.shape[0]
    key_HSD, value_HSD = (part.repeat_interleave(groups, dim=0) for part in (key_KSD, value_KSD))
    done = []
    for span in spans:
        first = slice(span.start, span.chosen)  # prefix and chosen branch lie in order: plain causal attention
        if span.chosen > span.start:
            query, key, value = (part[None, :, first] for part in (query_HSD, key_HSD, value_HSD))
            done.append(scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[0])
        own = slice(span.chosen, span.end)
        if span.end > span.chosen:
            keys, values = (
                torch.cat([part[:, span.start : span.prefix], part[:, own]], dim=1) for part in (key_HSD, value_HSD)
            )
            rejected, prefix = span.end - span.chosen, span.prefix - span.start
            sees = torch.ones(rejected, prefix + rejected, dtype=torch.bool, device=keys.device).tril(prefix)
            done.append(
                scaled_dot_product_attention(
                    query_HSD[None, :, own], keys[None], values[None], attn_mask=sees, scale=scale
                )[0]
            )
    return torch.cat(done, dim=1)


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
    spans = kwargs.get(SPANS)
    if spans is None or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError("shared-prefix attention was called without its spans")
    out = pair_attention(query[0], key[0], value[0], spans, scaling)  # type: ignore[arg-type]
    return out.transpose(0, 1)[None].contiguous(), None


# A new name beside transformers' own: nothing of anyone else's is replaced.
AttentionInterface.register(NAME, _interface)

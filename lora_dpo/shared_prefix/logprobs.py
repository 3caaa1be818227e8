"""Hidden states of the stream to per-token values of every row.

Shape suffixes: S stream tokens, E hidden width, L labelled tokens, R rows, T columns, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_dpo.shared_prefix.layout import Layout

CHUNK = 512
"""Tokens projected to the vocabulary at once."""


def to_rows(value_L: torch.Tensor, source_RT: torch.Tensor) -> torch.Tensor:
    """Spread values of labelled tokens to `[R, T-1]` tables; 0 where there is no label.

    A token in a shared prefix is read by both rows of its pair: its gradient is the sum of theirs.
    """
    padded = torch.cat([value_L, value_L.new_zeros(1)])
    return padded[source_RT]


def label_logprobs(hidden_SE: torch.Tensor, layout: Layout, head: Any, *, scale: float = 1.0) -> torch.Tensor:
    """Log-probability of each labelled token, `[L]`, in float32; only predictors of labels are projected."""
    predicting_LE = hidden_SE[layout.predictor_L]
    parts = []
    for start in range(0, len(predicting_LE), CHUNK):
        logits_cV = head(predicting_LE[start : start + CHUNK]).float() * scale
        picked_c = logits_cV.gather(1, layout.label_L[start : start + CHUNK, None]).squeeze(1)
        parts.append(picked_c - torch.logsumexp(logits_cV, dim=-1))
    return torch.cat(parts) if parts else hidden_SE.new_zeros(0, dtype=torch.float32)

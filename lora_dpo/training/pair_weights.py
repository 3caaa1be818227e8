"""Pairs that count more or less: a collator that hands on their weights, and a gradient scaled by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class ScaledGradient(torch.autograd.Function):
    """The same values; the gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Pass `values` on."""
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scale the gradient."""
        return slope * ctx.factor, None


class WithWeights:
    """A collator that also hands on the rows' `pair_weight`, `[B]`, where they have one."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of the rows, and their weights."""
        batch: dict[str, Any] = self.collator(rows)
        if "pair_weight" in rows[0]:
            batch["pair_weight"] = torch.tensor([row["pair_weight"] for row in rows], dtype=torch.float32)
        return batch

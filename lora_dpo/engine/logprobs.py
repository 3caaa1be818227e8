"""Hidden states of the stream to per-token values of every row.

Shape suffixes: S stream tokens, E hidden width, L labelled tokens, R rows, T columns, V vocabulary.

log p(y) = z_y - log Σ_v exp z_v,  z = scale·W·h,  so  ∂ log p(y) / ∂h = scale·(W_y - Σ_v p_v·W_v).
That gradient does not depend on what comes after, so the forward pass makes it while it has the softmax:
`[L, E]` numbers are kept for the backward pass, never `[L, V]`, and no product is computed twice.

A head that lives in main memory comes in chunks of c rows, twice: once for Σ exp z, by the largest logit so far
(online; Milakov & Gimelshein 2018, arXiv 1805.02867), and once more for the gradient, whose logits are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_dpo.engine.products import product

TILE = 1 << 25
"""Logits in memory at once: 134 MB in float32."""

HEAD_TILE = 1 << 24
"""The same of a head that comes in chunks: a chunk is on the device beside them, and the next one too."""
LEAST_ROWS = 256
"""Of a chunk: products with fewer are slow."""

EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL logs or weights with beside log-probabilities; each costs passes over the whole vocabulary."""


class HeadValues(NamedTuple):
    """Values of L labelled tokens, each `[L]` and float32 but `is_top1` (bool); None where not asked for.

    Only `log_probs` carries a gradient.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    log_sum_sq_probs: torch.Tensor | None
    mean_logits: torch.Tensor | None
    is_top1: torch.Tensor | None


def head_values(
    hidden_LE: torch.Tensor,
    weight_VE: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_L: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    extras: tuple[str, ...] = (),
) -> HeadValues:
    """Log-probabilities of labels under a frozen output head, and the named `extras`.

    Args:
        scale: what the logits are multiplied by.
        softcap: bound c of the logits, c·tanh(logit / c) (Gemma 2), after the scale.
        extras: of `EXTRAS`.
    """
    values = _HeadValues.apply(hidden_LE, weight_VE, bias_V, label_L, scale, softcap, extras)  # type: ignore[no-untyped-call]
    return HeadValues(*values)


Chunks = Callable[[int], Iterator[tuple[int, torch.Tensor]]]
"""Gives a head's weight in chunks of at most so many rows: the number of the first row, and `[c, E]`."""


def rows_at_once(labels: int) -> int:
    """Rows of a head that come at once, for so many labelled tokens."""
    return max(LEAST_ROWS, HEAD_TILE // max(1, labels))


def chunked_head_values(
    hidden_LE: torch.Tensor,
    chunks: Chunks,
    bias_V: torch.Tensor | None,
    label_L: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    extras: tuple[str, ...] = (),
) -> HeadValues:
    """As `head_values`, of a head that comes chunk by chunk: once, and once more where a gradient is wanted."""
    head = _Chunked(chunks, bias_V, label_L, scale, softcap, rows_at_once(len(label_L)))
    values = _ChunkedHeadValues.apply(hidden_LE, head, extras)  # type: ignore[no-untyped-call]
    return HeadValues(*values)


class _ChunkedHeadValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_LE, head, extras):  # type: ignore[no-untyped-def]
        kind = hidden_LE.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_LE.dtype
        wanted = ctx.needs_input_grad[0]
        ctx.hidden_dtype = hidden_LE.dtype
        with torch.autocast(kind, enabled=False):
            inside_LE = hidden_LE.to(compute)
            sums = head.sums(inside_LE, extras)
            if wanted:
                ctx.save_for_backward(head.slope(inside_LE, sums))
        found = sums.values(extras)
        result = tuple(found.get(name) for name in ("log_probs", *EXTRAS))
        ctx.mark_non_differentiable(*(value for value in result[1:] if value is not None))
        return result

    @staticmethod
    def backward(ctx: Any, grad_L: torch.Tensor, *_: Any):  # type: ignore[no-untyped-def]
        (slope_LE,) = ctx.saved_tensors
        return (grad_L[:, None] * slope_LE).to(ctx.hidden_dtype), None, None


class _Sums:
    """What is known of the logits z of L tokens after some chunks of the vocabulary."""

    def __init__(self, label_L: torch.Tensor) -> None:
        self.label_L, self.columns = label_L, 0
        self.picked_L = torch.zeros(label_L.shape, device=label_L.device)
        self.top_L = torch.full_like(self.picked_L, -torch.inf)
        self.first_L = torch.zeros_like(label_L)
        """Where the largest one is."""
        self.sum_L, self.moment_L, self.square_L, self.plain_L = (torch.zeros_like(self.picked_L) for _ in range(4))
        """Σ exp(z - top), Σ (z - top)·exp(z - top), Σ exp(z - top)², Σ z."""

    def add(self, start: int, logits_Lc: torch.Tensor, extras: tuple[str, ...]) -> None:
        """Take in the logits of a chunk, which are used up."""
        place_L, inside_L = place_in(self.label_L, start, logits_Lc.shape[1])
        self.picked_L = torch.where(inside_L, logits_Lc.gather(1, place_L[:, None]).squeeze(1), self.picked_L)
        self.columns += logits_Lc.shape[1]
        if "mean_logits" in extras:
            self.plain_L += logits_Lc.sum(dim=-1)
        highest_L, at_L = logits_Lc.max(dim=-1)
        self.first_L = torch.where(highest_L > self.top_L, at_L + start, self.first_L)
        top_L = torch.maximum(self.top_L, highest_L)
        fall_L = self.top_L - top_L
        shrunk_L = fall_L.exp()
        # before the first chunk the fall is infinite, and 0·∞ no number
        fallen_L = torch.where(self.sum_L > 0, self.sum_L * fall_L, 0.0)
        self.moment_L = (self.moment_L + fallen_L) * shrunk_L
        self.sum_L, self.square_L, self.top_L = self.sum_L * shrunk_L, self.square_L * shrunk_L**2, top_L
        shifted_Lc = logits_Lc.sub_(top_L[:, None])
        exp_Lc = torch.exp(shifted_Lc) if "entropy" in extras else shifted_Lc.exp_()
        self.sum_L += exp_Lc.sum(dim=-1)
        if "entropy" in extras:
            self.moment_L += shifted_Lc.mul_(exp_Lc).sum(dim=-1)
        if "log_sum_sq_probs" in extras:
            self.square_L += exp_Lc.square_().sum(dim=-1)

    def values(self, extras: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """What was asked for, `[L]` each, when all chunks were there."""
        log_L = self.sum_L.log()
        found = {
            "log_probs": self.picked_L - self.top_L - log_L,
            "entropy": log_L - self.moment_L / self.sum_L,  # log Z - Σ p·z
            "log_sum_sq_probs": self.square_L.log() - 2 * log_L,
            "mean_logits": self.plain_L / self.columns,
            "is_top1": self.first_L == self.label_L,
        }
        return {name: value for name, value in found.items() if name in ("log_probs", *extras)}


@dataclass(frozen=True)
class _Chunked:
    """A head that comes in chunks, and the labels of L tokens."""

    chunks: Chunks
    bias_V: torch.Tensor | None
    label_L: torch.Tensor
    scale: float
    softcap: float | None
    rows: int

    def sums(self, hidden_LE: torch.Tensor, extras: tuple[str, ...]) -> _Sums:
        """What the values are made of."""
        sums = _Sums(self.label_L)
        for start, weight_cE in self.chunks(self.rows):
            sums.add(start, self._logits(hidden_LE, start, weight_cE.to(hidden_LE.dtype)), extras)
        return sums

    def slope(self, hidden_LE: torch.Tensor, sums: _Sums) -> torch.Tensor:
        """∂ log p / ∂h `[L, E]` in float32; rounded where `_tile` rounds."""
        slope_LE = torch.zeros(hidden_LE.shape, device=hidden_LE.device)
        for start, weight_cE in self.chunks(self.rows):
            weight_cE = weight_cE.to(hidden_LE.dtype)
            logits_Lc = self._logits(hidden_LE, start, weight_cE)
            bend_Lc = None if self.softcap is None else 1 - (logits_Lc / self.softcap).square_()
            part_Lc = logits_Lc.sub_(sums.top_L[:, None]).exp_().div_(sums.sum_L[:, None]).neg_()
            place_L, inside_L = place_in(self.label_L, start, part_Lc.shape[1])
            part_Lc.scatter_add_(1, place_L[:, None], inside_L.to(part_Lc.dtype)[:, None])
            if bend_Lc is not None:
                part_Lc = part_Lc.mul_(bend_Lc)
            slope_LE += product(part_Lc.to(weight_cE.dtype), weight_cE, torch.float32)
        return slope_LE.mul_(self.scale)

    def _logits(self, hidden_LE: torch.Tensor, start: int, weight_cE: torch.Tensor) -> torch.Tensor:
        logits_Lc = product(hidden_LE, weight_cE.t(), torch.float32)
        if self.bias_V is not None:
            logits_Lc += self.bias_V[start : start + len(weight_cE)]
        if self.scale != 1.0:
            logits_Lc *= self.scale
        return logits_Lc if self.softcap is None else logits_Lc.div_(self.softcap).tanh_().mul_(self.softcap)


def place_in(label_L: torch.Tensor, start: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where labels lie in a chunk of the vocabulary, 0 for those that do not, and whether they do."""
    place_L = label_L - start
    inside_L = (place_L >= 0) & (place_L < columns)
    return torch.where(inside_L, place_L, 0), inside_L


class _HeadValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_LE, weight_VE, bias_V, label_L, scale, softcap, extras):  # type: ignore[no-untyped-def]
        kind = hidden_LE.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_LE.dtype
        size = max(1, TILE // weight_VE.shape[0])
        weight_VE = weight_VE.to(compute)
        wanted = ctx.needs_input_grad[0]
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("log_probs", *extras)}
        slopes = []
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden_LE), size):
                hidden_cE, label_c = hidden_LE[start : start + size].to(compute), label_L[start : start + size]
                values, slope_cE = _tile(hidden_cE, weight_VE, bias_V, label_c, scale, softcap, extras, wanted)
                slopes.append(slope_cE)
                for name, value in values.items():
                    columns[name].append(value)
        ctx.hidden_dtype = hidden_LE.dtype
        if wanted:
            ctx.save_for_backward(torch.cat(slopes) if slopes else hidden_LE.float())
        found = {
            name: torch.cat(parts) if parts else hidden_LE.new_zeros(0, dtype=torch.float32)
            for name, parts in columns.items()
        }
        result = tuple(found.get(name) for name in ("log_probs", *EXTRAS))
        ctx.mark_non_differentiable(*(value for value in result[1:] if value is not None))
        return result

    @staticmethod
    def backward(ctx: Any, grad_L: torch.Tensor, *_: Any):  # type: ignore[no-untyped-def]
        (slope_LE,) = ctx.saved_tensors
        return (grad_L[:, None] * slope_LE).to(ctx.hidden_dtype), None, None, None, None, None, None


def _tile(
    hidden_cE: torch.Tensor,
    weight_VE: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_c: torch.Tensor,
    scale: float,
    softcap: float | None,
    extras: tuple[str, ...],
    slope: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Values of c tokens and, if asked for, ∂ log p / ∂h `[c, E]` in float32. The tile is used up in place."""
    logits_cV = product(hidden_cE, weight_VE.t(), torch.float32)
    if bias_V is not None:
        logits_cV += bias_V
    if scale != 1.0:
        logits_cV *= scale
    bend_cV = None
    if softcap is not None:
        bent_cV = torch.tanh(logits_cV / softcap)
        bend_cV = 1 - bent_cV * bent_cV if slope else None  # ∂z/∂logit
        logits_cV = bent_cV.mul_(softcap)
    label_c1 = label_c[:, None]
    picked_c = logits_cV.gather(1, label_c1).squeeze(1)
    top_c = logits_cV.amax(dim=-1)
    values = {}
    if "mean_logits" in extras:
        values["mean_logits"] = logits_cV.mean(dim=-1)
    if "is_top1" in extras:
        values["is_top1"] = logits_cV.argmax(dim=-1) == label_c
    shifted_cV = logits_cV.sub_(top_c[:, None])
    exp_cV = torch.exp(shifted_cV) if "entropy" in extras else shifted_cV.exp_()
    sum_c = exp_cV.sum(dim=-1)
    values["log_probs"] = picked_c - top_c - torch.log(sum_c)
    if "entropy" in extras:  # log Z - Σ p·z
        values["entropy"] = torch.log(sum_c) - shifted_cV.mul_(exp_cV).sum(dim=-1) / sum_c
    if "log_sum_sq_probs" in extras:
        values["log_sum_sq_probs"] = torch.log(exp_cV.square().sum(dim=-1)) - 2 * torch.log(sum_c)
    if not slope:
        return values, hidden_cE[:0].float()
    # The products run in the compute dtype, so the softmax is scaled to [0, 1] before it is rounded to that. The 1 of
    # the label is taken off before, too: of a token that is nearly certain, rounding would lose the difference.
    slope_cV = exp_cV.div_(sum_c[:, None]).neg_().scatter_add_(1, label_c1, torch.ones_like(picked_c)[:, None])
    if bend_cV is not None:
        slope_cV = slope_cV.mul_(bend_cV)
    return values, product(slope_cV.to(weight_VE.dtype), weight_VE, torch.float32) * scale


def to_rows(value_L: torch.Tensor, source_RT: torch.Tensor) -> torch.Tensor:
    """Spread values of labelled tokens to `[R, T-1]` tables; 0 where there is no label.

    A token in a shared prefix is read by both rows of its pair: its gradient is the sum of theirs.
    """
    padded = torch.cat([value_L, value_L.new_zeros(1)])
    return padded[source_RT]

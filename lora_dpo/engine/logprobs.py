"""Hidden states of the stream to per-token values of every row.

Shape suffixes: S stream tokens, E hidden width, L labelled tokens, R rows, T columns, V vocabulary.

log p(y) = z_y - log Σ_v exp z_v,  z = scale·W·h,  so  ∂ log p(y) / ∂h = scale·(W_y - Σ_v p_v·W_v).
That gradient does not depend on what comes after, so the forward pass makes it while it has the softmax:
`[L, E]` numbers are kept for the backward pass, never `[L, V]`, and no product is computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lora_dpo.engine.products import product

TILE = 1 << 25
"""Logits in memory at once: 134 MB in float32."""

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

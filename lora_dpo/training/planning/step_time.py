"""How long a step takes: its FLOPs, at the speed that this machine shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_dpo.engine.cost_model import CostModel, PairShape
from lora_dpo.training.planning.memory_plan import (
    Choice,
    Costs,
    Machine,
    Memory,
)
from lora_dpo.training.planning.plan_values import Time, Tokens

if TYPE_CHECKING:
    import torch


def time_of(
    costs: Costs,
    cost: CostModel,
    choice: Choice,
    batches: Sequence[Sequence[PairShape]],
    memory: Memory,
    tokens: Tokens,
) -> Time:
    """Seconds of a run's parts, at the speed that this machine shows."""
    seen = [shape for pairs in batches for shape in pairs]
    known: dict[PairShape, float] = {}
    first = min(len(seen), len(costs.shapes))
    if costs.unsupported:  # whole rows, padded, and the reference in every step
        seen_apart = [branch for shape in seen for branch in shape.branches()]
        once = sum(cost.policy_flops(row) + cost.forward_flops(row) for row in seen_apart)
        flops = once * tokens.padded / tokens.unpadded
    else:
        flops = 0.0
        for number, shape in enumerate(seen):
            if shape not in known:
                known[shape] = step_flops(cost, shape, choice, checkpointed=memory.checkpointed)
            flops += known[shape]
            if number < first:  # the reference, once a pair
                flops += cost.forward_flops(shape, below=cost.depth == 0)
    rate = matmul_flops(costs.machine, cost) if costs.machine.here else None
    return Time(flops, flops / len(batches), rate, flops / rate if rate else None)


def step_flops(cost: CostModel, shape: PairShape, choice: Choice, *, checkpointed: int = 0) -> float:
    """FLOPs of the policy's passes over one pair in one optimiser step, without the reference's."""
    flops = 0.0
    for part in shape.branches() if choice.split_pairs else (shape,):
        flops += cost.policy_flops(part, checkpointed=checkpointed)
        if choice.split_pairs:  # the table of log-probabilities first, without gradients
            flops += cost.forward_flops(part)
    return flops


def matmul_flops(machine: Machine, cost: CostModel, *, seconds: float = 0.5) -> float:
    """FLOP/s of the model's widest product, `[256, E] · [E, I]`, in the compute dtype: the best of half a second."""
    import torch

    device = torch.device(machine.kind)
    dtype = getattr(torch, machine.dtype)
    rows = 4096 if machine.kind == "cuda" else 256
    left = torch.randn(rows, cost.hidden, device=device, dtype=dtype)
    right = torch.randn(cost.hidden, cost.widest, device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        start = _now(device)
        torch.mm(left, right)
        best = max(best, 2.0 * rows * cost.hidden * cost.widest / (_now(device) - start))
    return best


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

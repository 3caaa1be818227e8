"""How long the steps take, at the speed that this machine shows or that a named card's maker publishes.

On a card the products are about half of it. The rest moves tensors: norms, adapters, activations and their gradients,
`TRAFFIC_BYTES` for each token, layer and hidden number, counted on the engine's own passes (docs/decisions.md). And no
layer of a part is faster than its kernels are launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dpo.engine.cost_model import CostModel, PairShape
from lora_dpo.training.planning.memory_plan import (
    Choice,
    Costs,
    Machine,
    Memory,
)
from lora_dpo.training.planning.plan_values import Steps, Time, Tokens

if TYPE_CHECKING:
    import torch

PRODUCTS_SHARE, BANDWIDTH_SHARE = 0.6, 0.8
"""What is assumed of a card's published speeds. Together they come to 20 to 45% of its TFLOP/s for models of 3 to 8
billion parameters; QLoRA of others was measured at 19% (1.5B on an RTX 4060) and 35% (7B on an A100)."""

TRAFFIC_BYTES = 400
"""Bytes that a forward and backward pass of the policy reads and writes outside its products, for each token, layer and
number of the hidden state, in 16 bits: as counted on an 8B Llama (tests/training/test_step_time.py)."""

CARRIED_PER_SECOND = 12e9
"""Bytes/s from pinned main memory to a card: PCIe 4.0 on eight lanes, or 3.0 on sixteen; assumed, not measured."""

LAYER_SECONDS = 0.0013
"""Least that a layer of a part takes, forward and backward: some 190 kernels of 7 µs, launched one after the other."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine is."""

    flops: float
    """FLOP/s of products."""
    bandwidth: float | None
    """Bytes/s of all else; None where products are nearly all of it, as on a CPU."""
    layer_seconds: float


def speed_of(machine: Machine, cost: CostModel) -> Speed | None:
    """Measured on this machine, assumed of a card by name, else None: of AMD's cards nothing is assumed."""
    card = machine.card
    if card is not None and card.kind != "amd":
        return Speed(card.tflops * 1e12 * PRODUCTS_SHARE, card.bandwidth * 1e9 * BANDWIDTH_SHARE, LAYER_SECONDS)
    if not machine.here:
        return None
    products = matmul_flops(machine, cost)
    if machine.kind == "cpu":
        return Speed(products, None, 0.0)
    return Speed(products, copy_bandwidth(), LAYER_SECONDS)


def time_of(
    costs: Costs,
    cost: CostModel,
    choice: Choice,
    batches: Sequence[Sequence[PairShape]],
    memory: Memory,
    tokens: Tokens,
    steps: Steps,
) -> Time:
    """FLOPs of a run's steps, and their seconds where the speed is known."""
    seen = [shape for pairs in batches for shape in pairs]
    known: dict[PairShape, float] = {}
    once: dict[PairShape, float] = {shape: cost.policy_flops(shape) for shape in set(seen)}
    first = min(len(seen), len(costs.shapes))
    if costs.unsupported:  # whole rows, padded, and the reference in every step
        seen_apart = [branch for shape in seen for branch in shape.branches()]
        flops = sum(cost.policy_flops(row) + cost.forward_flops(row) for row in seen_apart)
        flops *= tokens.padded / tokens.unpadded
    else:
        flops = 0.0
        for number, shape in enumerate(seen):
            if shape not in known:
                known[shape] = step_flops(cost, shape, choice, checkpointed=memory.checkpointed)
            flops += known[shape]
            if number < first:  # the reference, once a pair
                flops += cost.forward_flops(shape, below=cost.depth == 0)
    speed = speed_of(costs.machine, cost)
    if speed is None:
        return Time(flops, flops / len(batches), None, None)
    seconds = flops / speed.flops
    if speed.bandwidth is not None:  # checkpointed layers and references move tensors as they cost FLOPs
        passes = flops / sum(once[shape] for shape in seen)
        seconds += passes * tokens.stream * TRAFFIC_BYTES * len(cost.layers) * cost.hidden / speed.bandwidth
    if costs.machine.kind == "cuda" and cost.streamed != "off":  # carried while others compute: the slower one counts
        references = min(1.0, len(costs.shapes) / len(seen))  # of all passes over pairs, the share that scores them
        carried = cost.carried_bytes(times=2) + references * cost.carried_bytes(times=1)
        seconds = max(seconds, steps.steps * steps.parts * carried / CARRIED_PER_SECOND)
    seconds = max(seconds, steps.steps * steps.parts * len(cost.layers) * speed.layer_seconds)
    published = costs.machine.card.tflops * 1e12 if costs.machine.card else None
    return Time(flops, flops / len(batches), flops / seconds, seconds, published)


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
    flops = 2.0 * rows * cost.hidden * cost.widest
    return flops / _fastest(lambda: torch.mm(left, right), device, seconds)


def copy_bandwidth(kind: str = "cuda", *, seconds: float = 0.2) -> float:
    """Bytes/s that a copy of 64 MB reads and writes."""
    import torch

    device = torch.device(kind)
    source = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _fastest(lambda: target.copy_(source), device, seconds)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time that `work` took, tried for so many seconds."""
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        start = _now(device)
        work()
        best = min(best, _now(device) - start)
    return best


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

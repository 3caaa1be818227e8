"""LoRA on stacked weights (PEFT's `target_parameters`), such as a mixture's experts: which tensors change what.

    W'[e] = W[e] + s·B[e]·A[e]     A: [r·experts, in], expert after expert; B: [out, r·experts], rank after rank

PEFT wraps a module once for each of its parameters, in their order: the tensors of the last are the module's own, those
of the others lie a `base_layer` deeper each. A matrix is one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.lora_config import AdapterConfig

if TYPE_CHECKING:
    import torch

BASE_LAYER = ".base_layer"


@dataclass(frozen=True)
class Target:
    """A parameter that an adapter changes."""

    name: str
    """As the base has it, such as `model.layers.0.mlp.experts.down_proj`."""
    experts: int
    into: int
    out: int
    turned: bool
    """Stored `[experts, in, out]`, in place of `[experts, out, in]`."""
    rank: int
    """Of an expert."""

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of A and B."""
        return (self.rank * self.experts, self.into), (self.out, self.rank * self.experts)


def targets_of(config: AdapterConfig, model: torch.nn.Module) -> dict[str, Target]:
    """The parameters that a config names, by the module under which PEFT stores their tensors.

    Args:
        model: the base, which may have adapters on it, or its skeleton.
    """
    found: dict[str, Target] = {}
    if not config.parameters:
        return found
    for name, module in model.named_modules():
        if BASE_LAYER in f".{name}" or ".lora_" in name:
            continue
        named = [parameter for parameter in _own(module) if _is_named(f"{name}.{parameter}", config.parameters)]
        for depth, parameter in enumerate(reversed(named)):
            found[name + BASE_LAYER * depth] = _target(config, f"{name}.{parameter}", _inner(module), parameter)
    return found


def _target(config: AdapterConfig, name: str, module: Any, parameter: str) -> Target:
    shape = tuple(getattr(module, parameter).shape)
    turned = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    experts, out, into = shape if len(shape) == 3 else (1, *shape)
    if turned:
        out, into = into, out
    return Target(name, experts, into, out, turned, config.ranks.of([name]).get(name, config.rank))


def _own(module: Any) -> Iterator[str]:
    """Names of a module's own weights of two or three dimensions, in its order."""
    for name, parameter in _inner(module).named_parameters(recurse=False):
        if parameter.dim() in (2, 3):
            yield name


def _inner(module: Any) -> Any:
    """The base's module inside of the adapters that are on it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _is_named(name: str, given: list[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in given)


def expert_update(target: Target, a: torch.Tensor, b: torch.Tensor, expert: int) -> torch.Tensor:
    """B[e]·A[e] of one expert, `[out, in]`.

    Args:
        a: `[r·experts, in]`.
        b: `[out, r·experts]`.
    """
    rank = target.rank
    update: torch.Tensor = b[:, expert :: target.experts] @ a[expert * rank : (expert + 1) * rank]
    return update

"""States of the adapter that the guard may go back to: in memory, and with every checkpoint on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.model.tensor_file import read_tensors

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

TENSORS = "health.safetensors"


@dataclass
class Kept:
    """A state of the adapter: its trainable tensors, on the CPU."""

    step: int
    tensors: dict[str, torch.Tensor]
    score: float | None = None


@dataclass
class Snapshots:
    """The few states that are kept."""

    recent: Kept | None = None
    """The last state that the logged numbers called healthy."""
    previous: Kept | None = None
    """The one before, some steps earlier: an alarm of the numbers goes back to it."""
    checked: Kept | None = None
    """The last state whose sampled answers were healthy, or the start: an alarm of the answers goes back to it."""
    best: Kept | None = None
    """The state with the highest score, where something scores them."""

    def compare(self, state: Kept) -> None:
        """Take a scored state as the best one if it is; of equals the later one."""
        if self.best is None or (state.score or 0.0) >= (self.best.score or 0.0):
            self.best = state

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tensors, each step's once; returns the rest as plain values."""
        from safetensors.torch import save_file

        kept = {name: state for name, state in vars(self).items() if state is not None}
        by_step = {state.step: state.tensors for state in kept.values()}
        flat = {f"{step}/{name}": tensor for step, tensors in by_step.items() for name, tensor in tensors.items()}
        save_file(flat, folder / TENSORS)
        return {name: {"step": state.step, "score": state.score} for name, state in kept.items()}

    @classmethod
    def load(cls, folder: Path, stored: Mapping[str, Any]) -> Snapshots:
        """Read back what `save` wrote and returned."""
        by_step: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in read_tensors(folder / TENSORS).items():
            step, _, parameter = name.partition("/")
            by_step.setdefault(int(step), {})[parameter] = tensor
        return cls(**{name: Kept(one["step"], by_step[one["step"]], one["score"]) for name, one in stored.items()})


def take_snapshot(model: PeftModel, step: int, score: float | None = None) -> Kept:
    """Copy the adapter's trainable tensors."""
    return Kept(step, {name: value.detach().to("cpu", copy=True) for name, value in _trainable(model).items()}, score)


def restore_snapshot(model: PeftModel, state: Kept) -> None:
    """Give the adapter that state again."""
    import torch

    with torch.no_grad():
        for name, value in _trainable(model).items():
            value.copy_(state.tensors[name])


def _trainable(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}

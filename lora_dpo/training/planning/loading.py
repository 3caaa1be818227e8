"""What loading takes: the download, and main memory.

Of safetensors files transformers maps one tensor after the other into memory and moves it to its device; four at a time
where nothing is quantised on the way. Pages of the files are the system's to take back, so they are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dpo.model.lora import base_of
from lora_dpo.model.stored_size import StoredSize, stored_itemsize
from lora_dpo.training.planning.memory_plan import Choice, Costs

if TYPE_CHECKING:
    from lora_dpo.engine.cost_model import CostModel

PROCESS = 3 << 30
"""Main memory of a process that trains on a card: torch, CUDA's libraries, TRL, and the data; assumed."""

AT_ONCE = 4
"""Tensors that transformers reads at once where it quantises none of them."""

STATES = 4
"""States of the adapter that the guard keeps in main memory, at most."""


@dataclass(frozen=True)
class Loading:
    """Bytes."""

    weights: StoredSize
    download: int
    """Of the weights, what is not on this disk yet."""
    tensors: int
    """In main memory on their way to the device, or while they are quantised."""
    states: int
    """The guard's states of the adapter."""
    libraries: int
    visiting: int
    """Weights that live in main memory and visit a card."""
    main_memory: int
    """Most that is needed of main memory while weights are loaded, and on a card later, too."""


def loading_of(costs: Costs, cost: CostModel, choice: Choice) -> Loading:
    """What loading a run's base takes."""
    base, weights = base_of(costs.model), costs.stored
    largest = max(parameter.numel() for parameter in base.parameters() if not parameter.requires_grad)
    states = STATES * cost.trainable * 4 if costs.run.recipe.health.action != "none" else 0
    if costs.machine.kind == "cpu":
        tensors = largest * cost.itemsize
        libraries = costs.machine.libraries
        total = libraries + cost.weight_bytes + tensors
        visiting = 0
    else:
        tensors = largest * stored_itemsize(base) * (1 if choice.packed else AT_ONCE)
        libraries = PROCESS
        visiting = cost.held.at_home(choice.stream)
        total = libraries + visiting + max(tensors, states)
    return Loading(weights, max(0, weights.total - weights.here), tensors, states, libraries, visiting, total)

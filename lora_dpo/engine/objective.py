"""What the engine asks of who trains with it: the model, and the loss of per-token log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Objective(Protocol):
    """A loss over a batch of pairs, and the model that it trains; `lora_dpo.DPOTrainer` is one.

    Shape suffixes: B pairs of the batch, R = 2B rows (chosen, then rejected), T columns.
    """

    args: Any
    """TRL's settings of the run."""
    accelerator: Any
    """accelerate's: autocast, and what processes exchange."""
    loss_types: Sequence[str]
    ld_alpha: float | None
    use_weighting: bool
    precompute_ref_logps: bool
    """Whether the reference's log-probabilities are read from the data where it has them."""

    @property
    def model(self) -> Any:
        """The PeftModel: policy with its adapter on, reference with it off."""

    @property
    def pad_id(self) -> int:
        """The token id that batches are padded with."""

    def loss_of(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss, with its metrics, of tables `[R, T-1]` that are there already, for the batch `inputs`."""

    def unlogged(self, *, sft_factor: float = 1.0) -> AbstractContextManager[None]:
        """Within it `loss_of` is that of a part of a batch: no metrics, and the sft term times `sft_factor`."""

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """What forward passes of training run in."""

    def snapshot(self) -> Callable[[], None]:
        """Note the metrics as they are; the result puts them back, for a step that is to be done again."""

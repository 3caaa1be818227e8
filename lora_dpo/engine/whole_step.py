"""One optimiser step over its whole batch: packed by tokens, exact for every loss, redone when memory runs out.

Shape suffixes: B pairs of the step, R = 2B rows (chosen, then rejected), T columns.

TRL's loss is a function of per-token log-probabilities, one table for the whole batch. So a micro-batch only
has to fill in its rows of the table and to take its rows of ∂loss/∂table back through its own graph:

- the loss is a mean over pairs: the micro-batch's own loss has the same gradient, weighted by its share of pairs
  (the sft term: by its share of chosen tokens);
- the loss couples pairs (`aot` sorts the batch), or one pair's two branches are run apart: the table is filled
  without gradients first, and each part is run again with its rows of the gradient.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lora_dpo.engine.layout import pack
from lora_dpo.engine.objective import Objective
from lora_dpo.engine.pair_batch import PairBatch, Part, assemble, model_inputs, sft_shares
from lora_dpo.engine.pair_forward import PairForward
from lora_dpo.engine.step_record import StepRecord
from lora_dpo.engine.token_budget import TokenBudget
from lora_dpo.model.device import give_back_memory, out_of_memory

logger = logging.getLogger(__name__)

SORTED = ("aot", "aot_unpaired")
"""Losses that sort the log-ratios of the whole batch."""


class WholeStep:
    """Runs optimiser steps for an objective.

    Args:
        forward: the model's passes over streams of pairs.
        kept_bytes: measures, on a batch, what a stream token keeps for the backward pass.
        split_pairs: run the two branches of a pair one after the other: least memory, one more forward pass.
    """

    def __init__(
        self,
        objective: Objective,
        forward: PairForward,
        budget: TokenBudget,
        kept_bytes: Callable[[PairBatch], float],
        *,
        split_pairs: bool,
    ) -> None:
        self.objective, self.forward, self.budget = objective, forward, budget
        self.kept_bytes, self.split_pairs = kept_bytes, split_pairs

    def run(self, model: Any, batch: PairBatch) -> StepRecord:
        """Forward and backward of a whole optimiser batch.

        When memory runs out the gradients of the step are dropped, the budget is halved, and the step is redone
        with the same random numbers.
        """
        objective = self.objective
        longest = max(map(len, batch.tokens)) - 1 if self.split_pairs else max(batch.lengths)
        if longest:  # rows of one token predict nothing
            self.budget.measure(lambda: self.kept_bytes(batch), longest)
        random = _random_state()
        undo = objective.snapshot()
        while True:
            try:
                return self._attempt(model, batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error) or objective.args.world_size > 1:
                    raise
                advice = self.budget.shrink(longest)
                if advice is None:
                    raise
            # Here, outside the except block, nothing holds the failed pass's tensors any more, but what was made again.
            self.forward.rest()
            logger.warning("Memory ran out: %s. The step is done again.", advice)
            model.zero_grad(set_to_none=True)
            undo()
            give_back_memory()
            _set_random_state(random)

    def _attempt(self, model: Any, batch: PairBatch) -> StepRecord:
        objective = self.objective
        chosen = pack(batch.lengths, self.budget.tokens)
        if self.split_pairs:
            return self._two_passes(model, batch, [batch.branch(row) for row in range(len(batch.tokens))])
        alone = objective.args.world_size == 1
        if len(chosen) == 1 and alone:
            with objective.compute_loss_context_manager():
                output = self._pass(model, batch.whole())
                loss = objective.loss_of(output, batch.inputs)
            objective.accelerator.backward(loss)
            return StepRecord(loss.detach(), batch, output.log_probs.detach(), parts=1)
        parts = [batch.select(pairs) for pairs in chosen]
        if couples_pairs(objective.loss_types) and len(parts) > 1:
            return self._two_passes(model, batch, parts)
        return self._one_pass(model, batch, parts)

    def _pass(self, model: Any, part: Part) -> Any:
        with self.forward.on(part), self.forward.in_segments(self.budget.segment):
            return model(**model_inputs(part.inputs))

    def _one_pass(self, model: Any, batch: PairBatch, parts: Sequence[Part]) -> StepRecord:
        """Each part's own loss, weighted: for losses that are means over pairs.

        The metrics come last: between processes their exchange must follow that of the gradients in each of them,
        however many parts it has.
        """
        objective, outputs = self.objective, []
        shares = sft_shares(batch, parts)
        for number, part in enumerate(parts):
            share = len(part.rows) / len(batch.tokens)
            with _synced(model, number == len(parts) - 1), objective.compute_loss_context_manager():
                output = self._pass(model, part)
                with objective.unlogged(sft_factor=shares[number] / share):
                    loss = objective.loss_of(output, part.inputs) * share
                objective.accelerator.backward(loss)
            outputs.append(_detached(output))
        return self._logged(assemble(outputs, parts), batch, len(parts))

    def _logged(self, whole: Any, batch: PairBatch, parts: int) -> StepRecord:
        """The step of a whole table: its loss, with the metrics."""
        with torch.no_grad():
            loss = self.objective.loss_of(whole, batch.inputs)
        return StepRecord(loss, batch, whole.log_probs.detach(), parts)

    def _two_passes(self, model: Any, batch: PairBatch, parts: Sequence[Part]) -> StepRecord:
        """The whole table without gradients, the loss's gradient on it, then each part again with its rows of that."""
        objective, outputs, states = self.objective, [], []
        for part in parts:
            states.append(_random_state())
            with torch.no_grad(), objective.compute_loss_context_manager():
                outputs.append(self._pass(model, part))
        whole = assemble(outputs, parts)
        whole.log_probs.requires_grad_()
        with objective.unlogged():
            (slope_RT,) = torch.autograd.grad(objective.loss_of(whole, batch.inputs), whole.log_probs)
        with self.forward.log(False):
            for number, part in enumerate(parts):
                _set_random_state(states[number])
                with _synced(model, number == len(parts) - 1), objective.compute_loss_context_manager():
                    log_probs = self._pass(model, part).log_probs[: len(part.rows)]
                    objective.accelerator.backward((log_probs * slope_RT[part.rows]).sum())
        return self._logged(whole, batch, len(parts))


def couples_pairs(loss_types: Sequence[str]) -> bool:
    """Whether a pair's gradient depends on the other pairs' values: then the parts cannot be taken one by one."""
    return bool(set(loss_types) & set(SORTED))


def _detached(output: Any) -> Any:
    return type(output)(**{name: value.detach() for name, value in output.items() if isinstance(value, torch.Tensor)})


@contextlib.contextmanager
def _synced(model: Any, last: bool) -> Iterator[None]:
    """Between processes gradients are exchanged with the last part only."""
    if last or not hasattr(model, "no_sync"):
        yield
    else:
        with model.no_sync():
            yield


RandomState = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]
"""Of the CPU, of each NVIDIA GPU, and of Apple's."""


def _random_state() -> RandomState:
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return torch.get_rng_state(), cards, apple


def _set_random_state(state: RandomState) -> None:
    own, cards, apple = state
    torch.set_rng_state(own)
    if cards:
        torch.cuda.set_rng_state_all(cards)
    if apple is not None:
        torch.mps.set_rng_state(apple)

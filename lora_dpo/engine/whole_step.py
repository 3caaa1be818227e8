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
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lora_dpo.engine.layout import pack, stream_length
from lora_dpo.engine.objective import Objective
from lora_dpo.engine.pair_forward import PairForward, rows_of
from lora_dpo.engine.token_budget import TokenBudget
from lora_dpo.model.device import give_back_memory, out_of_memory

logger = logging.getLogger(__name__)

SORTED = ("aot", "aot_unpaired")
"""Losses that sort the log-ratios of the whole batch."""

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the batch that runs at once: the model's inputs, and which rows of the batch its rows are."""

    inputs: Inputs
    rows: torch.Tensor


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
        kept_bytes: Callable[[Inputs], float],
        *,
        split_pairs: bool,
    ) -> None:
        self.objective, self.forward, self.budget = objective, forward, budget
        self.kept_bytes, self.split_pairs = kept_bytes, split_pairs
        self.parts = 0
        """Parts that the last step ran in."""
        self.log_probs: torch.Tensor
        """The last step's per-token table `[R, T-1]`, as it was before the step."""

    def run(self, model: Any, inputs: Inputs) -> torch.Tensor:
        """Forward and backward of a whole optimiser batch; the loss, detached.

        When memory runs out the gradients of the step are dropped, the budget is halved, and the step is redone
        with the same random numbers.
        """
        objective = self.objective
        longest = max(map(len, _rows(inputs))) - 1 if self.split_pairs else max(pair_lengths(inputs))
        if longest:  # rows of one token predict nothing
            self.budget.measure(lambda: self.kept_bytes(inputs), longest)
        random = _random_state()
        undo = objective.snapshot()
        while True:
            try:
                return self._attempt(model, inputs)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error) or objective.args.world_size > 1:
                    raise
                advice = self.budget.shrink(longest)
                if advice is None:
                    raise
            # Here, outside the except block, nothing holds the failed pass's tensors any more.
            logger.warning("Memory ran out: %s. The step is done again.", advice)
            model.zero_grad(set_to_none=True)
            undo()
            give_back_memory()
            _set_random_state(random)

    def _attempt(self, model: Any, inputs: Inputs) -> torch.Tensor:
        objective = self.objective
        chosen = pack(pair_lengths(inputs), self.budget.tokens)
        self.parts = len(inputs["input_ids"]) if self.split_pairs else len(chosen)
        if self.split_pairs:
            return self._two_passes(model, inputs, [branch(inputs, row) for row in range(len(inputs["input_ids"]))])
        parts = [select(inputs, pairs) for pairs in chosen]
        alone = objective.args.world_size == 1
        if len(parts) == 1 and alone:
            with objective.compute_loss_context_manager():
                output = model(**model_inputs(inputs))
                loss = objective.loss_of(output, inputs)
            self.log_probs = output.log_probs.detach()
            objective.accelerator.backward(loss)
            return loss.detach()
        if couples_pairs(objective.loss_types) and len(parts) > 1:
            return self._two_passes(model, inputs, parts)
        return self._one_pass(model, inputs, parts)

    def _one_pass(self, model: Any, inputs: Inputs, parts: Sequence[Part]) -> torch.Tensor:
        """Each part's own loss, weighted: for losses that are means over pairs.

        The metrics come last: between processes their exchange must follow that of the gradients in each of them,
        however many parts it has.
        """
        objective, outputs = self.objective, []
        shares = sft_shares(inputs, parts)
        for number, part in enumerate(parts):
            share = len(part.rows) / len(inputs["input_ids"])
            with _synced(model, number == len(parts) - 1), objective.compute_loss_context_manager():
                output = model(**model_inputs(part.inputs))
                with objective.unlogged(sft_factor=shares[number] / share):
                    loss = objective.loss_of(output, part.inputs) * share
                objective.accelerator.backward(loss)
            outputs.append(_detached(output))
        return self._logged(assemble(outputs, parts), inputs)

    def _logged(self, whole: Any, inputs: Inputs) -> torch.Tensor:
        """The loss of the whole table, with its metrics."""
        self.log_probs = whole.log_probs.detach()
        with torch.no_grad():
            return self.objective.loss_of(whole, inputs)

    def _two_passes(self, model: Any, inputs: Inputs, parts: Sequence[Part]) -> torch.Tensor:
        """The whole table without gradients, the loss's gradient on it, then each part again with its rows of that."""
        objective, outputs, states = self.objective, [], []
        for part in parts:
            states.append(_random_state())
            with torch.no_grad(), objective.compute_loss_context_manager():
                outputs.append(model(**model_inputs(part.inputs)))
        whole = assemble(outputs, parts)
        whole.log_probs.requires_grad_()
        with objective.unlogged():
            (slope_RT,) = torch.autograd.grad(objective.loss_of(whole, inputs), whole.log_probs)
        with self.forward.log(False):
            for number, part in enumerate(parts):
                _set_random_state(states[number])
                with _synced(model, number == len(parts) - 1), objective.compute_loss_context_manager():
                    log_probs = model(**model_inputs(part.inputs)).log_probs[: len(part.rows)]
                    objective.accelerator.backward((log_probs * slope_RT[part.rows]).sum())
        return self._logged(whole, inputs)


def couples_pairs(loss_types: Sequence[str]) -> bool:
    """Whether a pair's gradient depends on the other pairs' values: then the parts cannot be taken one by one."""
    return bool(set(loss_types) & set(SORTED))


def pair_lengths(inputs: Inputs) -> list[int]:
    """Stream tokens of each pair of a padded batch."""
    rows = _rows(inputs)
    half = len(rows) // 2
    return [stream_length(rows[index], rows[half + index]) for index in range(half)]


def _rows(inputs: Inputs) -> list[list[int]]:
    return rows_of(inputs["input_ids"], inputs["attention_mask"])


def model_inputs(inputs: Inputs) -> Inputs:
    """The keywords of TRL's call of the model."""
    ids_RT = inputs["input_ids"]
    labels_RT = ids_RT.masked_fill(inputs["completion_mask"] == 0, -100)
    return dict(
        input_ids=ids_RT, attention_mask=inputs["attention_mask"], labels=labels_RT, use_cache=False, fused_lm_head=True
    )


def merge_batches(batches: Sequence[Inputs], pad_id: int) -> Inputs:
    """Padded batches, each chosen rows first, to one such batch."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch["input_ids"].shape[1] for batch in batches)
    merged: Inputs = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if values[0].dim() == 1:  # reference values, one a pair
            merged[name] = torch.cat(values)
            continue
        fill = pad_id if name == "input_ids" else 0
        wide = [torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill) for value in values]
        sides = zip(*(value.chunk(2) for value in wide), strict=True)
        merged[name] = torch.cat([torch.cat(side) for side in sides])
    return merged


def select(inputs: Inputs, pairs: Sequence[int]) -> Part:
    """The rows of some pairs, at the batch's own width."""
    half = len(inputs["input_ids"]) // 2
    index = torch.tensor(pairs, device=inputs["input_ids"].device)
    rows = torch.cat([index, index + half])
    part = {name: value[rows] if len(value) == 2 * half else value[index] for name, value in inputs.items()}
    return Part(part, rows)


def branch(inputs: Inputs, row: int) -> Part:
    """One sequence on its own: beside it stands a sequence of one token, which adds nothing to the stream."""
    rows = torch.tensor([row, row], device=inputs["input_ids"].device)
    part = {name: inputs[name][rows].clone() for name in ("input_ids", "attention_mask", "completion_mask")}
    part["attention_mask"][1, 1:] = 0
    part["completion_mask"][1] = 0
    return Part(part, rows[:1])


def sft_shares(inputs: Inputs, parts: Sequence[Part]) -> list[float]:
    """Each part's share of the batch's chosen tokens: what its mean over them weighs in the mean over all."""
    tokens_R = inputs["completion_mask"][:, 1:].sum(dim=1)
    half = len(tokens_R) // 2
    total = max(1.0, float(tokens_R[:half].sum()))
    return [float(tokens_R[part.rows[part.rows < half]].sum()) / total for part in parts]


def assemble(outputs: Sequence[Any], parts: Sequence[Part]) -> Any:
    """The parts' per-token tables as the table of the whole batch, without gradients."""
    order = torch.cat([part.rows for part in parts]).argsort()
    fields = {}
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        tables = [getattr(output, name) for output in outputs]
        if tables[0] is not None:
            rows = [table[: len(part.rows)] for table, part in zip(tables, parts, strict=True)]
            fields[name] = torch.cat(rows).detach()[order]
    return type(outputs[0])(**fields)


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


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])

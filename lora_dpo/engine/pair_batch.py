"""An optimiser step's pairs: TRL's padded batch, and beside it its rows without the padding, found once.

Shape suffixes: B pairs of the batch, R = 2B rows (chosen, then rejected), T columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from lora_dpo.engine.layout import stream_length
from lora_dpo.engine.reference_cache import pair_key

Inputs = dict[str, Any]
"""A batch as TRL pads it: `input_ids`, `attention_mask`, `completion_mask` `[R, T]`, and what is one a pair, `[B]`."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the batch that runs at once."""

    inputs: Inputs
    """The model's inputs."""
    rows: torch.Tensor
    """Which rows of the batch its first rows are."""
    tokens: list[list[int]]
    """Token ids of its rows, without the padding."""
    scored: list[list[int]]
    """1 for each of these that belongs to an answer."""


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """A padded batch, and its rows as lists on the CPU: each time they are read back from a GPU one waits for it."""

    inputs: Inputs
    tokens: list[list[int]]
    """Token ids of each row, without the padding."""
    scored: list[list[int]]
    """1 for each of these that belongs to an answer."""

    @classmethod
    def of(cls, inputs: Inputs) -> PairBatch:
        """The batch with its rows found."""
        return cls(inputs, *rows_of(inputs["attention_mask"], inputs["input_ids"], inputs["completion_mask"]))

    def __len__(self) -> int:
        """Pairs."""
        return len(self.tokens) // 2

    @cached_property
    def lengths(self) -> list[int]:
        """Stream tokens of each pair."""
        half = len(self)
        return [stream_length(self.tokens[index], self.tokens[half + index]) for index in range(half)]

    @cached_property
    def keys(self) -> list[bytes]:
        """What the reference cache knows each pair by."""
        half = len(self)
        return [pair_key(self.tokens[index::half], self.scored[index::half]) for index in range(half)]

    @cached_property
    def prompts(self) -> list[int]:
        """A number for each pair's prompt; Python's hash of integers is the same in every process."""
        starts = [row.index(1) if 1 in row else 0 for row in self.scored[: len(self)]]
        return [hash(tuple(row[:start])) for row, start in zip(self.tokens, starts, strict=False)]

    def replaced(self, **values: Any) -> PairBatch:
        """The same pairs with other or further parts of the batch."""
        return dataclasses.replace(self, inputs={**self.inputs, **values})

    def select(self, pairs: Sequence[int]) -> Part:
        """The rows of some pairs, at the batch's own width."""
        half = len(self)
        index = torch.tensor(pairs, device=self.inputs["input_ids"].device)
        rows = torch.cat([index, index + half])
        inputs = {name: value[rows] if len(value) == 2 * half else value[index] for name, value in self.inputs.items()}
        numbers = [*pairs, *(half + number for number in pairs)]
        return Part(inputs, rows, [self.tokens[row] for row in numbers], [self.scored[row] for row in numbers])

    def branch(self, row: int) -> Part:
        """One sequence on its own: beside it stands a sequence of one token, which adds nothing to the stream."""
        rows = torch.tensor([row, row], device=self.inputs["input_ids"].device)
        names = ("input_ids", "attention_mask", "completion_mask")
        inputs = {name: self.inputs[name][rows].clone() for name in names}
        inputs["attention_mask"][1, 1:] = 0
        inputs["completion_mask"][1] = 0
        tokens = self.tokens[row]
        return Part(inputs, rows[:1], [tokens, tokens[:1]], [self.scored[row], [0] * len(tokens[:1])])

    def whole(self) -> Part:
        """All of it at once."""
        rows = torch.arange(len(self.tokens), device=self.inputs["input_ids"].device)
        return Part(self.inputs, rows, self.tokens, self.scored)


def rows_of(mask_RT: torch.Tensor, *values_RT: torch.Tensor) -> list[list[list[int]]]:
    """Of each table of values its rows, without those of the padding. A GPU is waited for once."""
    mask, *tables = torch.stack([mask_RT.long(), *(values.long() for values in values_RT)]).tolist()
    return [
        [[value for value, kept in zip(row, marks, strict=True) if kept] for row, marks in zip(rows, mask, strict=True)]
        for rows in tables
    ]


def padded(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Rows as a table `[R, T]` on the CPU, 0 behind their ends."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


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


def sft_shares(batch: PairBatch, parts: Sequence[Part]) -> list[float]:
    """Each part's share of the batch's chosen tokens: what its mean over them weighs in the mean over all.

    Of each row all but the first token can be predicted.
    """
    total = max(1, sum(sum(row[1:]) for row in batch.scored[: len(batch)]))
    return [sum(sum(row[1:]) for row in part.scored[: len(part.scored) // 2]) / total for part in parts]


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

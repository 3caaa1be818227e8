"""Pairs to one flat token stream in which the two sequences of a pair share their prefix.

Shape suffixes: S tokens of the stream, L distinct labelled tokens, R rows (sequences), T tokens of the
longest row. Rows come in TRL's order: all chosen, then all rejected.

One pair, prefix `a b c`, chosen `… d e`, rejected `… f`:

    stream      a  b | c  d | c          the last prefix token is repeated, so that both branches have a
    position    0  1   2  3   2          predictor for their first token
    predicts    b  c   d  e   f

(The idea is that of Wang & Hegde 2024, arXiv 2410.20305; here the prefix is the longest common one,
compared by token id, and may reach into the answers.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dpo.data.tokenize import common_prefix_length

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Span:
    """Where one pair lies in the stream: prefix `start:prefix`, chosen branch `prefix:chosen`, rejected to `end`."""

    start: int
    prefix: int
    chosen: int
    end: int

    @property
    def queries(self) -> tuple[int, int]:
        """Tokens of prefix and chosen branch together, and of the rejected branch."""
        return self.chosen - self.start, self.end - self.chosen

    @property
    def keys(self) -> tuple[int, int]:
        """Tokens that these two see: themselves, and the rejected branch its prefix before."""
        first, second = self.queries
        return first, second + (self.prefix - self.start if second else 0)

    @property
    def seen(self) -> list[int]:
        """The places of these, first those of the one, then of the other."""
        again = [*range(self.start, self.prefix), *range(self.chosen, self.end)] if self.end > self.chosen else []
        return [*range(self.start, self.chosen), *again]


@dataclass(frozen=True)
class Layout:
    """A flat stream and how to read it."""

    ids_S: torch.Tensor
    position_S: torch.Tensor
    spans: tuple[Span, ...]
    predictor_L: torch.Tensor
    """Stream index whose hidden state predicts each labelled token."""
    label_L: torch.Tensor
    source_RT: torch.Tensor
    """`[R, T-1]`: for the token at column t+1 of a row its index into L, or L where there is no label."""


def lay_out(rows: Sequence[Sequence[int]], answer_masks: Sequence[Sequence[bool]], *, width: int) -> Layout:
    """Lay 2n sequences, n chosen and then n rejected, into one stream.

    Args:
        rows: token ids without padding.
        answer_masks: for each token of a row, whether its log-probability is wanted.
        width: T, the columns of the tables that the result is read into.

    Raises:
        ValueError: an odd number of rows, or an empty row.
    """
    import torch

    half, odd = divmod(len(rows), 2)
    if odd or any(not row for row in rows):
        raise ValueError("lay_out needs 2n non-empty sequences, chosen first")
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    predictors: list[int] = []
    labels: list[int] = []
    source: list[list[int]] = [[-1] * (width - 1) for _ in rows]

    def read(row: int, column: int, at: int) -> None:
        """The token at `column` of `row` is predicted from stream index `at`."""
        if answer_masks[row][column]:
            source[row][column - 1] = len(predictors)
            predictors.append(at)
            labels.append(rows[row][column])

    for chosen, rejected in zip(range(half), range(half, 2 * half), strict=True):
        pair = (chosen, rejected)
        shared = common_prefix(rows[chosen], rows[rejected])
        start = len(ids)
        ids += rows[chosen][: max(0, shared - 1)]
        positions += range(max(0, shared - 1))
        for column in range(1, shared):
            wanted = [row for row in pair if answer_masks[row][column]]
            if wanted:  # one predictor serves both rows
                read(wanted[0], column, start + column - 1)
                for row in wanted[1:]:
                    source[row][column - 1] = source[wanted[0]][column - 1]
        ends = [len(ids)]
        alike = common_prefix_length(rows[chosen], rows[rejected])  # more than `shared` if one row begins the other
        for row in pair:
            first = max(0, shared - 1)
            begin = len(ids)
            ids += rows[row][first:-1]
            positions += range(first, len(rows[row]) - 1)
            for column in range(max(1, shared), len(rows[row])):
                if row == rejected and column < alike and source[chosen][column - 1] >= 0:
                    # the same token after the same tokens: one value, so that equal answers tie exactly
                    source[row][column - 1] = source[chosen][column - 1] if answer_masks[row][column] else -1
                else:
                    read(row, column, begin + column - 1 - first)
            ends.append(len(ids))
        spans.append(Span(start, *ends))
    table = torch.tensor(source)
    return Layout(
        torch.tensor(ids),
        torch.tensor(positions),
        tuple(spans),
        torch.tensor(predictors, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        table.masked_fill(table < 0, len(predictors)),
    )


def stream_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens that a pair takes in the stream: its two sequences, their common prefix counted once."""
    return len(chosen) + len(rejected) - 2 - max(0, common_prefix(chosen, rejected) - 1)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pairs to micro-batches of at most `budget` stream tokens; a longer pair gets one of its own.

    First fit, longest pairs first, so that few micro-batches are needed. Every index of `lengths` appears once,
    in ascending order within its micro-batch.
    """
    packed: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = next((place for place, left in enumerate(room) if lengths[index] <= left), None)
        if fits is None:
            packed.append([index])
            room.append(budget - lengths[index])
        else:
            packed[fits].append(index)
            room[fits] -= lengths[index]
    return [sorted(batch) for batch in packed]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix that leaves each side at least one token of its own."""
    return min(common_prefix_length(left, right), len(left) - 1, len(right) - 1)

"""Pairs to measure on: three shapes of data drawn from a seed, or a preference file.

Speed does not depend on which tokens a pair holds, only on how many: ids are random, lengths are log-normal.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Shape:
    """Median lengths in tokens, and the spread of their logarithms."""

    title: str
    prompt: int
    answer: int
    prompt_spread: float = 0.8
    answer_spread: float = 0.8
    longest: int = 1024


SHAPES = {
    "hh": Shape("several turns, short answers (as HH-RLHF)", prompt=100, answer=40, longest=512),
    "long-prompt": Shape("long prompt, middling answers", prompt=400, answer=120, prompt_spread=0.5),
    "long-answer": Shape("short prompt, long answers", prompt=40, answer=250, answer_spread=0.5),
}


def draw(shape: Shape, count: int, *, vocabulary: int, seed: int = 0) -> list[Row]:
    """`count` pairs of random token ids."""
    lot = random.Random(seed)

    def length(median: int, spread: float) -> int:
        return max(4, min(shape.longest // 2, round(median * math.exp(lot.gauss(0, spread)))))

    def ids(size: int) -> list[int]:
        return [lot.randrange(100, vocabulary - 100) for _ in range(size)]

    return [
        {
            "prompt_ids": ids(length(shape.prompt, shape.prompt_spread)),
            "chosen_ids": ids(length(shape.answer, shape.answer_spread)),
            "rejected_ids": ids(length(shape.answer, shape.answer_spread)),
        }
        for _ in range(count)
    ]


def read(path: str, tokenizer: Any, count: int, *, max_length: int = 1024) -> list[Row]:
    """The first `count` usable rows of a preference file, cut at `max_length`."""
    from lora_dpo.data import read_pairs, tokenize_pairs

    pairs, _ = read_pairs(path)
    tokens, _ = tokenize_pairs(tokenizer, pairs[:count], max_length=max_length)
    return [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in tokens]


def total(row: Row) -> int:
    """Length of the pair's longer sequence."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

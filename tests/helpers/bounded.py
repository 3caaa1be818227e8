"""Bounds on what a foreign file may cost: processor time, and how long an error is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lora_dpo.errors import LoraDPOError

EXAMPLES = int(os.environ.get("LORA_DPO_FUZZ", "0"))
"""Examples of each fuzz test; 0 for the few of an ordinary run. `make fuzz` sets it."""


def yaml_bomb(fan: int = 9, levels: int = 8) -> str:
    """A little YAML whose aliases stand for `fan ** levels` values."""
    lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * fan)}]" for n in range(1, levels))]
    return "\n".join(lines)


@contextmanager
def within(seconds: float = 2.0) -> Iterator[None]:
    """The block takes no more processor time than that (of this process: a busy machine does not matter)."""
    start = time.process_time()
    yield
    took = time.process_time() - start
    assert took < seconds, f"{took:.1f} s of processor time"


@contextmanager
def ends_well(seconds: float = 2.0) -> Iterator[list[LoraDPOError]]:
    """The block ends in time, and well or with an error of ours in one short line, which is in the list then."""
    said: list[LoraDPOError] = []
    with within(seconds):
        try:
            yield said
        except LoraDPOError as error:
            said.append(error)
    for error in said:
        text = str(error)
        assert text
        assert text.isprintable()
        assert len(text) <= 3000, text[:500]

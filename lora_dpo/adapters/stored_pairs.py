"""A few held-out pairs with their scores travel with an adapter, so that anyone can check that it still works.

`verify.json` holds token ids, not text, and the log-probabilities that policy and reference gave each answer when
the adapter was made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lora_dpo.adapters.lora_config import read_json
from lora_dpo.data import TokenPair
from lora_dpo.data.pairs import Origin
from lora_dpo.errors import AdapterError
from lora_dpo.text import plain

STORED_PAIRS = "verify.json"
HELD_OUT = "held-out.jsonl"
"""The pairs that a run held out of its training data, as text: for `lora-dpo eval`. No package takes it along."""
MAX_BYTES = 4 << 20
MAX_PAIRS = 64

Sides = tuple[list[float], list[float]]
"""Log-probabilities in nats of N chosen and N rejected answers."""


@dataclass(frozen=True)
class StoredPairs:
    """The stored pairs, with the log-probabilities that they had."""

    pairs: list[TokenPair]
    policy: Sides
    reference: Sides


def save_stored_pairs(folder: Path, stored: StoredPairs) -> None:
    """Write `verify.json`."""
    rows = [
        {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "policy": [stored.policy[0][i], stored.policy[1][i]],
            "reference": [stored.reference[0][i], stored.reference[1][i]],
        }
        for i, pair in enumerate(stored.pairs)
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / STORED_PAIRS).write_text(f'{{"format": 1, "pairs": [\n{lines}\n]}}\n', encoding="utf-8", newline="\n")


def read_stored_pairs(folder: Path) -> StoredPairs | None:
    """The stored pairs of an adapter; None if it has none. Raises `AdapterError` if they cannot be read."""
    path = folder / STORED_PAIRS
    return parse_stored_pairs(path) if path.is_file() else None


def parse_stored_pairs(path: Path) -> StoredPairs:
    """Read one `verify.json`, every number checked. Raises `AdapterError`."""
    from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

    class Row(BaseModel):
        model_config = ConfigDict(strict=True)
        prompt: list[NonNegativeInt] = Field(min_length=1)
        chosen: list[NonNegativeInt] = Field(min_length=1)
        rejected: list[NonNegativeInt] = Field(min_length=1)
        policy: list[FiniteFloat] = Field(min_length=2, max_length=2)
        reference: list[FiniteFloat] = Field(min_length=2, max_length=2)

    class Rows(BaseModel):
        pairs: list[Row] = Field(min_length=1, max_length=MAX_PAIRS)

    try:
        rows = Rows.model_validate(read_json(path, MAX_BYTES)).pairs
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{plain('.'.join(map(str, first['loc'])))}: {plain(first['msg'])}"
        raise AdapterError(f"{path} cannot be read ({reason}). Take the adapter from its source again.") from error
    origin = Origin(str(path), 0)
    return StoredPairs(
        [TokenPair(row.prompt, row.chosen, row.rejected, origin, False) for row in rows],
        ([row.policy[0] for row in rows], [row.policy[1] for row in rows]),
        ([row.reference[0] for row in rows], [row.reference[1] for row in rows]),
    )

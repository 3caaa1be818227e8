"""What a DPO run made of each of its pairs: `pair-margins.json` beside the adapter, without any text.

A row says where a pair stood, a hash of what it says, and its margins. No package takes the file along: it is about its
owner's data, and who has a text can tell by its hash whether it was in there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lora_dpo.adapters.lora_config import read_json
from lora_dpo.data.pairs import Origin
from lora_dpo.errors import AdapterError
from lora_dpo.text import plain

STORED_MARGINS = "pair-margins.json"
MAX_BYTES = 64 << 20
MOST_PAIRS = 500_000
"""Of larger data no file is written: it would be larger than the adapter."""


@dataclass(frozen=True)
class PairMargin:
    """h(chosen) - h(rejected) of one training pair in nats, h = log π_θ - log π_ref: above 0 as its label says."""

    origin: Origin
    mark: str
    """What the pair says, by `data.pairs.pair_mark`."""
    before: float | None
    """Before the run had learnt from the pair; None if the policy was still the reference then."""
    after: float | None
    """At its last time in the run; None if the policy was the reference whenever it was seen, or it was not seen."""
    mean: float | None
    """Over all times at which the policy was not the reference."""
    times: int
    """How many those are."""


def write_margins(folder: Path, margins: Sequence[PairMargin]) -> None:
    """Write `pair-margins.json`, in nats to four places; of no pairs and of more than `MOST_PAIRS` nothing."""
    if not 0 < len(margins) <= MOST_PAIRS:
        return
    files = {source: number for number, source in enumerate(dict.fromkeys(one.origin.source for one in margins))}
    names = [source.encode(errors="replace").decode() for source in files]  # a file's name may be no text
    rows = (
        [files[one.origin.source], one.origin.row, one.mark, *map(_short, (one.before, one.after, one.mean)), one.times]
        for one in margins
    )
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"format": 1, "files": names})[:-1]
    (folder / STORED_MARGINS).write_text(f'{head}, "pairs": [\n{lines}\n]}}\n', encoding="utf-8", newline="\n")


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def read_margins(folder: Path) -> list[PairMargin]:
    """The margins of a run's pairs, in the order of its data; none if the folder has no such file.

    Raises:
        AdapterError: the file cannot be read.
    """
    from pydantic import BaseModel, Field, ValidationError

    path = folder / STORED_MARGINS
    if not path.is_file():
        return []
    Nats = Annotated[float, Field(ge=-1e9, le=1e9)] | None
    Count = Annotated[int, Field(ge=0, le=10**15)]
    Text = Annotated[str, Field(max_length=4096)]

    class Rows(BaseModel):
        files: list[Text]
        pairs: list[tuple[Count, Count, Text, Nats, Nats, Nats, Count]] = Field(max_length=MOST_PAIRS)

    try:
        rows = Rows.model_validate(read_json(path, MAX_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{plain('.'.join(map(str, first['loc'])))}: {plain(first['msg'])}"
        raise AdapterError(f"{path} cannot be read ({reason}). Train again, or remove it.") from error
    if any(row[0] >= len(rows.files) for row in rows.pairs):
        raise AdapterError(f"{path} cannot be read (a pair is of no file). Train again, or remove it.")
    return [PairMargin(Origin(rows.files[file], row), *rest) for file, row, *rest in rows.pairs]  # type: ignore[arg-type]

"""Tables for programs: one row a run or a candidate, as CSV or JSON, and means over the seeds of equal ones."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dpo.errors import ConfigError
from lora_dpo.evaluation.intervals import mean
from lora_dpo.files import refuse_existing
from lora_dpo.text import json_text

Row = Mapping[str, Any]
"""Values by column. Rows of one table may have different columns: what one lacks is empty there."""
ENDINGS = (".csv", ".json")
HALF = "_half"
"""Ends the column with ± of a mean: half of its 95% interval."""


def check_table(path: Path) -> None:
    """Refuse what cannot become a table, before anything is read for it.

    Raises:
        ConfigError: it ends in neither .csv nor .json.
        OutputError: it exists already.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--table {path}: what kind of table that is, its ending says: .csv or .json.")
    refuse_existing(path)


def table_text(path: Path, rows: Sequence[Row]) -> str:
    """The rows in the form that the ending of `path` says; numbers are not rounded.

    JSON is a list of objects with the same keys in each, null where there is nothing. In CSV that is an empty cell, and
    a list is written as JSON.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix.lower() == ".json":
        return json_text([{name: _known(row.get(name)) for name in columns} for row in rows]) + "\n"
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_cell(_known(row.get(name))) for name in columns] for row in rows])
    return written.getvalue()


def seed_groups(keys: Sequence[Hashable], seeds: Sequence[Any]) -> list[list[int]]:
    """Places of the runs that are equal but for their seeds, group by group; what is alone is in none.

    Args:
        keys: of each run, the same for those that belong together; None for one that belongs to no group.
        seeds: of each run. Of two with the same one the first counts: a run that is made again tells nothing new.
    """
    groups: dict[Hashable, dict[Any, int]] = {}
    for place, (key, seed) in enumerate(zip(keys, seeds, strict=True)):
        if key is not None:
            groups.setdefault(key, {}).setdefault(seed, place)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def mean_row(rows: Sequence[Row], numbers: Sequence[str]) -> dict[str, Any]:
    """The means of some rows, each with half of its 95% interval (Student's t).

    Args:
        numbers: columns that a mean is taken of, where all of the rows have them.
    """
    found: dict[str, Any] = {"kind": "mean", "runs": len(rows)}
    for name in numbers:
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if len(values) == len(rows):
            middle = mean(values)
            found |= {name: middle.value, name + HALF: middle.high - middle.value}
    return found


def _known(value: Any) -> Any:
    """None in the place of what is no number: JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value

"""What a run's folder or an evaluation's folder holds, read for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.adapters import PASSPORT, Passport, parse_passport
from lora_dpo.config import read_settings
from lora_dpo.errors import AdapterError

NUMBERS = "eval.json"
MEASURED = "measured.json"


@dataclass(frozen=True)
class StoredRun:
    """A finished run, as its adapter folder tells it. What an older or foreign folder lacks is empty."""

    name: str
    folder: Path
    passport: Passport | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    """`metrics.jsonl`."""
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        """Rows of optimiser steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def beta(self) -> float:
        """DPO's β, TRL's default if the recipe names none."""
        return float(self.recipe.get("trainer", {}).get("beta", 0.1))

    def metrics(self, when: str, kind: str) -> Mapping[str, Any]:
        """`metrics("after", "pairs")` by the passport; empty if it has none."""
        found = (self.passport.metrics if self.passport else {}).get(when, {}).get(kind, {})
        return found if isinstance(found, Mapping) else {}


def read_run(folder: Path) -> StoredRun:
    """Read a run's folder. Raises `AdapterError` if a file of it is broken."""
    passport = parse_passport(folder / PASSPORT) if (folder / PASSPORT).is_file() else None
    recipe = read_settings(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    rows = tuple(_lines(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").is_file() else ()
    measured = _json(folder / MEASURED) if (folder / MEASURED).is_file() else {}
    return StoredRun(folder.resolve().name, folder, passport, recipe, rows, measured)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `eval.json` of a folder says. Raises `AdapterError` if it cannot be read."""
    found = _json(folder / NUMBERS)
    if found.get("format") != 1 or "numbers" not in found:
        raise AdapterError(f"{folder / NUMBERS} is no evaluation of this version. Evaluate again with: lora-dpo eval")
    return found


def is_evaluation(folder: Path) -> bool:
    """True for a folder that `lora-dpo eval` wrote."""
    return (folder / NUMBERS).is_file()


def number(row: Mapping[str, Any], key: str, scale: float = 1.0) -> float:
    """A number of a row, NaN where it is missing."""
    value = row.get(key)
    return float(value) * scale if isinstance(value, int | float) else math.nan


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}). Make it again, or remove it.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path} cannot be read (it is no JSON object). Make it again, or remove it.")
    return found


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for number_, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AdapterError(f"{path}, line {number_}: broken JSON ({error}). Repair or remove that line.") from error
        if isinstance(row, dict):
            yield row

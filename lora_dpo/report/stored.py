"""What a run's folder or an evaluation's folder holds, read for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.adapters import PASSPORT, Passport, parse_passport
from lora_dpo.checkpoints import checkpoints
from lora_dpo.config import read_settings
from lora_dpo.errors import AdapterError
from lora_dpo.methods import METHODS
from lora_dpo.runs import METRICS, resume_command, running, whole_rows
from lora_dpo.settings import DEFAULTS

NUMBERS = "eval.json"
MEASURED = "measured.json"
BEFORE = "health-before.json"
BETA = 0.1
"""TRL's default of DPO and KTO."""


@dataclass(frozen=True)
class StoredRun:
    """A run, as its adapter folder or its unfinished folder tells it. What an older or foreign one lacks is empty."""

    name: str
    folder: Path
    passport: Passport | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    """`metrics.jsonl`."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    unfinished: str | None = None
    """How far an unfinished run came, and how it goes on."""
    first_look: tuple[str, ...] = ()
    """What the guard's prompts were answered before the first step, if the run is unfinished."""

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        """Rows of optimiser steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def method(self) -> str:
        """`dpo`, `sft` or `kto`."""
        return str(self.recipe.get("method") or "dpo")

    @property
    def beta(self) -> float:
        """β of DPO and KTO, TRL's default if the recipe names none; 1 for SFT, which has none."""
        return 1.0 if self.method == "sft" else float(self.recipe.get("trainer", {}).get("beta", BETA))

    def default(self, key: str) -> str:
        """The value of a setting that the recipe does not name; `default` where it is TRL's own."""
        section, _, name = key.partition(".")
        if section == "lora" and str(self.recipe.get("reference", "")).startswith("adapter:"):
            return "as the reference has it"
        if section != "trainer":
            return "default"
        if name == "beta":
            return "none" if self.method == "sft" else f"{BETA:g}"
        known = METHODS[self.method].defaults if self.method in METHODS else DEFAULTS
        return str(known.get(name, "default"))

    def metrics(self, when: str, kind: str) -> Mapping[str, Any]:
        """`metrics("after", "pairs")` by the passport; empty if it has none."""
        found = (self.passport.metrics if self.passport else {}).get(when, {}).get(kind, {})
        return found if isinstance(found, Mapping) else {}


def is_unfinished(folder: Path) -> bool:
    """True for the folder of a run that goes on or was interrupted, once it has logged something."""
    return folder.suffix == ".partial" and (folder / METRICS).is_file()


def _read_unfinished(folder: Path) -> StoredRun:
    """Read the folder of an unfinished run; a line that was cut off with it is left out."""
    recipe = read_settings(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    rows = tuple(whole_rows(folder / METRICS))
    before = _json(folder / BEFORE) if (folder / BEFORE).is_file() else {}
    texts = tuple(map(str, (before.get("checkup") or {}).get("texts", ())))
    return StoredRun(
        folder.resolve().name, folder, None, recipe, rows, unfinished=_how_far(folder, rows), first_look=texts
    )


def _how_far(folder: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    output, saved = folder.with_suffix(""), checkpoints(folder)
    step = max((int(row["step"]) for row in rows), default=0)
    total = f" of {_json(saved[-1] / 'trainer_state.json').get('max_steps')}" if saved else ""
    if running(output) is not None:
        return f"Not finished: {step}{total} steps so far. The run is going on."
    if not saved:
        return f"Not finished: {step} steps, and no checkpoint to go on from. Start it anew."
    return f"Not finished: {step}{total} steps. Continue with: {resume_command(output)}"


def read_run(folder: Path) -> StoredRun:
    """Read a run's folder, finished or not. Raises `AdapterError` if a file of it is broken."""
    if is_unfinished(folder):
        return _read_unfinished(folder)
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

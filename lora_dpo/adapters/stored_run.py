"""What a run's folder or an evaluation's folder holds, read for a report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lora_dpo.adapters.checkpoints import checkpoints
from lora_dpo.adapters.passport import PASSPORT, Passport, parse_passport
from lora_dpo.adapters.run_folder import METRICS, resume_command, running
from lora_dpo.adapters.stored_schema import (
    Evaluation,
    FirstLook,
    PassportParts,
    RecipeParts,
    Recorded,
    Row,
    TrainerState,
    check,
)
from lora_dpo.config.reading import read_settings
from lora_dpo.config.trl_dpo import DEFAULTS
from lora_dpo.config.trl_sft_kto import METHODS
from lora_dpo.errors import AdapterError

NUMBERS = "eval.json"
MEASURED = "measured.json"
BEFORE = "health-before.json"
BETA = 0.1
"""TRL's default of DPO and KTO."""
MAX_BYTES = 64 << 20
"""Of one file that a page shows."""
DRAWN = 1e30
"""The largest number of a row that is drawn, and one over the smallest."""


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
        return self.recipe.get("method") or "dpo"

    @property
    def beta(self) -> float:
        """β of DPO and KTO, TRL's default if the recipe names none; 1 for SFT, which has none."""
        given = (self.recipe.get("trainer") or {}).get("beta")
        return 1.0 if self.method == "sft" else BETA if given is None else float(given)

    def default(self, key: str) -> str:
        """The value of a setting that the recipe does not name; `default` where it is TRL's own."""
        section, _, name = key.partition(".")
        if section == "lora" and (self.recipe.get("reference") or "").startswith("adapter:"):
            return "as the reference has it"
        if section != "trainer":
            return "default"
        if name == "beta":
            return "none" if self.method == "sft" else f"{BETA:g}"
        known = METHODS[self.method].defaults if self.method in METHODS else DEFAULTS
        return str(known.get(name, "default"))

    def metrics(self, when: str, kind: str) -> Mapping[str, Any]:
        """`metrics("after", "pairs")` by the passport; empty if it has none."""
        found = (self.passport.metrics if self.passport else {}).get(when, {}).get(kind) or {}
        return {name: value for name, value in found.items() if value is not None}


def is_unfinished(folder: Path) -> bool:
    """True for the folder of a run that goes on or was interrupted, once it has logged something."""
    return folder.suffix == ".partial" and (folder / METRICS).is_file()


def _read_unfinished(folder: Path) -> StoredRun:
    """Read the folder of an unfinished run; a line that was cut off with it is left out."""
    rows = tuple(_lines(folder / METRICS, cut_off=True))
    before = _json(folder / BEFORE, FirstLook) if (folder / BEFORE).is_file() else {}
    texts = tuple((before.get("checkup") or {}).get("texts", ()))
    return StoredRun(
        *(folder.resolve().name, folder, None, _recipe(folder), rows),
        unfinished=_how_far(folder, rows),
        first_look=texts,
    )


def _how_far(folder: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    if odd := [path for path in folder.glob("checkpoints/checkpoint-*") if not re.search(r"-\d{1,15}$", path.name)]:
        raise AdapterError(f"{odd[0]} is no checkpoint: they are called by their step. Remove it.")
    output, saved = folder.with_suffix(""), checkpoints(folder)
    step = max((row["step"] for row in rows), default=0)
    total = f" of {_json(saved[-1] / 'trainer_state.json', TrainerState).get('max_steps')}" if saved else ""
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
    if passport is not None:
        check(folder / PASSPORT, PassportParts, {"metrics": passport.metrics, "data": passport.data})
    rows = tuple(_lines(folder / METRICS)) if (folder / METRICS).is_file() else ()
    measured = _json(folder / MEASURED, Recorded) if (folder / MEASURED).is_file() else {}
    return StoredRun(folder.resolve().name, folder, passport, _recipe(folder), rows, measured)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `eval.json` of a folder says. Raises `AdapterError` if it cannot be read."""
    found = _json(folder / NUMBERS)
    if found.get("format") != 1 or "numbers" not in found:
        raise AdapterError(f"{folder / NUMBERS} is no evaluation of this version. Evaluate again with: lora-dpo eval")
    check(folder / NUMBERS, Evaluation, found)
    return found


def is_evaluation(folder: Path) -> bool:
    """True for a folder that `lora-dpo eval` wrote."""
    return (folder / NUMBERS).is_file()


def number(row: Mapping[str, Any], key: str, scale: float = 1.0) -> float:
    """A number of a row, NaN where it is missing or beyond what can be drawn; 0 for what is as good as that."""
    value = row.get(key)
    if not isinstance(value, int | float) or not -DRAWN <= value <= DRAWN:
        return math.nan
    return float(value) * scale if abs(value) > 1 / DRAWN else 0.0


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return {}
    recipe = read_settings(path)
    check(path, RecipeParts, recipe)
    return recipe


def _json(path: Path, kind: type[BaseModel] | None = None) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read ({error}). Make it again, or remove it.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path} cannot be read (it is no JSON object). Make it again, or remove it.")
    if kind is not None:
        check(path, kind, found)
    return found


def _lines(path: Path, *, cut_off: bool = False) -> Iterator[Mapping[str, Any]]:
    """The rows of a log; with `cut_off` those before a line that is none, of a process that was killed meanwhile."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}). Make it again, or remove it.") from error
    for number_, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if cut_off:
                return
            raise AdapterError(f"{path}, line {number_}: broken JSON ({error}). Repair or remove that line.") from error
        if isinstance(row, dict):
            check(path, Row, row, f", line {number_},")
            yield row

"""The candidates of a search as rows of a table for programs, read from its folder: no model is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.evaluation.intervals import Interval
from lora_dpo.evaluation.report.table_file import Row, check_table, mean_row, seed_groups, table_text
from lora_dpo.files import atomic_files
from lora_dpo.tuning.folder import PAGE
from lora_dpo.tuning.trials import Trial

COSTS = ("unfinished", "repeated", "forgotten", "length")
NUMBERS = (
    *("score", "quality", *(f"cost_{name}" for name in COSTS), "kl", "accuracy", "length", "finished", "known"),
    *("first_sight", "steps", "seconds"),
)
"""Columns that a mean over seeds is taken of."""


def write_search_report(folder: Path, output: Path | None = None, table: Path | None = None) -> list[Path]:
    """Where the page of a search is, and its candidates as a table.

    Args:
        output: a file that the page is copied to.
        table: a file that the table is written to, `.csv` or `.json`; of a search that is not over, it has the
            candidates so far.

    Returns:
        The page, if there is one, and the table.

    Raises:
        ConfigError: the table has another ending.
        AdapterError: the search has no page yet, or no candidate; or a file of it cannot be read.
        OutputError: a file exists, or cannot be written.
    """
    if table is not None:
        check_table(table)
    page = folder / PAGE
    if not page.is_file() and (table is None or output is not None):
        raise AdapterError(
            f"The search in {folder} has no page: that is written at its end. --table FILE.csv has its candidates so "
            "far."
        )
    if table is not None and output is not None and table.absolute() == output.absolute():
        raise ConfigError(f"{table} cannot be both: give the page and the table a file each.")
    texts: dict[Path, str] = {}
    if output is not None:
        texts[output] = page.read_text(encoding="utf-8")
    if table is not None:
        texts[table] = table_text(table, candidate_rows(read_trials(folder)))
    with atomic_files(list(texts)) as temporaries:
        for temporary, content in zip(temporaries, texts.values(), strict=True):
            temporary.write_text(content, encoding="utf-8", newline="\n")
    here = [page] if output is None and page.is_file() else []
    return [*here, *texts]


def read_trials(folder: Path) -> list[Trial]:
    """The candidates of a search that are over, in their order. Raises `AdapterError` if there are none."""
    paths = [path for path in sorted((folder / "trials").glob("[0-9]*.json")) if path.stem.isdigit()]
    if not paths:
        raise AdapterError(f"No candidate of the search in {folder} is over, or it had too few prompts for any.")
    found = []
    for path in paths:
        try:
            found.append(Trial.from_json(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise AdapterError(f"{path} cannot be read ({error}).") from error
    return found


def candidate_rows(trials: Sequence[Trial]) -> list[Row]:
    """A row for each candidate; below them the means of those that differ in their seeds alone."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    rows: list[Row] = [_row(trial, keys) for trial in trials]
    groups = seed_groups(
        [json.dumps(dict(trial.values), sort_keys=True) if trial.score else None for trial in trials],
        [trial.seed for trial in trials],
    )
    for places in groups:
        group = [rows[place] for place in places]
        rows.append({**{key: group[0][key] for key in keys}, **mean_row(group, NUMBERS)})
    return rows


def _row(trial: Trial, keys: Sequence[str]) -> dict[str, Any]:
    found, scored = trial.measured, trial.score
    row: dict[str, Any] = {"kind": "candidate", "runs": 1, "candidate": trial.number}
    row |= {key: trial.values.get(key) for key in keys} | {"seed": trial.seed}
    row |= {"score": scored.value if scored else None, "score_low": scored.low if scored else None}
    row |= _ends("quality", scored.quality if scored else None)
    row |= {f"cost_{name}": scored.costs.get(name, 0.0) if scored else None for name in COSTS}
    row["kl"] = found.kl if found else None
    row |= _ends("accuracy", found.accuracy if found else None)
    row["length"] = fmean(found.tokens) if found and found.tokens else None
    row["finished"] = fmean(map(float, found.finished)) if found and found.finished else None
    row["known"] = found.known if found and found.questions else None
    row["questions"] = found.questions if found else None
    row |= _ends("first_sight", trial.learned)
    row |= {"steps": trial.steps, "steps_planned": trial.planned, "seconds": trial.seconds}
    return row | {"ended_early": trial.ended or None}


def _ends(name: str, found: Interval | None) -> dict[str, float | None]:
    """A number with both ends of its interval."""
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}

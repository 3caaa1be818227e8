"""Runs and evaluations as rows of a table, and runs that differ in their seeds alone as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_dpo.adapters.stored_run import StoredRun
from lora_dpo.adapters.stored_schema import NAMES
from lora_dpo.evaluation.report.one_run import ANSWERS, PAIRS, flat
from lora_dpo.evaluation.report.table_file import HALF, Row, mean_row, seed_groups

SEED = "trainer.seed"
HIDDEN = ("output",)
"""Settings that differ between any two runs."""
RENAMED = {"mean_tokens": "length", "correct": "known"}
"""Columns whose names in a passport are others than in an evaluation or a search."""
RESULTS = [
    (kind, key, label, form) for kind, known in (("pairs", PAIRS), ("answers", ANSWERS)) for key, label, form in known
]
NUMBERS = [RENAMED.get(key, key) for _, key, _, _ in RESULTS]
"""Columns with what a run measured on held-out data."""


def differences(runs: Sequence[StoredRun]) -> list[tuple[str, ...]]:
    """Rows `(setting, value of each run)` of settings that are not the same in all runs."""
    settings = [dict(flat(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    both = list(zip(runs, settings, strict=True))
    rows = [(key, *(one[key] if key in one else run.default(key) for run, one in both)) for key in keys]
    return [row for row in rows if row[0] not in HIDDEN and len(set(row[1:])) > 1]


def result_rows(runs: Sequence[StoredRun], evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """A row for each run, evaluation and group of seeds."""
    rows = run_rows(runs)
    return [*rows, *group_rows(runs, rows), *(evaluation_row(name, one) for name, one in evaluations)]


def run_rows(runs: Sequence[StoredRun]) -> list[dict[str, Any]]:
    """Of each run its name, the settings that differ, and what it measured on held-out data after training."""
    differ = [key for key, *_ in differences(runs)]
    rows = []
    for run in runs:
        given = dict(_values(run.recipe))
        settings = {key: given[key] if key in given else _number(run.default(key)) for key in differ}
        found = {RENAMED.get(key, key): run.metrics("after", kind).get(key) for kind, key, _, _ in RESULTS}
        rows.append({"kind": "run", "name": run.name, "runs": 1, **settings, **found})
    return rows


def group_rows(runs: Sequence[StoredRun], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means of the rows of runs whose settings differ in nothing but their seeds."""
    differ = differences(runs)
    seeds = next((row[1:] for row in differ if row[0] == SEED), ("",) * len(runs))
    others = [row for row in differ if row[0] != SEED]
    # Of a run without a recipe nobody knows how it differs, and one that goes on has measured nothing yet.
    keys = [
        tuple(row[1 + place] for row in others) if run.recipe and _measured(rows[place]) else None
        for place, run in enumerate(runs)
    ]
    found = []
    for places in seed_groups(keys, seeds):
        group = [rows[place] for place in places]
        settings = {row[0]: group[0][row[0]] for row in others}
        name = "mean of " + ", ".join(str(row["name"]) for row in group)
        found.append({"name": name, **settings, **mean_row(group, NUMBERS)})
    return found


def group_cells(row: Row) -> list[str]:
    """The results of a group, `mean ± half`, as they are written for a single run."""
    cells = []
    for name, (_, _, _, form) in zip(NUMBERS, RESULTS, strict=True):
        half = form.replace("+", "")
        known = row.get(name) is not None
        cells.append(f"{form.format(row[name])} ± {half.format(row[name + HALF])}" if known else "")
    return cells


def evaluation_row(name: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation measured, each number with both ends of its interval."""
    row: dict[str, Any] = {"kind": "evaluation", "name": name, "runs": 1}
    for key in NAMES:
        if found := stored["numbers"].get(key):
            column = key.replace("-", "_")
            row |= {column: found["value"], f"{column}_low": found["low"], f"{column}_high": found["high"]}
    return row


def _measured(row: Row) -> bool:
    return any(row.get(name) is not None for name in NUMBERS)


def _values(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with dotted names, their values as they are."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(text: str) -> Any:
    """The value that `StoredRun.default` says."""
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text

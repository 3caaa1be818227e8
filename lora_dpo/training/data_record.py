"""The data of a run as its passport records it, and what of it has changed when a recipe is run again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo import places
from lora_dpo.adapters.passport import PASSPORT, Passport, parse_passport
from lora_dpo.config.recipe import Recipe
from lora_dpo.data.rows import file_of
from lora_dpo.errors import AdapterError
from lora_dpo.files import numbered, sha256_of

if TYPE_CHECKING:
    from lora_dpo.training.prepared import Run


def data_record(run: Run) -> dict[str, Any]:
    """For training and held-out data: hashes of the files, rows, what they became, and what was dropped."""
    return {which: _record(run, which, sources) for which, sources in _sources(run.recipe)}


def _sources(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    held_out = recipe.data.eval if recipe.data.hold_out is None else recipe.data.train
    for which, sources in (("train", recipe.data.train), ("eval", held_out)):
        if sources is not None:
            yield which, [sources] if isinstance(sources, str) else sources


def _record(run: Run, which: str, sources: list[str]) -> dict[str, Any]:
    report = run.reports[which]
    rows = {"train": run.train or run.answers, "eval": run.held_out_answers or run.held_out}[which]
    return {
        "sha256": {source: _sha256(source) for source in sources},
        "rows": report.rows,
        run.unit: report.kept,
        "prompts": len({tuple(row.prompt) for row in rows}),
        "dropped": dict(report.reasons()),
    }


def _sha256(source: str) -> str | None:
    """Of a file; None for a folder and a hub data set."""
    return sha256_of(file_of(source)) if file_of(source).is_file() else None


def changed_data(recipe: Recipe, name: str, output: Path) -> tuple[str, str] | None:
    """A line `(label, value)` for the run's header if a data file is another than its last adapter was trained on.

    Args:
        name: the recipe's name.
        output: the folder that the run will make; the last adapter is the one numbered before it.
    """
    if recipe.output is not None:  # another place than that of an adapter before it
        return None
    before = takewhile(lambda folder: folder != output, map(places.adapters().joinpath, numbered(name)))
    earlier = [folder for folder in before if (folder / PASSPORT).is_file()]
    if not earlier:
        return None
    try:
        passport = parse_passport(earlier[-1] / PASSPORT)
    except AdapterError:
        return None  # a broken passport is no matter of this run
    changed = _changed(recipe, passport)
    if not changed:
        return None
    return "changed", f"{', '.join(changed)} since {earlier[-1]} was trained ({passport.created[:10]})"


def _changed(recipe: Recipe, passport: Passport) -> list[str]:
    """Files of both that have other bytes now."""
    found: dict[str, None] = {}
    for which, sources in _sources(recipe):
        record = passport.data.get(which)
        known = record.get("sha256") if isinstance(record, dict) else None
        for source in sources:
            was = known.get(source) if isinstance(known, dict) else None
            if was is not None and was != _sha256(source):
                found[source] = None
    return list(found)

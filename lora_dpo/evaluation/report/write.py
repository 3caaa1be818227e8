"""The right page for a folder (a run, an evaluation, or several of either), written to a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_dpo import places
from lora_dpo.adapters.passport import check_folder
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.adapters.stored_run import StoredRun, is_evaluation, is_unfinished, read_evaluation, read_run
from lora_dpo.errors import AdapterError
from lora_dpo.evaluation.report.one_evaluation import evaluation_page, number_rows
from lora_dpo.evaluation.report.one_run import run_page
from lora_dpo.evaluation.report.several import comparison_page, named_apart
from lora_dpo.evaluation.report.side_rows import result_rows
from lora_dpo.evaluation.report.table_file import Row, check_table, table_text
from lora_dpo.files import atomic_files, numbered

__all__ = ["PAGE", "evaluation_page", "number_rows", "report_of", "write_report"]

PAGE = "report.html"


def report_of(folders: Sequence[Path], *, name: str | None = None) -> str:
    """The page of one run or evaluation, or of several side by side.

    Args:
        name: what a single run is called, where its folder does not have its final name yet.

    Raises:
        AdapterError: a file in them cannot be read.
    """
    runs, evaluations = _read(folders)
    if len(folders) == 1:
        return run_page(replace(runs[0], name=name or runs[0].name)) if runs else evaluation_page(evaluations[0][1])
    return comparison_page(runs, evaluations)


def table_of(folders: Sequence[Path]) -> list[Row]:
    """A row for each run and evaluation, and for runs that differ in their seeds alone one more with the means."""
    return result_rows(*named_apart(*_read(folders)))


def _read(folders: Sequence[Path]) -> tuple[list[StoredRun], list[tuple[str, dict[str, Any]]]]:
    runs = [read_run(folder) for folder in folders if not is_evaluation(folder)]
    return runs, [(folder.resolve().name, read_evaluation(folder)) for folder in folders if is_evaluation(folder)]


def find_run(name: str | Path) -> Path:
    """The folder of a run or an evaluation, given as one or as a name in `adapters/` or `evaluations/`.

    Where there is none, what was given: `write_report` says so.
    """
    given = Path(os.path.expanduser(name))
    ways = [given, *(root / given for root in (places.adapters(), places.evaluations(), places.project()))]
    return next((way for way in ways if os.path.isdir(way)), given)


def write_report(folders: Sequence[Path], output: Path | None = None, table: Path | None = None) -> Path:
    """Write that page; by default to a free name in `reports/`.

    Args:
        table: a file that the same results are written to, `.csv` or `.json`; both files appear, or none.

    Raises:
        ConfigError: the table has another ending.
        AdapterError: a folder is neither an adapter nor an evaluation, or a file in it cannot be read.
        OutputError: the file exists, or cannot be written.
    """
    if table is not None:
        check_table(table)
    for folder in folders:
        if not folder.is_dir():
            partial = partial_of(folder)
            hint = f" An unfinished run is in {partial}." if is_unfinished(partial) else ""
            raise AdapterError(f"There is no folder {folder}.{hint} Name adapter folders, or what lora-dpo eval wrote.")
        if not is_evaluation(folder) and not is_unfinished(folder):
            check_folder(folder)
    text = report_of(folders)
    stem = folders[0].resolve().name if len(folders) == 1 else "comparison"
    free = (place for place in map(places.reports().joinpath, numbered(stem, ".html")) if not place.exists())
    target = output or next(free)
    texts = {target: text}
    if table is not None:
        texts[table] = table_text(table, table_of(folders))
    with atomic_files(list(texts)) as temporaries:
        for temporary, content in zip(temporaries, texts.values(), strict=True):
            temporary.write_text(content, encoding="utf-8", newline="\n")
    return target

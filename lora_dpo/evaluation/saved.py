"""Where evaluations are kept: a folder each, with the numbers for programs and the page for people."""

from __future__ import annotations

import json
from pathlib import Path

from lora_dpo import places
from lora_dpo.adapters.stored_run import NUMBERS
from lora_dpo.evaluation.report.write import PAGE, evaluation_page
from lora_dpo.evaluation.result import Assessment
from lora_dpo.files import atomic_folder, numbered, refuse_existing


def evaluation_folder(name: str, output: Path | None) -> Path:
    """The folder to write: the given one, which must not exist, or a free name under `evaluations/`.

    Raises:
        OutputError: the given folder exists.
    """
    if output is not None:
        refuse_existing(output)
        return output
    return next(place for place in map(places.evaluations().joinpath, numbered(name)) if not place.exists())


def save_evaluation(folder: Path, found: Assessment) -> None:
    """Write `eval.json` and `report.html`: both or nothing. Raises `OutputError`."""
    stored = found.to_json()
    with atomic_folder(folder) as place:
        (place / NUMBERS).write_text(
            json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
        )
        (place / PAGE).write_text(evaluation_page(stored), encoding="utf-8", newline="\n")

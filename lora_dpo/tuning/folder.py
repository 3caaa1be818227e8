"""Where a search lies, and that it is gone on with as it was begun.

adapters/NAME                 the chosen adapter, when the search is over
adapters/NAME.search          the search: what it was begun with, its parts of the data, its trials, its page
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dpo import places
from lora_dpo.adapters.package import BASE
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.files import numbered, write_json

ENDING = ".search"
BEGUN, RESULT, PAGE, TABLE = "search.json", "result.json", "search.html", "trials.json"


def search_of(output: Path) -> Path:
    """The folder of the search that will make `output`."""
    return output.with_name(output.name + ENDING)


def is_search(folder: Path) -> bool:
    """Whether a folder is one of a search."""
    return (folder / BEGUN).is_file()


def choose_place(output: str | None, name: str, *, resume: bool) -> Path:
    """The adapter folder of a search: the recipe's `output`, or a free name in `adapters/`.

    With `resume` the unfinished search of that name which was touched last.

    Raises:
        OutputError: the output is taken, or there is nothing to resume.
    """
    if output is not None:
        place = Path(output)
        if resume and not is_search(search_of(place)):
            raise OutputError(f"No search is in {search_of(place)}. Start it without --resume.")
        if not resume and search_of(place).exists():
            raise OutputError(f"A search is in {search_of(place)}. Go on with --resume, or remove that folder.")
        if place.exists():
            raise OutputError(f"{place} exists already, and is never overwritten. Set another output.")
        return place
    root = places.adapters()
    names = list(itertools.islice(numbered(name), 1000))[name.casefold() == BASE :]
    found = [root / one for one in names]
    if resume:
        left = [one for one in found if is_search(search_of(one)) and not (search_of(one) / RESULT).exists()]
        if not left:
            raise OutputError(f"No unfinished search of {name} is in {root}. Start it without --resume.")
        return max(left, key=lambda one: (search_of(one) / BEGUN).stat().st_mtime)
    return next(one for one in found if not any(way.exists() for way in (one, partial_of(one), search_of(one))))


def claim(folder: Path, begun: Mapping[str, Any]) -> None:
    """Write down what a search is begun with, or check that it is the same.

    Raises:
        ConfigError: it was begun otherwise: its trials could not be compared with new ones.
    """
    path = folder / BEGUN
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, begun)
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in json.loads(json.dumps(begun)).items() if stored.get(key) != value]
    if changed:
        raise ConfigError(
            f"The search in {folder} was begun with another {changed[0]}. Its trials cannot be compared with new ones: "
            "go on with the same settings and data, or start anew without --resume."
        )

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
from lora_dpo.adapters.run_folder import discard_run, partial_of
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.data.journal import alone
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.files import disk_errors, numbered, write_json
from lora_dpo.leftovers import discard
from lora_dpo.tuning.space import Axis

ENDING = ".search"
BEGUN, CHOSEN = "search.json", "chosen.yaml"
RESULT, PAGE, TABLE = "result.json", "search.html", "trials.json"
OPTIONS = ("judge", "seed", "all_data", "without_suspicious")
"""Of `tune`, those that a search is gone on with."""
HELD = "search"
"""What the one process holds that searches (`journal.alone`)."""


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


def unfinished_searches(root: Path) -> list[str]:
    """Names of the adapters in `root` that an interrupted search can still become; of sweeps none."""
    return sorted(folder.name.removesuffix(ENDING) for folder in root.glob("[!.]*" + ENDING) if _is_left(folder))


def _is_left(folder: Path) -> bool:
    if (
        not is_search(folder)
        or (folder / RESULT).exists()
        or folder.with_name(folder.name.removesuffix(ENDING)).exists()
    ):
        return False
    try:
        if (folder / f"{HELD}.lock").exists():
            with alone(folder / HELD):  # of a killed process nobody holds it
                pass
        return "all_data" in json.loads((folder / BEGUN).read_text(encoding="utf-8"))
    except (OutputError, OSError, ValueError):
        return False


def begun_recipe(output: Path) -> Recipe:
    """What an interrupted search varies. Raises `ConfigError` if that cannot be read."""
    return check_recipe(_begun(output)["recipe"], where=str(search_of(output) / BEGUN)).model_copy(
        update={"output": output.as_posix()}
    )


def begun_options(output: Path) -> dict[str, Any]:
    """The options of `tune` that an interrupted search was begun with. Raises `ConfigError` if they cannot be read."""
    stored = _begun(output)
    axes = [Axis(**{**axis, "choices": tuple(axis["choices"])}) for axis in stored["axes"]]
    return {"axes": axes, **{name: stored[name] for name in OPTIONS if name in stored}}


def _begun(output: Path) -> dict[str, Any]:
    path = search_of(output) / BEGUN
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from error
    return found


def discard_search(output: Path) -> None:
    """Remove what an unfinished search left. Raises `OutputError` if it goes on, or the disk refuses."""
    folder = search_of(output)
    with disk_errors(folder):
        if folder.is_dir():
            with alone(folder / HELD):
                pass  # let go before: on Windows the folder of an open file keeps its name
            discard(folder)
    discard_run(output)  # of one that had too few prompts to choose by


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

"""What killed commands left behind, to look at and to remove; nothing of it is needed, and nothing of it is in use."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_dpo.adapters.checkpoints import checkpoints, torn
from lora_dpo.adapters.run_folder import LOCK, OWNER, discard_run, partial_of, running
from lora_dpo.cli.crash import crash_reports
from lora_dpo.config.reading import read_recipe
from lora_dpo.errors import LoraDPOError
from lora_dpo.leftovers import discard, is_held, left_in, scratch_folders, sweep_one

SUFFIX = ".partial"


@dataclass(frozen=True)
class Leftover:
    """Something that may go."""

    path: Path
    what: str
    size: int
    """Bytes."""


def leftovers(roots: Iterable[Path], temporary: Path | None = None) -> list[Leftover]:
    """Everything under some folders, and this user's in the place for temporary files, that no process holds.

    Interrupted runs that can go on are none.
    """
    temporary = temporary or Path(tempfile.gettempdir())
    found = [
        *{path.absolute(): (path, what) for root in roots for path, what in _beside_results(root)}.values(),
        *((path, "scratch of a killed command") for path in scratch_folders(temporary)),
        *((path, "the report of a crash") for path in crash_reports(temporary)),
    ]
    return [Leftover(path, what, _size(path)) for path, what in found if what in _RUNS or not is_held(path)]


def remove(left: Leftover) -> bool:
    """Remove a leftover, unless it came into use meanwhile; True if it is gone."""
    with contextlib.suppress(LoraDPOError, OSError):
        if left.what in (NO_CHECKPOINT, FINISHED):
            discard_run(left.path.with_name(left.path.name.removesuffix(SUFFIX)))
        elif left.what == TORN:
            discard(left.path)
        else:
            sweep_one(left.path, asked=True)
    return not os.path.lexists(left.path)


NO_CHECKPOINT = "a run without a checkpoint to go on from"
FINISHED = "an unfinished run whose adapter is there"
TORN = "a checkpoint that was cut off"
_RUNS = (NO_CHECKPOINT, FINISHED, TORN)
OF_A_RUN = {"recipe.yaml", LOCK, OWNER, "checkpoints", "metrics.jsonl", "before.json", "health-before.json"}
"""Names of what a run writes into its folder; whoever keeps more there keeps it."""
_KINDS = {
    "unfinished": "a result that was cut off",
    "removed": "a removal that was cut off",
    "together": "files that were to appear together",
}


def _beside_results(root: Path) -> Iterator[tuple[Path, str]]:
    for place, folders, _ in os.walk(root):
        here = Path(place)
        for path in left_in(here):
            yield path, _KINDS[path.name.rpartition(".")[2]]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            if name.endswith(SUFFIX) and name != SUFFIX:
                folders.remove(name)
                yield from _of_a_run(here / name)


def _of_a_run(partial: Path) -> Iterator[tuple[Path, str]]:
    try:
        inside = {path.name for path in partial.iterdir() if path not in left_in(partial)}
    except OSError:
        return  # not ours to look into
    output = partial.with_name(partial.name.removesuffix(SUFFIX))
    if not inside & {"recipe.yaml", LOCK} or not inside <= OF_A_RUN or running(output) is not None:
        return  # somebody else's folder, or at work
    if not checkpoints(partial):
        yield partial, NO_CHECKPOINT
    elif _became(output):
        yield partial, FINISHED
    else:
        for place in (partial, partial / "checkpoints"):
            yield from ((path, _KINDS[path.name.rpartition(".")[2]]) for path in left_in(place))
        yield from ((path, TORN) for path in torn(partial))


def _became(output: Path) -> bool:
    """True if an adapter is the result of the unfinished run beside it."""
    try:
        return read_recipe(output / "recipe.yaml") == read_recipe(partial_of(output) / "recipe.yaml")
    except LoraDPOError:
        return False


def _size(path: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        inside = path.rglob("*") if path.is_dir() else [path]
        total = sum(file.lstat().st_size for file in inside if file.is_file())
    return total

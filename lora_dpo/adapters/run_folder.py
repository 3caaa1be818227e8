"""Where a run writes: the adapter folder it will become, and the unfinished run beside it.

adapters/quickstart            the result: appears whole, at the end
adapters/quickstart.partial    a run that goes on or was interrupted: recipe, checkpoints, metrics

While a run goes on it holds a lock on `running.lock` in its unfinished folder, so that no other run clears or
continues the folder under its feet; `running.json` says which process that is, for people. Two files, since on Windows
nobody can read or write what is locked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo import places
from lora_dpo.adapters.checkpoints import begin, checkpoints, newest_whole, read_state
from lora_dpo.adapters.package import BASE
from lora_dpo.config.reading import dump_recipe, read_recipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.files import disk_errors, numbered, refuse_existing, replace_file
from lora_dpo.leftovers import discard, settle
from lora_dpo.systems import command_line, nearest_existing, sync

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK, OWNER = "running.lock", "running.json"
METRICS = "metrics.jsonl"

_held: dict[tuple[int, Path], tuple[BaseFileLock, int]] = {}
"""By process and unfinished folder: the lock of a run that goes on here, and the inode that it is on."""


def choose_output(recipe: Recipe, recipe_name: str, *, resume: bool) -> Path:
    """The adapter folder: the recipe's `output`, or a free name under `adapters/`.

    With `resume` and no `output`, the unfinished run of this recipe that was touched last.

    Raises:
        OutputError: the recipe's `output` is taken, or there is nothing to resume.
    """
    if recipe.output is not None:
        check_place(Path(recipe.output), resume=resume)
        return Path(recipe.output)
    root = places.adapters()
    names = list(itertools.islice(numbered(recipe_name), 1000))
    names = names[recipe_name.casefold() == BASE :]  # that adapter could not be chosen in serve and demo
    if resume:
        unfinished = [out for out in map(root.joinpath, names) if _interrupted(out) and running(out) is None]
        if not unfinished:
            raise OutputError(f"No interrupted run of {recipe_name} is in {root}. Start it without --resume.")
        return max(unfinished, key=lambda output: partial_of(output).stat().st_mtime)
    return next(
        out for out in map(root.joinpath, names) if not (out.exists() or _interrupted(out) or running(out) is not None)
    )


def partial_of(output: Path) -> Path:
    """The folder of the unfinished run that will become `output`."""
    return output.with_name(output.name + ".partial")


def interrupted_runs(root: Path) -> list[str]:
    """Names of the adapters in `root` that an interrupted run can still become, the last touched first."""
    ends = [partial.name.removesuffix(".partial") for partial in root.glob("[!.]*.partial")]
    left = [name for name in ends if _interrupted(root / name) and not (root / name).exists()]
    left = [name for name in left if running(root / name) is None]
    return sorted(left, key=lambda name: _touched(partial_of(root / name)), reverse=True)


def logged_rows(partial: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that a resumed run keeps: those up to its last checkpoint."""
    saved = checkpoints(partial)
    if not saved or not (partial / METRICS).is_file():
        return []
    return _rows_until(partial / METRICS, read_state(saved[-1])["global_step"])


def open_run(
    recipe: Recipe, output: Path, *, resume: bool, say: Callable[[str], object] = lambda text: None
) -> Path | None:
    """Prepare the run's folder; return the checkpoint to resume from, or None for a fresh start.

    The folder is this process's until `release`.

    Args:
        say: is told of checkpoints that are not whole, so that an older one is gone on from.

    Raises:
        OutputError: the output exists, another run is in the way, or there is no whole checkpoint.
        ConfigError: resuming with other settings than the run began with.
    """
    check_place(output, resume=resume)
    partial = partial_of(output)
    if resume:
        _check_same_recipe(recipe, output)
    with disk_errors(partial):
        _claim(output)
        try:
            return _opened(recipe, partial, resume, say)
        except BaseException:
            release(partial)
            raise


def _opened(recipe: Recipe, partial: Path, resume: bool, say: Callable[[str], object]) -> Path | None:
    settle(partial)
    settle(partial / "checkpoints")
    found: Path | None = None
    if resume:
        found, complaints = newest_whole(partial)
        if found is None:
            raise OutputError(
                f"No checkpoint in {partial} is whole: {'; '.join(complaints)}. Remove that folder, and start the run "
                "without --resume."
            )
        if complaints:
            say(f"{'; '.join(complaints)}: going on from {found.name}.")
    else:
        _clear(partial)
        replace_file(partial / "recipe.yaml", dump_recipe(recipe))
    begin(partial, found)
    return found


def release(partial: Path) -> None:
    """Say that this process's run in `partial` goes on no longer, so that it can be resumed."""
    lock, inode = _held.pop((os.getpid(), partial.absolute()), (None, 0))
    if lock is None:
        return
    path = partial / LOCK
    with contextlib.suppress(OSError):
        # Removed while it is held: whoever waits for this file sees that it has no name any more. It may be gone with
        # its folder, and the next run's be there.
        if path.stat().st_ino == inode:
            (partial / OWNER).unlink(missing_ok=True)
            path.unlink()  # Windows refuses; filelock removes it there when it is let go
    lock.release()


def discard_own(partial: Path) -> None:
    """Remove the unfinished run that this process holds, if it is there. Raises `OSError`."""
    if sys.platform == "win32":
        release(partial)  # an open file there keeps the folder; a run that begins this moment keeps it, too
    discard(partial)


def discard_run(output: Path) -> None:
    """Remove what an unfinished run left. Raises `OutputError` if the run goes on, or the disk refuses."""
    partial = partial_of(output)
    with disk_errors(partial):
        if not partial.is_dir():
            return
        if (os.getpid(), partial.absolute()) in _held:
            raise OutputError(f"The run in {partial} goes on in this process. Stop it first.")
        _claim(output)
        try:
            discard_own(partial)
        finally:
            release(partial)


def check_space(output: Path, needed: int) -> None:
    """Raise `OutputError` if the disk cannot hold `needed` bytes."""
    folder = nearest_existing(output)
    with disk_errors(output):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"The disk of {folder} has {free / 1e6:.0f} MB free; this run writes up to {needed / 1e6:.0f} MB "
            "(adapter and checkpoints). Free some space or set output: to another disk."
        )


def resume_command(output: Path) -> str:
    """The command that continues an interrupted run."""
    return command_line(["lora-dpo", "train", str(partial_of(output) / "recipe.yaml"), "--resume"])


class RunLog:
    """`metrics.jsonl` of a run: one JSON object a line, kept across interruptions."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Open the log, forgetting rows after `from_step`: those steps will be run again."""
        self.path = path
        self.rows = _rows_until(path, from_step) if path.is_file() else []
        replace_file(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and write it at once."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        sync(self.path)


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in whole_rows(path) if row["step"] <= step]


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, up to one that was cut off."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the last line: the process was killed while it wrote it


# --- who may write --------------------------------------------------------------------------------


def check_place(output: Path, *, resume: bool) -> None:
    """Raise `OutputError` unless a run may write there: nothing lies there, and no other run is at it."""
    refuse_existing(output)
    partial = partial_of(output)
    process = running(output)
    if process is not None:
        raise OutputError(
            f"A run is going on in {partial} (process {process or 'unknown'}). Wait for its end, or set another output."
        )
    if resume and not _interrupted(output):
        raise OutputError(f"{partial} holds no checkpoint to resume from. Start the run without --resume.")
    if _interrupted(output) and not resume:
        raise OutputError(
            f"An interrupted run is in {partial}. Continue it with --resume, or remove that folder to start over."
        )


def _interrupted(output: Path) -> bool:
    return bool(checkpoints(partial_of(output)))


def _touched(partial: Path) -> float:
    return partial.stat().st_mtime if partial.exists() else 0.0  # removed, perhaps while we look


def running(output: Path) -> int | None:
    """The other process of this machine that works towards `output`, or None; 0 if it does not say which it is."""
    partial = partial_of(output)
    if (os.getpid(), partial.absolute()) in _held or not (partial / LOCK).exists():
        return None
    lock = _lock(partial)
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return _process_in(partial / OWNER) or 0
    except OSError:
        return None  # not ours to write to, or gone this moment: whoever claims it will be told
    lock.release()
    return None


def _process_in(owner: Path) -> int | None:
    """The process that the file beside a lock names; None if it names none, or it was cut off."""
    try:
        return int(json.loads(owner.read_text(encoding="utf-8"))["process"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(partial: Path) -> BaseFileLock:
    import filelock

    return filelock.FileLock(partial / LOCK, thread_local=False)


def _claim(output: Path) -> None:
    """Take the lock. Only one of two processes that start together gets it."""
    partial = partial_of(output)
    key = (os.getpid(), partial.absolute())
    if key in _held:
        return
    lock = _lock(partial)
    taken = OutputError(f"A run has just started in {partial}. Wait for its end, or set another output.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.5)  # another may just be looking whether it is held
    except TimeoutError:
        raise taken from None
    except FileNotFoundError:
        if partial.parent.is_dir():  # the folder went in between: another run ended in this moment
            raise taken from None
        raise
    said = json.dumps({"process": os.getpid(), "host": platform.node()})
    (partial / OWNER).write_text(said, encoding="utf-8", newline="\n")
    _held[key] = lock, (partial / LOCK).stat().st_ino


def _clear(partial: Path) -> None:
    """Remove what a run left that cannot be resumed; the lock is ours."""
    for path in list(partial.iterdir()):
        if path.name not in (LOCK, OWNER):
            discard(path)


def _check_same_recipe(recipe: Recipe, output: Path) -> None:
    began_with = read_recipe(partial_of(output) / "recipe.yaml")
    if began_with == recipe:
        return
    old, new = dump_recipe(began_with).splitlines(), dump_recipe(recipe).splitlines()
    changed = [line.strip() for line in new if line not in old]
    gone = [f"without {line.strip()}" for line in old if line not in new]
    raise ConfigError(
        f"The interrupted run in {partial_of(output)} began with other settings (now: "
        f"{'; '.join((changed or gone)[:3])}). Resume it with its own recipe: {resume_command(output)}"
    )

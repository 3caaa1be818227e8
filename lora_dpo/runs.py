"""Where a run writes: the adapter folder it will become, and the unfinished run beside it.

adapters/quickstart            the result: appears whole, at the end
adapters/quickstart.partial    a run that goes on or was interrupted: recipe, checkpoints, metrics

While a run goes on, `running.json` in its unfinished folder names the process, so that no other run
clears or continues the folder under its feet.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dpo.config import Recipe, dump_recipe, read_recipe
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.files import disk_errors, refuse_existing
from lora_dpo.package import BASE

ADAPTERS_DIR = Path("adapters")
LOCK = "running.json"
METRICS = "metrics.jsonl"


def choose_output(recipe: Recipe, recipe_name: str, *, resume: bool) -> Path:
    """The adapter folder: the recipe's `output`, or a free name under `adapters/`.

    With `resume` and no `output`, the unfinished run of this recipe that was touched last.

    Raises:
        OutputError: the recipe's `output` is taken, or there is nothing to resume.
    """
    if recipe.output is not None:
        _check_place(Path(recipe.output), resume=resume)
        return Path(recipe.output)
    names = [recipe_name, *(f"{recipe_name}-{number}" for number in range(2, 1000))]
    names = names[recipe_name.casefold() == BASE :]  # that adapter could not be chosen in serve and demo
    if resume:
        unfinished = [out for out in map(ADAPTERS_DIR.joinpath, names) if _interrupted(out) and not running(out)]
        if not unfinished:
            raise OutputError(f"No interrupted run of {recipe_name} is in {ADAPTERS_DIR}. Start it without --resume.")
        return max(unfinished, key=lambda output: partial_of(output).stat().st_mtime)
    places = map(ADAPTERS_DIR.joinpath, names)
    return next(out for out in places if not (out.exists() or _interrupted(out) or running(out)))


def partial_of(output: Path) -> Path:
    """The folder of the unfinished run that will become `output`."""
    return output.with_name(output.name + ".partial")


def checkpoints(partial: Path) -> list[Path]:
    """Checkpoints of an unfinished run, oldest first."""
    found = [path for path in partial.glob("checkpoints/checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def interrupted_runs(root: Path) -> list[str]:
    """Names of the adapters in `root` that an interrupted run can still become, the last touched first."""
    ends = [partial.name.removesuffix(".partial") for partial in root.glob("[!.]*.partial")]
    left = [name for name in ends if _interrupted(root / name) and not (root / name).exists()]
    left = [name for name in left if not running(root / name)]
    return sorted(left, key=lambda name: _touched(partial_of(root / name)), reverse=True)


def logged_rows(partial: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that a resumed run keeps: those up to its last checkpoint."""
    saved = checkpoints(partial)
    if not saved or not (partial / METRICS).is_file():
        return []
    state = json.loads((saved[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    return _rows_until(partial / METRICS, state["global_step"])


def open_run(recipe: Recipe, output: Path, *, resume: bool) -> Path | None:
    """Prepare the run's folder; return the checkpoint to resume from, or None for a fresh start.

    The folder is this process's until `release`.

    Raises:
        OutputError: the output exists, or another run is in the way.
        ConfigError: resuming with other settings than the run began with.
    """
    _check_place(output, resume=resume)
    partial = partial_of(output)
    if resume:
        _check_same_recipe(recipe, output)
    with disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        _claim(output)
        if resume:
            return checkpoints(partial)[-1]
        _clear(partial)
        (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return None


def release(partial: Path) -> None:
    """Say that this process's run in `partial` goes on no longer, so that it can be resumed."""
    lock = partial / LOCK
    if _process_in(lock) == os.getpid():
        lock.unlink(missing_ok=True)


def check_space(output: Path, needed: int) -> None:
    """Raise `OutputError` if the disk cannot hold `needed` bytes."""
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"The disk of {folder} has {free / 1e6:.0f} MB free; this run writes up to {needed / 1e6:.0f} MB "
            "(adapter and checkpoints). Free some space or set output: to another disk."
        )


def resume_command(output: Path) -> str:
    """The command that continues an interrupted run."""
    return f"lora-dpo train {shlex.quote(str(partial_of(output) / 'recipe.yaml'))} --resume"


class RunLog:
    """`metrics.jsonl` of a run: one JSON object a line, kept across interruptions."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Open the log, forgetting rows after `from_step`: those steps will be run again."""
        self.path = path
        self.rows = _rows_until(path, from_step) if path.is_file() else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and write it at once."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


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


def _check_place(output: Path, *, resume: bool) -> None:
    refuse_existing(output)
    partial = partial_of(output)
    if process := running(output):
        raise OutputError(
            f"A run is going on in {partial} (process {process}). Wait for its end, or set another output; if that "
            f"process is something else, remove {partial / LOCK}."
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
    """The other process of this machine that works towards `output`, or None."""
    import psutil

    process = _process_in(partial_of(output) / LOCK)
    return process if process not in (None, os.getpid()) and psutil.pid_exists(process) else None


def _process_in(lock: Path) -> int | None:
    """The process named by a lock; None for no lock, another machine's, or one that was cut off."""
    try:
        found = json.loads(lock.read_text(encoding="utf-8"))
        return int(found["process"]) if found["host"] == platform.node() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _claim(output: Path) -> None:
    """Write the lock. Only one of two processes that start together gets it."""
    lock = partial_of(output) / LOCK
    if lock.exists() and not running(output):
        lock.unlink(missing_ok=True)  # of a process that ended without `release`
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"process": os.getpid(), "host": platform.node()}))
    except FileExistsError:
        raise OutputError(
            f"A run has just started in {lock.parent}. Wait for its end, or set another output."
        ) from None


def _clear(partial: Path) -> None:
    """Remove what a run left that cannot be resumed; the lock is ours."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


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

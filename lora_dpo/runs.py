"""Where a run writes: the adapter folder it will become, and the unfinished run beside it.

adapters/quickstart            the result: appears whole, at the end
adapters/quickstart.partial    a run that goes on or was interrupted: recipe, checkpoints, metrics
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lora_dpo.config import Recipe, dump_recipe
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.files import disk_errors, refuse_existing

ADAPTERS_DIR = Path("adapters")


def choose_output(recipe: Recipe, recipe_name: str, *, resume: bool) -> Path:
    """The adapter folder: the recipe's `output`, or a free name under `adapters/`.

    With `resume` and no `output`, the unfinished run of this recipe that was touched last.
    """
    if recipe.output is not None:
        return Path(recipe.output)
    names = [recipe_name, *(f"{recipe_name}-{number}" for number in range(2, 1000))]
    if resume:
        unfinished = [ADAPTERS_DIR / name for name in names if checkpoints(partial_of(ADAPTERS_DIR / name))]
        if not unfinished:
            raise OutputError(f"No interrupted run of {recipe_name} is in {ADAPTERS_DIR}. Start it without --resume.")
        return max(unfinished, key=lambda output: partial_of(output).stat().st_mtime)
    free = (ADAPTERS_DIR / name for name in names)
    return next(out for out in free if not out.exists() and not checkpoints(partial_of(out)))


def partial_of(output: Path) -> Path:
    """The folder of the unfinished run that will become `output`."""
    return output.with_name(output.name + ".partial")


def checkpoints(partial: Path) -> list[Path]:
    """Checkpoints of an unfinished run, oldest first."""
    found = [path for path in partial.glob("checkpoints/checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def open_run(recipe: Recipe, output: Path, *, resume: bool) -> Path | None:
    """Prepare the run's folder; return the checkpoint to resume from, or None for a fresh start.

    Raises:
        OutputError: the output exists, or an interrupted run is in the way.
        ConfigError: resuming with other settings than the run began with.
    """
    refuse_existing(output)
    partial = partial_of(output)
    found = checkpoints(partial)
    if resume:
        if not found:
            raise OutputError(f"{partial} holds no checkpoint to resume from. Start the run without --resume.")
        _check_same_recipe(recipe, partial)
        return found[-1]
    if found:
        raise OutputError(
            f"An interrupted run is in {partial}. Continue it with --resume, or remove that folder to start over."
        )
    with disk_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return None


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
    return f"lora-dpo train {partial_of(output) / 'recipe.yaml'} --resume"


class RunLog:
    """`metrics.jsonl` of a run: one JSON object a line, kept across interruptions."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Open the log, forgetting rows after `from_step`: those steps will be run again."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= from_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and write it at once."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _check_same_recipe(recipe: Recipe, partial: Path) -> None:
    began_with = (partial / "recipe.yaml").read_text(encoding="utf-8")
    if began_with == dump_recipe(recipe):
        return
    old, new = began_with.splitlines(), dump_recipe(recipe).splitlines()
    changed = [line.strip() for line in new if line not in old] or ["fewer settings"]
    raise ConfigError(
        f"The interrupted run in {partial} began with other settings (now: {'; '.join(changed[:3])}). Resume it with "
        f"its own recipe: lora-dpo train {partial / 'recipe.yaml'} --resume"
    )

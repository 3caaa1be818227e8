"""Checkpoints of a run: when one is made, and when it counts.

A checkpoint counts when its `manifest.json` is there, which is written last, and every file that it names is as it
says. What the trainer had not finished writing has none, so a kill, a full disk or a power cut costs the steps since
the one before, and no more.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS
from lora_dpo.config.reading import read_recipe
from lora_dpo.errors import LoraDPOError, OutputError
from lora_dpo.files import replace_file, sha256_of
from lora_dpo.leftovers import discard
from lora_dpo.systems import sync, sync_folder

MANIFEST, STATE = "manifest.json", "trainer_state.json"
MOST_SECONDS = 120.0
"""A run has a checkpoint at least as often, however far apart its `save_steps` are: a power cut costs no more."""
_SEALED = "every-checkpoint-has-a-manifest"
"""A file among the checkpoints. Runs that were begun without it have checkpoints that no manifest vouches for."""
_NEEDED = (CONFIG, WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)
_OF_THE_GUARD = ("health.json", "health.safetensors")


def place_of(partial: Path) -> Path:
    """Where the checkpoints of an unfinished run are."""
    return partial / "checkpoints"


def checkpoints(partial: Path) -> list[Path]:
    """Checkpoints of an unfinished run that look whole, oldest first; `newest_whole` looks inside."""
    return [path for path in _folders(partial) if _complaint(path, thorough=False) is None]


def newest_whole(partial: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, every byte of it checked; and what is wrong with newer ones, a sentence each."""
    complaints: list[str] = []
    for path in reversed(_folders(partial)):
        complaint = _complaint(path, thorough=True)
        if complaint is None:
            return path, complaints
        complaints.append(f"{path.name} is not whole ({complaint})")
    return None, complaints


def begin(partial: Path, resumed: Path | None) -> None:
    """Before a run's first step: from here on a checkpoint counts only with its manifest.

    Args:
        resumed: the checkpoint that the run goes on from; newer ones, which are not whole, are removed, and all
            that is no checkpoint.
    """
    place = place_of(partial)
    place.mkdir(parents=True, exist_ok=True)
    if resumed is not None and not (resumed / MANIFEST).is_file():
        seal(resumed)
    mine = [path for path in _folders(partial) if resumed is not None and _step(path) <= _step(resumed)]
    for path in list(place.iterdir()):
        if path.is_dir() and path not in mine:
            discard(path)  # or what a killed run's trunk cache had on the disk
    replace_file(place / _SEALED, "")


def clear_torn(partial: Path) -> None:
    """Remove what is no whole checkpoint: it takes space, and nothing goes on from it."""
    for path in torn(partial):
        discard(path)


def torn(partial: Path) -> list[Path]:
    """What looks like a checkpoint and is not whole."""
    whole = checkpoints(partial)
    return [path for path in _folders(partial) if path not in whole]


def seal(folder: Path, **facts: Any) -> None:
    """Wait until all of a checkpoint is on the disk, then write down what belongs to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        sync(path)
    sync_folder(folder)
    said = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    replace_file(folder / MANIFEST, json.dumps({"format": 1, **facts, "files": said}, indent=1) + "\n")
    sync_folder(folder.parent)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def check_states(checkpoint: Path) -> None:
    """Raise `OutputError` if torch would not read what a run goes on from: its manifest vouches for any bytes.

    torch reads tensors and plain values alone, so that nothing in a pickle is run; but what it says of one that wants
    more, in the middle of a training, names no file.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")):
        try:
            with safe_globals():  # what the trainer reads NumPy's state with
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):  # neither is the file's fault
            raise
        except Exception:  # whatever the bytes make of the reader: UnpicklingError, EOFError, RuntimeError, KeyError …
            found = None
        if not isinstance(found, dict):
            raise OutputError(
                f"{path} is damaged, or a pickle that holds more than a training's state, which is never loaded. "
                f"Remove {checkpoint} to go on from the checkpoint before it."
            )


def tokens_seen(checkpoint: Path) -> int:
    """TRL's count `num_tokens` at a checkpoint: TRL itself begins at 0 again."""
    manifest = _read_manifest(checkpoint)
    if manifest is not None and "num_tokens" in manifest:
        return int(manifest["num_tokens"])
    logged = [row["num_tokens"] for row in read_state(checkpoint).get("log_history", []) if "num_tokens" in row]
    return int(logged[-1]) if logged else 0


def checkpoint_callback(
    trainer: Any, sync_log: Callable[[], object], *, clock: Callable[[], float] = time.monotonic
) -> Any:
    """A callback that asks for checkpoints by time as well, makes each one count, and removes old ones.

    Add it after all callbacks that put files into a checkpoint.

    Args:
        trainer: its `save_total_limit` is taken over: transformers removes old ones before the new one counts.
        sync_log: waits for the log, before the checkpoint counts, so that no row before it is missing.
    """
    from transformers import TrainerCallback

    limit = trainer.args.save_total_limit
    trainer.args.save_total_limit = None

    class Keeper(TrainerCallback):  # type: ignore[misc]
        """Checkpoints that count."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.since = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.save_strategy != "no" and clock() - self.since >= MOST_SECONDS:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            place = Path(args.output_dir)
            sync_log()
            seal(place / f"checkpoint-{state.global_step}", num_tokens=trainer._total_train_tokens)
            if limit is not None and limit > 0:
                _remove_old(checkpoints(place.parent), limit, state.best_model_checkpoint)
            self.since = clock()

    return Keeper()


def _remove_old(whole: Sequence[Path], limit: int, best: str | None) -> None:
    """Leave the newest checkpoint, the best one if the trainer names one, and as many more as the limit allows."""
    protected = {whole[-1].name, *([Path(best).name] if best else [])}
    old = [path for path in whole if path.name not in protected]
    for path in old[: max(0, len(whole) - max(limit, len(protected)))]:
        discard(path)


# --- is it whole? ---------------------------------------------------------------------------------


def _folders(partial: Path) -> list[Path]:
    found = [path for path in place_of(partial).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _complaint(folder: Path, *, thorough: bool) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Args:
        thorough: look at every byte, not at names and sizes alone.
    """
    try:
        manifest = _read_manifest(folder)
        if manifest is not None:
            return _differs(folder, manifest["files"], thorough)
        if (folder.parent / _SEALED).exists():
            return f"it has no {MANIFEST}"
        return _lacks(folder, thorough)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"


def _read_manifest(folder: Path) -> Mapping[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _differs(folder: Path, files: Mapping[str, Mapping[str, Any]], thorough: bool) -> str | None:
    if STATE not in files:
        return f"{STATE} is missing"
    for name, said in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != said["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {said['size']:,}"
        if thorough and sha256_of(path) != said["sha256"]:
            return f"{name} is damaged"
    return None


def _lacks(folder: Path, thorough: bool) -> str | None:
    """What a checkpoint without a manifest lacks: it was written before there were any."""
    needed = [*_NEEDED, *(_OF_THE_GUARD if _guarded(folder.parent.parent) else ())]
    for name in needed:
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            return f"{name} is missing"
        if thorough and not _parses(path):
            return f"{name} is damaged"
    return None


def _guarded(partial: Path) -> bool:
    try:
        return read_recipe(partial / "recipe.yaml").health.action != "none"
    except LoraDPOError:
        return False


def _parses(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                pass
        else:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError):
        return False
    return True

"""Where things lie.

The project's, in the current folder:      adapters  collected  evaluations  reports  runs  models
The person's, once for all of them:        models  references  proofs, in ~/.cache/lora-dpo

`LORA_DPO_HOME` is one folder for all of it, `LORA_DPO_CACHE` one for the person's part alone. Both are looked at
whenever a place is asked for, as is the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path

HOME, CACHE = "LORA_DPO_HOME", "LORA_DPO_CACHE"


def project() -> Path:
    """The project's folder: `$LORA_DPO_HOME`, else the current one."""
    return _named(HOME) or Path()


def adapters() -> Path:
    """Trained and installed adapters, and unfinished runs beside them."""
    return project() / "adapters"


def collected() -> Path:
    """Votes and uploads of the demo."""
    return project() / "collected"


def evaluations() -> Path:
    """What `lora-dpo eval` wrote."""
    return project() / "evaluations"


def reports() -> Path:
    """What `lora-dpo report` wrote."""
    return project() / "reports"


def runs() -> Path:
    """TensorBoard's files, a folder a run."""
    return project() / "runs"


def person() -> Path | None:
    """What is kept once a person: `$LORA_DPO_CACHE`, else `$LORA_DPO_HOME`, else `~/.cache/lora-dpo`.

    On every system, as huggingface_hub and torch do; with `$XDG_CACHE_HOME` in place of `~/.cache`. None for a user
    without a home folder.
    """
    if (given := _named(CACHE) or _named(HOME)) is not None:
        return given
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache) / "lora-dpo"


def models() -> list[Path]:
    """Folders of model folders: the project's own, which win, then the one that packaged models are fetched into."""
    return list(dict.fromkeys((Path("models"), project() / "models", (person() or project()) / "models")))


def model_folder(name: str) -> Path:
    """Where a packaged model is; where it would be fetched to, if it is nowhere yet."""
    found = [folder / name for folder in models()]
    return next((folder for folder in found if (folder / "config.json").is_file()), found[-1])


def references() -> Path | None:
    """Log-probabilities of references, kept between runs; None where nothing outlives the process."""
    folder = person()
    return folder and folder / "references"


def proofs() -> Path | None:
    """What trying architectures found (`engine/proof.py`); None where nothing outlives the process."""
    folder = person()
    return folder and folder / "proofs"


def _named(variable: str) -> Path | None:
    """The folder that a variable names; None where it is unset or empty."""
    text = os.environ.get(variable)
    return Path(os.path.expanduser(text)) if text else None

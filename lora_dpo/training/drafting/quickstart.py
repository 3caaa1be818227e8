"""The quickstart's recipe and data, which the installed package has with it, written into a folder.

In a clone they are where the recipe says, beside the package; `setup.py` puts a copy of them into each wheel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_dpo.errors import OutputError
from lora_dpo.files import atomic_files, refuse_existing

RECIPE = Path("configs/quickstart.yaml")
FILES = (
    RECIPE,
    Path("data/quickstart.jsonl"),
    Path("data/quickstart-eval.jsonl"),
    Path("data/quickstart-questions.jsonl"),
)
"""Where they lie in a clone, in a wheel's copy, and in the folder of who asks for them: the recipe's own paths."""

_PACKAGE = Path(__file__).parents[2]


def packaged() -> Path:
    """The folder that holds `FILES`. Raises `OutputError` if the package has come without them."""
    for place in (_PACKAGE / "quickstart", _PACKAGE.parent):
        if all((place / name).is_file() for name in FILES):
            return place
    raise OutputError("This installation has no quickstart in it. Install the package again from its wheel.")


def write_quickstart(folder: Path) -> list[Path]:
    """Write the quickstart into a folder; returns the files that were written: those that were there, alike, are not.

    Raises:
        OutputError: another file of such a name is there, or the disk refuses. Nothing is written then.
    """
    source = packaged()
    missing = [name for name in FILES if not _is_there(folder / name, source / name)]
    with atomic_files([folder / name for name in missing]) as temporaries:
        for name, temporary in zip(missing, temporaries, strict=True):
            shutil.copyfile(source / name, temporary)
    return [folder / name for name in missing]


def _is_there(path: Path, original: Path) -> bool:
    """True for the same bytes. Raises `OutputError` for others."""
    if path.is_file() and path.read_bytes() == original.read_bytes():
        return True
    refuse_existing(path)
    return False

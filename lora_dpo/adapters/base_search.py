"""Where an adapter's base is, if it was a folder of its maker's and that folder has moved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lora_dpo import places
from lora_dpo.adapters.adapter import Adapter
from lora_dpo.errors import AdapterError
from lora_dpo.model.identity import weight_fingerprint
from lora_dpo.model.packaged import CONFIG, PACKAGED_MODELS
from lora_dpo.text import plain

PARENTS = 4
"""Folders above an adapter that are looked into: adapters/NAME in a project, one folder more or two above it."""


def base_of(adapter: Adapter) -> tuple[str, str | None]:
    """Name and revision of the base to load for an adapter: as it says, or the folder where that is now.

    A folder that is not where it was is looked for beside the adapter and among the models of this machine, and taken
    where its weights have the passport's fingerprint. Its name is never asked of a hub.

    Raises:
        AdapterError: the adapter does not say what base it was made for, or that was a folder which is nowhere here.
    """
    name, revision = adapter.named_base
    passport = adapter.passport
    # A model of the hub was loaded from its cache, so its passport has the commit.
    if passport is None or name in PACKAGED_MODELS or revision is not None:
        return name, revision
    if _is_model(Path(os.path.expanduser(name))):
        return name, None
    if passport.base_fingerprint is not None:
        for folder in dict.fromkeys(map(os.path.abspath, _candidates(adapter.folder, name))):
            if _is_model(Path(folder)) and _fingerprint(folder) == passport.base_fingerprint:
                return folder, None
    raise AdapterError(
        f"{adapter.folder} was trained on a model folder, {plain(name)}, which is neither there nor beside the adapter "
        f"nor in {' or '.join(map(str, places.models()))}. Say with --model where it is."
    )


def _candidates(adapter: Path, name: str) -> Iterator[Path]:
    """Where the folder may be: those of its name first."""
    given = Path(os.path.expanduser(name))
    folder = adapter.resolve()
    for parent in (folder, *folder.parents)[: PARENTS + 1]:
        yield from (parent / given, parent / given.name, parent / "models" / given.name)
    for models in places.models():
        yield models / given.name
    for models in places.models():
        with suppress(OSError):
            yield from sorted(models.iterdir())


def _is_model(folder: Path) -> bool:
    return os.path.isfile(folder / CONFIG)  # unlike Path.is_file without an error for a name that is too long


def _fingerprint(folder: str) -> str | None:
    with suppress(Exception):  # half a model, or another tool's: it is not the one
        return weight_fingerprint(folder)
    return None

"""Adapters packed for others, and those from elsewhere checked and taken in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_dpo import places
from lora_dpo.adapters.adapter import Adapter, adapter_in
from lora_dpo.adapters.lora_config import CONFIG
from lora_dpo.adapters.package import (
    CARD,
    KNOWN,
    SUFFIX,
    check_name,
    copy_folder,
    pack_files,
    package_name,
    unpack,
    without_picture,
)
from lora_dpo.adapters.passport import PASSPORT, Passport, check_folder, is_public_name
from lora_dpo.adapters.peft_files import check_finite
from lora_dpo.adapters.store import check_here
from lora_dpo.adapters.stored_pairs import read_stored_pairs
from lora_dpo.errors import AdapterError, OutputError, PackageError
from lora_dpo.files import atomic_file, atomic_folder, disk_errors, refuse_existing
from lora_dpo.leftovers import scratch
from lora_dpo.text import plain


@dataclass(frozen=True)
class Installed:
    """What `install` did."""

    folder: Path
    notes: tuple[str, ...]
    """What the user should know: files left out, checks that could not be made."""


def pack(folder: Path, output: Path | None = None) -> Path:
    """Check an adapter and write its known files into one `NAME.lora.zip`, whole or not at all.

    Raises:
        AdapterError: the adapter is broken, or its name is none for a package.
        OutputError: the file exists or cannot be written.
    """
    check_folder(folder)
    name = check_name(folder.resolve().name)
    check_content(folder)
    target = output or Path(name + SUFFIX)
    if target.is_dir():
        target = target / (name + SUFFIX)
    with atomic_file(target) as temporary:
        pack_files(folder, temporary, name=name)
    return target


def install(
    source: str | Path,
    *,
    name: str | None = None,
    root: Path | None = None,
    fetch: Callable[[str, Path], None] | None = None,
) -> Installed:
    """Check a package, a folder or a hub repository, and put it under `root` (`adapters/`): whole, or not at all.

    Args:
        name: its name here; by default the name it was packed under.
        fetch: called with a hub id and an empty folder to fill, where `source` is no path.

    Raises:
        PackageError: something in it is refused; the message names it.
        AdapterError: it is no adapter, or its base is here and it does not fit.
        OutputError: the name is taken.
    """
    path, root = Path(os.path.expanduser(source)), root or places.adapters()
    with disk_errors(root), scratch("install") as place:
        staged = place / "adapter"
        staged.mkdir()
        notes: list[str] = []
        if os.path.isfile(path):  # unlike Path.is_file without an error for a name that is too long
            name = name or package_name(path)
            target = _target(root, name)
            unpack(path, staged)
        elif os.path.isdir(path):
            target = _target(root, name or path.resolve().name)
            left_out = copy_folder(path, staged)
            notes += [f"left out: {', '.join(left_out[:6])}{' …' if len(left_out) > 6 else ''}"] if left_out else []
        elif fetch is not None and is_public_name(str(source)):
            target = _target(root, name or str(source).rpartition("/")[2])
            fetch(str(source), staged)
        else:
            raise AdapterError(f"There is no {plain(source)}: give a {SUFFIX} file, a folder or a hub id (owner/name).")
        with named(staged, path):
            notes += check_here(check_content(staged))
        if (card := staged / CARD).is_file():
            card.write_bytes(without_picture(card.read_bytes()))
        with atomic_folder(target) as folder:
            for file in (*(file for file in KNOWN if file != CONFIG), CONFIG):  # last: without it there is no adapter
                if (staged / file).is_file():
                    shutil.copyfile(staged / file, folder / file)
    return Installed(target, tuple(notes))


def check_content(folder: Path) -> Adapter:
    """Everything that can be checked without the base: config, header, passport, values, stored pairs.

    Raises:
        AdapterError: the first thing that is wrong, by name.
    """
    adapter = adapter_in(folder)
    check_finite(folder)
    if adapter.passport:
        _check_printable(folder / PASSPORT, "base", adapter.passport.base)
        _check_metrics(folder / PASSPORT, adapter.passport)
    if adapter.config.base:
        _check_printable(folder / CONFIG, "base_model_name_or_path", adapter.config.base)
    read_stored_pairs(folder)
    return adapter


def _target(root: Path, name: str) -> Path:
    target = root / check_name(name)
    if target.exists():
        raise OutputError(f"There is an adapter called {name} already in {root}/. Choose another with --name.")
    refuse_existing(target)
    return target


@contextmanager
def named(staged: Path, path: Path) -> Iterator[None]:
    """Errors about a folder that is not in its place yet name where it comes from, or where it is to go."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(str(error).replace(str(staged), path.name)) from error


def _check_metrics(path: Path, passport: Passport) -> None:
    for when in ("before", "after"):
        parts = passport.metrics.get(when, {})
        odd = parts if not isinstance(parts, dict) else [part for part in parts.values() if not isinstance(part, dict)]
        if odd:
            raise PackageError(f"{path}: metrics.{when} is {plain(parts)}, no table of numbers.")


def _check_printable(path: Path, key: str, value: str) -> None:
    if not value.isprintable():
        raise PackageError(f"{path}: {key} is {plain(value)}, a name with hidden letters.")

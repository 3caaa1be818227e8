"""The adapters on this machine: list, find, hold against their base, remove. None of it loads a model's weights."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo import places
from lora_dpo.adapters.adapter import Adapter, check_fit, open_adapter, weights_sha256
from lora_dpo.adapters.describe import folder_size, metrics_after
from lora_dpo.adapters.folder import check_weights_of_base
from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS
from lora_dpo.adapters.package import BASE, check_name
from lora_dpo.adapters.passport import check_folder, is_public_name
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.config.reading import nearest
from lora_dpo.errors import AdapterError, ModelError
from lora_dpo.files import disk_errors, refuse_existing, replace_file, sha256_of
from lora_dpo.leftovers import discard, settle
from lora_dpo.model.base import load_skeleton, resolve_model
from lora_dpo.model.identity import weight_files, weight_fingerprint
from lora_dpo.text import plain

RECORD = ".verified.json"


@dataclass(frozen=True)
class Listed:
    """One line of `lora-dpo adapters list`."""

    name: str
    base: str
    rank: int
    size: int
    """Bytes of the folder."""
    created: str
    accuracy: float | None
    """Held-out reward accuracy after training, by the passport."""
    state: str
    """`verified DATE`, `not yet verified`, `unverified` (no passport), or what is broken."""


def list_adapters(root: Path | None = None) -> list[Listed]:
    """Every adapter folder under `root` (`adapters/`), by name. What cut-off writes left (names with a dot) is none."""
    root = root or places.adapters()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    record = _read_record(root)
    return [
        _listed(folder, record)
        for folder in folders
        if folder.is_dir() and not folder.name.startswith(".") and (folder / CONFIG).is_file()
    ]


def find_adapter(name: str | Path, root: Path | None = None) -> Path:
    """The folder of an adapter, given as a folder or as a name under `root` (`adapters/`). Raises `AdapterError`.

    A folder of the project's may be given as seen from there, wherever `LORA_DPO_HOME` puts it. A name that is both a
    folder here and an adapter under `root` means the one that is an adapter; the folder here if both are.
    """
    root, given = root or places.adapters(), Path(os.path.expanduser(name))
    ways = [given, places.project() / given] if len(given.parts) > 1 else [given, root / given]
    found = [way for way in ways if os.path.isdir(way)]
    folder = next((way for way in found if os.path.isfile(way / CONFIG)), (found or ways[-1:])[0])
    if not found and root.is_dir():
        names = adapter_names(root)
        known = f" There is {', '.join(names)}." if names else ""
        raise AdapterError(f"There is no adapter {plain(name)}.{nearest(given.name, names) or known}")
    check_folder(folder)
    return folder


def adapter_names(root: Path | None = None) -> list[str]:
    """The names of the adapters under `root` (`adapters/`), broken ones too."""
    root = root or places.adapters()
    return sorted(path.parent.name for path in root.glob("[!.]*/adapter_config.json"))


def removable(name: str, root: Path | None = None) -> Path:
    """The folder of `root` (`adapters/`) that a name means, of a broken adapter too. Raises `AdapterError`.

    What an earlier removal left there, because it was killed, is removed first.
    """
    root = root or places.adapters()
    settle(root)
    given = Path(os.path.expanduser(name))
    folder = given if len(given.parts) > 1 else root / given
    if not folder.is_dir():
        return find_adapter(name, root)  # raises, with a hint
    if folder.resolve().parent != root.resolve() or folder.name.endswith(".partial"):
        raise AdapterError(
            f"{plain(folder)} is not in {root}/, or is a run's: only adapters there are removed. Remove it yourself."
        )
    return folder


def remove(name: str, root: Path | None = None) -> Path:
    """Remove an adapter of `root` (`adapters/`), also a broken one, in one step: a cut-off remove leaves no half one.

    Raises:
        AdapterError: there is none of that name.
        OutputError: the folder cannot be removed.
    """
    folder = removable(name, root)
    with disk_errors(folder):
        discard(folder)
    return folder


def rename(name: str, new: str, root: Path | None = None) -> Path:
    """Give an adapter of `root` (`adapters/`) another name, in one step; that it was verified here stays known.

    Raises:
        AdapterError: there is none of that name.
        PackageError: the new one is no name for an adapter.
        OutputError: the new name is taken, or the folder cannot be renamed.
    """
    root = root or places.adapters()
    folder = removable(name, root)
    target = folder.with_name(check_name(new))
    for taken in (target, partial_of(target)):
        refuse_existing(taken)
    with disk_errors(target):
        folder.rename(target)
        record = _read_record(root)
        if folder.name in record:
            record[target.name] = record.pop(folder.name)
            replace_file(root / RECORD, json.dumps(record, indent=1) + "\n")
    return target


def check_here(adapter: Adapter) -> list[str]:
    """Hold an adapter against its base, if that is on this machine; returns notes on what could not be checked."""
    passport, (name, revision) = adapter.passport, adapter.base
    notes = [] if passport else ["no passport: unverified"]
    if name is None:
        return [*notes, "it does not name its base: give --model when you use it"]
    try:
        path = local_model(name, revision)
        files = weight_files(path)
        cached = not Path(resolve_model(name)).is_dir()  # often its config alone
        whole = all(file.is_file() for file in files) and bool(files or not cached)
    except ModelError:
        whole = False
    if not whole:
        return [*notes, f"its base {plain(name)} is not here: whether it fits is checked when you load it"]
    if passport:
        fingerprint = weight_fingerprint(path)
        notes += check_weights_of_base(passport, adapter.folder, name=name, revision=revision, fingerprint=fingerprint)
    check_fit(adapter, load_skeleton(path), name)
    return notes


def local_model(name: str, revision: str | None = None) -> str:
    """A model's folder on this machine, without asking any network. Raises `ModelError` if it is not here."""
    from huggingface_hub import try_to_load_from_cache

    path = resolve_model(name)
    if Path(path).is_dir():
        return path
    cached = try_to_load_from_cache(path, "config.json", revision=revision) if is_public_name(path) else None
    if not isinstance(cached, str):
        raise ModelError(f"The model {plain(name)} is not on this machine.")
    return str(Path(cached).parent)


def record_verified(folder: Path, root: Path | None = None) -> None:
    """Remember that an adapter of `root` (`adapters/`) was verified on this machine, with its weights' hash."""
    root = root or places.adapters()
    if folder.resolve().parent != root.resolve():
        return
    record = _read_record(root)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record[folder.name] = {"sha256": sha256_of(folder / WEIGHTS), "when": today}
    with disk_errors(root):
        replace_file(root / RECORD, json.dumps(record, indent=1) + "\n")


def _listed(folder: Path, record: Mapping[str, Any]) -> Listed:
    try:
        adapter = open_adapter(folder)
    except AdapterError as error:
        return Listed(folder.name, "", 0, folder_size(folder), "", None, f"broken: {plain(error, 200)}")
    passport, entry = adapter.passport, record.get(folder.name)
    state = "not yet verified" if passport else "unverified"
    if folder.name == BASE:
        state = "not served: that is the name of the model without an adapter. Rename the folder"
    elif passport and isinstance(entry, dict) and entry.get("sha256") == weights_sha256(folder):
        state = f"verified {plain(str(entry.get('when'))[:10])}"
    base = plain(adapter.base[0] or "?")
    accuracy = metrics_after(passport).get("pairs", {}).get("accuracy") if passport else None
    accuracy = float(accuracy) if isinstance(accuracy, int | float) and 0 <= accuracy <= 1 else None
    created = plain(passport.created[:10]) if passport else ""
    return Listed(folder.name, base, adapter.config.rank, folder_size(folder), created, accuracy, state)


def _read_record(root: Path) -> dict[str, Any]:
    try:
        found = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it only remembers: without it every adapter is "not yet verified"
    return found if isinstance(found, dict) else {}

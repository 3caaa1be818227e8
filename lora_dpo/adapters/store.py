"""The adapters on this machine: list, show, compare, pack, install, remove. None of it loads a model's weights."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.adapters.folder import (
    PASSPORT,
    Passport,
    check_folder,
    check_weights_are_the_passports,
    check_weights_of_base,
    is_public_name,
    parse_passport,
    read_passport,
    weights_sha256,
)
from lora_dpo.adapters.package import (
    BASE,
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
from lora_dpo.adapters.peft_files import CONFIG, WEIGHTS, check_finite, check_fit, plain, read_adapter, read_config
from lora_dpo.adapters.run_folder import ADAPTERS_DIR
from lora_dpo.adapters.stored_pairs import PROBE, parse_probe
from lora_dpo.config.recipe import nearest
from lora_dpo.errors import AdapterError, ModelError, OutputError, PackageError
from lora_dpo.files import atomic_file, atomic_folder, disk_errors, refuse_existing, replace_file, sha256_of
from lora_dpo.leftovers import discard, scratch, settle
from lora_dpo.model.base import load_skeleton, resolve_model
from lora_dpo.model.identity import weight_files, weight_fingerprint

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


@dataclass(frozen=True)
class Installed:
    """What `install` did."""

    folder: Path
    notes: tuple[str, ...]
    """What the user should know: files left out, checks that could not be made."""


def list_adapters(root: Path = ADAPTERS_DIR) -> list[Listed]:
    """Every adapter folder under `root`, by name. What cut-off writes left (names with a dot) is no adapter."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    record = _read_record(root)
    return [
        _listed(folder, record)
        for folder in folders
        if folder.is_dir() and not folder.name.startswith(".") and (folder / CONFIG).is_file()
    ]


def find_adapter(name: str | Path, root: Path = ADAPTERS_DIR) -> Path:
    """The folder of an adapter, given as a folder or as a name under `root`. Raises `AdapterError`."""
    given = Path(os.path.expanduser(name))
    folder = given if os.path.isdir(given) or len(given.parts) > 1 else root / given
    if not os.path.isdir(folder) and root.is_dir():
        names = adapter_names(root)
        known = f" There is {', '.join(names)}." if names else ""
        raise AdapterError(f"There is no adapter {plain(name)}.{nearest(given.name, names) or known}")
    check_folder(folder)
    return folder


def adapter_names(root: Path = ADAPTERS_DIR) -> list[str]:
    """The names of the adapters under `root`, broken ones too."""
    return sorted(path.parent.name for path in root.glob("[!.]*/adapter_config.json"))


def describe(folder: Path) -> list[tuple[str, str]]:
    """Rows `(field, value)` for `lora-dpo adapters show`."""
    check_folder(folder)
    config, tensors = read_adapter(folder)
    passport = read_passport(folder)
    kind = "DoRA" if config.dora else "rsLoRA" if config.rslora else "LoRA"
    targets = config.targets if isinstance(config.targets, str) else ", ".join(sorted(map(str, config.targets or [])))
    rows = [
        ("folder", str(folder)),
        ("base", passport.base if passport else config.base or "not named"),
        ("kind", f"{kind}, rank {config.rank}, alpha {config.alpha:g}, {len(tensors.lora)} layers"),
        ("targets", targets),
        ("size", f"{_size(folder) / 1e6:.1f} MB, weights as {', '.join(_dtypes(folder))}"),
    ]
    if passport is None:
        return [*rows, ("passport", "none: made by another tool, unverified")]
    held = "as stored" if passport.quantize == "none" else f"{passport.quantize}"
    rows += [
        ("base revision", passport.base_revision or "not recorded"),
        ("base licence", passport.base_licence or "not stated"),
        ("base weights", f"{held}, computed in {passport.dtype}, fingerprint {passport.base_fingerprint}"),
        ("reference", passport.reference),
        ("made", f"{passport.created} with lora-dpo {passport.versions.get('lora-dpo', '?')}"),
        *((f"data, {which}", _data_line(data)) for which, data in passport.data.items() if isinstance(data, dict)),
        *((f"{name}, after", value) for name, value in _metrics(passport).items()),
    ]
    return [(name, plain(value, 300)) for name, value in rows]


def diff(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """Rows `(setting or metric, first, second)` in which two adapters differ."""
    one, other = (_flat(folder) for folder in (first, second))
    keys = [*one, *(key for key in other if key not in one)]
    return [(key, one.get(key, "-"), other.get(key, "-")) for key in keys if one.get(key) != other.get(key)]


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
    root: Path = ADAPTERS_DIR,
    fetch: Callable[[str, Path], None] | None = None,
) -> Installed:
    """Check a package, a folder or a hub repository, and put it under `root`: whole, or not at all.

    Args:
        name: its name here; by default the name it was packed under.
        fetch: called with a hub id and an empty folder to fill, where `source` is no path.

    Raises:
        PackageError: something in it is refused; the message names it.
        AdapterError: it is no adapter, or its base is here and it does not fit.
        OutputError: the name is taken.
    """
    path = Path(os.path.expanduser(source))
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
            check_content(staged)
            notes += check_here(staged)
        if (card := staged / CARD).is_file():
            card.write_bytes(without_picture(card.read_bytes()))
        with atomic_folder(target) as folder:
            for file in (*(file for file in KNOWN if file != CONFIG), CONFIG):  # last: without it there is no adapter
                if (staged / file).is_file():
                    shutil.copyfile(staged / file, folder / file)
    return Installed(target, tuple(notes))


def removable(name: str, root: Path = ADAPTERS_DIR) -> Path:
    """The folder of `root` that a name means, of a broken adapter too. Raises `AdapterError`.

    What an earlier removal left there, because it was killed, is removed first.
    """
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


def remove(name: str, root: Path = ADAPTERS_DIR) -> Path:
    """Remove an adapter of `root`, also a broken one. It is gone at once: a remove that is cut off leaves no half one.

    Raises:
        AdapterError: there is none of that name.
        OutputError: the folder cannot be removed.
    """
    folder = removable(name, root)
    with disk_errors(folder):
        discard(folder)
    return folder


def check_content(folder: Path) -> None:
    """Everything that can be checked without the base: config, header, shapes, values, passport, stored pairs.

    Raises:
        AdapterError: the first thing that is wrong, by name.
    """
    read_adapter(folder)
    check_finite(folder)
    if (folder / PASSPORT).is_file():
        passport = parse_passport(folder / PASSPORT)
        _check_printable(folder / PASSPORT, "base", passport.base)
        _check_metrics(folder / PASSPORT, passport)
        check_weights_are_the_passports(passport, folder)
    if base := read_config(folder).base:
        _check_printable(folder / CONFIG, "base_model_name_or_path", base)
    if (folder / PROBE).is_file():
        parse_probe(folder / PROBE)


def check_here(folder: Path) -> list[str]:
    """Hold an adapter against its base, if that is on this machine; returns notes on what could not be checked."""
    passport = parse_passport(folder / PASSPORT) if (folder / PASSPORT).is_file() else None
    config, tensors = read_adapter(folder)
    name = passport.base if passport else config.base
    notes = [] if passport else ["no passport: unverified"]
    if name is None:
        return [*notes, "it does not name its base: give --model when you use it"]
    revision = passport.base_revision if passport else config.revision
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
        notes += check_weights_of_base(passport, folder, name=name, revision=revision, fingerprint=fingerprint)
    check_fit(folder, config, tensors, load_skeleton(path), name)
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


def record_verified(folder: Path, root: Path = ADAPTERS_DIR) -> None:
    """Remember that an adapter of `root` was verified on this machine, with its weights' hash."""
    if folder.resolve().parent != root.resolve():
        return
    record = _read_record(root)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record[folder.name] = {"sha256": sha256_of(folder / WEIGHTS), "when": today}
    with disk_errors(root):
        replace_file(root / RECORD, json.dumps(record, indent=1) + "\n")


def _listed(folder: Path, record: Mapping[str, Any]) -> Listed:
    try:
        config, passport = read_config(folder), read_passport(folder)
        check_weights_are_the_passports(passport, folder)
    except AdapterError as error:
        return Listed(folder.name, "", 0, _size(folder), "", None, f"broken: {plain(error, 200)}")
    entry = record.get(folder.name)
    state = "not yet verified" if passport else "unverified"
    if folder.name == BASE:
        state = "not served: that is the name of the model without an adapter. Rename the folder"
    elif passport and isinstance(entry, dict) and entry.get("sha256") == weights_sha256(folder):
        state = f"verified {plain(str(entry.get('when'))[:10])}"
    base = plain(passport.base if passport else config.base or "?")
    accuracy = _after(passport).get("pairs", {}).get("accuracy") if passport else None
    accuracy = float(accuracy) if isinstance(accuracy, int | float) and 0 <= accuracy <= 1 else None
    created = plain(passport.created[:10]) if passport else ""
    return Listed(folder.name, base, config.rank, _size(folder), created, accuracy, state)


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


def _read_record(root: Path) -> dict[str, Any]:
    try:
        found = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it only remembers: without it every adapter is "not yet verified"
    return found if isinstance(found, dict) else {}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _dtypes(folder: Path) -> list[str]:
    from lora_dpo.adapters.peft_files import read_header

    return sorted({stored.dtype for stored in read_header(folder / WEIGHTS).values()})


def _after(passport: Passport) -> dict[str, dict[str, Any]]:
    after = passport.metrics.get("after", {})
    return {part: found for part, found in after.items() if isinstance(found, dict)} if isinstance(after, dict) else {}


def _metrics(passport: Passport) -> dict[str, str]:
    flat = {f"{part}.{key}": value for part, found in _after(passport).items() for key, value in found.items()}
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in flat.items()}


def _data_line(data: Mapping[str, Any]) -> str:
    hashes = data.get("sha256")
    names = ", ".join(f"{file} ({str(sha)[:12]})" for file, sha in hashes.items()) if isinstance(hashes, dict) else "?"
    unit = "answers" if "answers" in data else "pairs"
    return f"{data.get(unit)} {unit} of {data.get('rows')} rows: {names}"


def _flat(folder: Path) -> dict[str, str]:
    """Settings and metrics of an adapter by dotted names, as text."""
    config, passport = read_config(folder), read_passport(folder)
    if passport is None:
        return {f"config.{key}": plain(value) for key, value in sorted(config.raw.items())}
    flat = {"base": passport.base, "quantize": passport.quantize, "dtype": passport.dtype}
    flat |= {"base_fingerprint": str(passport.base_fingerprint), "reference": passport.reference}
    flat |= (
        dict(_dotted(passport.recipe)) if passport.recipe else {"rank": str(config.rank), "alpha": f"{config.alpha:g}"}
    )
    flat |= {f"metrics.after.{key}": value for key, value in _metrics(passport).items()}
    return {key: plain(value) for key, value in flat.items()}


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)

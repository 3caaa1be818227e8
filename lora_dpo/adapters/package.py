"""A packed adapter: one zip of known files. What comes in is checked in a place of its own before it is used.

Only the files of `KNOWN` are ever read; they are safetensors and small text. Everything else in an archive is
refused by name, and so is what would be dangerous to read: pickles, symlinks, paths, bombs.
"""

from __future__ import annotations

import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS
from lora_dpo.errors import PackageError
from lora_dpo.systems import is_reserved
from lora_dpo.text import plain, revealed

SUFFIX = ".lora.zip"
KNOWN = {
    WEIGHTS: 16 << 30,
    CONFIG: 1 << 20,
    "passport.json": 4 << 20,
    "verify.json": 4 << 20,
    "recipe.yaml": 1 << 20,
    "metrics.jsonl": 32 << 20,
    "README.md": 4 << 20,
}
"""Every file that a package may hold, with its largest size in bytes."""

CARD = "README.md"
PICTURE = b"![training curves](curves.png)\n\n"
"""The line of a card that shows the curves, which no package holds."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
BASE = "base"
"""What the model without an adapter is called wherever one is chosen: no adapter can have that name."""
_RATIO = 50  # float weights shrink by a tenth, text by ten; a bomb by a thousand
_EOCD = 22  # bytes of the smallest zip file


def check_name(name: str) -> str:
    """Return an adapter's name, or raise `PackageError`: letters, digits, `.`, `_` and `-`, nothing else."""
    if not NAME.fullmatch(name) or name.endswith((".partial", ".")):
        raise PackageError(
            f"{revealed(name)} is no name for an adapter: use letters, digits, '.', '_' and '-', and begin with a "
            "letter or digit. Choose one with --name."
        )
    if name.casefold() == BASE:
        raise PackageError(
            f"An adapter cannot be called {name}: in serve and demo that is the model without one. Choose another with "
            "--name."
        )
    if is_reserved(name):
        raise PackageError(
            f"An adapter cannot be called {name}: Windows keeps that name for a device. Choose another with --name."
        )
    return name


def pack_files(source: Path, target: Path, *, name: str) -> None:
    """Write an adapter's known files into a zip under the folder `name`. The same files give the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in KNOWN:
            if not (source / file).is_file():
                continue
            entry = zipfile.ZipInfo(f"{name}/{file}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            # weights hardly shrink, and stored ones unpack at the disk's speed
            entry.compress_type = zipfile.ZIP_STORED if file == WEIGHTS else zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as writer:
                if file == CARD:
                    writer.write(without_picture((source / file).read_bytes()))
                    continue
                with (source / file).open("rb") as reader:
                    shutil.copyfileobj(reader, writer, 1 << 20)


def without_picture(card: bytes) -> bytes:
    """A card without the curves, for a place where they are not."""
    return card.replace(PICTURE, b"")


def package_name(path: Path) -> str:
    """The name that a package gives its adapter: its one folder, else its file's name."""
    with _opened(path) as archive:
        folders = {entry.filename.partition("/")[0] for entry in archive.infolist() if "/" in entry.filename}
    return folders.pop() if len(folders) == 1 else path.name.removesuffix(".zip").removesuffix(".lora")


def unpack(path: Path, target: Path) -> None:
    """Unpack a zip's known files into the empty folder `target`, after all its entries were checked.

    Raises:
        PackageError: the archive holds anything but known files, or is not what it says.
    """
    with _opened(path) as archive:
        entries = list(_checked_entries(path, archive))
        free = shutil.disk_usage(target).free
        total = sum(entry.file_size for _, entry in entries)
        if total > free:
            raise PackageError(f"{path.name} unpacks to {total / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free.")
        for name, entry in entries:
            _extract(path, archive, entry, target / name)
    require(path, {name for name, _ in entries})


def copy_folder(source: Path, target: Path) -> list[str]:
    """Copy a folder's known files into `target`; returns the names of other files that were left out.

    Raises:
        PackageError: a pickle, a symlink, or a file that is too large.
    """
    left_out = []
    found = set()
    for path in sorted(source.iterdir()):
        name = path.name
        known = name in KNOWN
        if path.is_symlink() and known:
            raise PackageError(f"{source} holds {plain(name)}, a symlink. Nothing was installed; copy the file itself.")
        refuse_pickle(source, name)
        if not known or not path.is_file():
            left_out.append(plain(name))
            continue
        check_size(source, name, path.stat().st_size)
        found.add(name)
        shutil.copyfile(path, target / name)
    require(source, found)
    return left_out


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise PackageError(f"{path} is no whole zip file ({plain(error)}). Download it again.") from error


def _checked_entries(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > len(KNOWN):
        raise PackageError(f"{path.name} holds {len(entries)} files; an adapter has at most {len(KNOWN)}.")
    packed = sum(entry.compress_size for entry in entries)
    if packed + _EOCD > path.stat().st_size:
        raise PackageError(f"{path.name} claims more packed bytes than it has: its files overlap.")
    seen: set[str] = set()
    roots: set[str] = set()
    for entry in archive.infolist():
        name, root = _file_name(path, entry)
        roots.add(root)
        if entry.is_dir():
            continue
        if name in seen:
            raise PackageError(f"{path.name} holds {plain(name)} twice.")
        seen.add(name)
        _check_entry(path, entry, name)
        yield name, entry
    if len(roots - {""}) > 1 or len(roots) > 1:
        raise PackageError(f"{path.name} holds more than one folder ({', '.join(map(plain, sorted(roots)))}).")


def _file_name(path: Path, entry: zipfile.ZipInfo) -> tuple[str, str]:
    """The known file's name and the folder it is in; anything else is refused."""
    raw = entry.orig_filename
    parts = raw.rstrip("/").split("/") if entry.is_dir() else raw.split("/")
    inside = ".." not in parts and "" not in parts and "." not in parts
    if not inside or "\\" in raw or "\x00" in raw or raw.startswith("/") or re.match(r"[A-Za-z]:", raw):
        raise PackageError(f"{path.name} holds {plain(raw)}, a path that leaves its folder. Nothing was unpacked.")
    if not raw.isascii() or not raw.isprintable():
        looks = revealed(unicodedata.normalize("NFKC", raw))
        raise PackageError(f"{path.name} holds {revealed(raw)}, a name with hidden or lookalike letters ({looks}).")
    root = parts[0] if len(parts) > 1 or entry.is_dir() else ""
    if root:
        check_name(root)
    if len(parts) > 2:
        raise PackageError(f"{path.name} holds {plain(raw)}: an adapter has no inner folders.")
    return ("" if entry.is_dir() else parts[-1]), root


def _check_entry(path: Path, entry: zipfile.ZipInfo, name: str) -> None:
    mode = entry.external_attr >> 16
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        kind = "a symlink" if stat.S_ISLNK(mode) else "no ordinary file"
        raise PackageError(f"{path.name} holds {plain(name)}, {kind}. Nothing was unpacked.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PackageError(
            f"{path.name} holds {plain(name)} packed by method {entry.compress_type}; only stored and deflated files "
            "are read. Pack it with lora-dpo adapters pack, or an ordinary zip."
        )
    if entry.flag_bits & 0x1:
        raise PackageError(f"{path.name} is encrypted ({plain(name)}): adapters are shared in the open.")
    refuse_pickle(path, name)
    if name not in KNOWN:
        raise PackageError(f"{path.name} holds {plain(name)}, which is no file of an adapter. Nothing was unpacked.")
    check_size(path, name, entry.file_size)
    if entry.file_size > _RATIO * max(entry.compress_size, 1 << 16):
        ratio = entry.file_size / max(entry.compress_size, 1)
        raise PackageError(
            f"{path.name}: {name} would unpack to {ratio:,.0f} times its packed size. Nothing was unpacked."
        )


def _extract(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    written = 0
    with target.open("xb") as writer:
        for block in _blocks(path, archive, entry, target.name):
            written += len(block)
            if written > entry.file_size:
                raise PackageError(f"{path.name}: {target.name} unpacks to more than it claims. Nothing was installed.")
            writer.write(block)
    if written != entry.file_size:
        raise PackageError(f"{path.name}: {target.name} has {written:,} bytes, but claims {entry.file_size:,}.")


def _blocks(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> Iterator[bytes]:
    """The unpacked bytes of an entry. What is wrong with them is said here; the disk's errors are the writer's."""
    try:
        with archive.open(entry) as reader:
            while block := reader.read(1 << 20):
                yield block
    # zipfile has no one error for damage: OSError and ValueError are from seeking to where an entry claims to be
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError, struct.error) as error:
        raise PackageError(
            f"{path.name}: {name} cannot be unpacked ({plain(error)}): it is cut off, or not what it claims."
        ) from error


def refuse_pickle(where: Path | str, name: str) -> None:
    """Raise `PackageError` if a file's name is that of a pickle."""
    if name.lower().endswith(PICKLES):
        raise PackageError(
            f"{where} holds {plain(name)}, a pickle: loading one can run any code. Remove it, or ask for safetensors."
        )


def check_size(where: Path | str, name: str, size: int) -> None:
    """Raise `PackageError` if a known file has more bytes than are ever read."""
    if size > KNOWN[name]:
        raise PackageError(f"{where}: {name} has {size:,} bytes; at most {KNOWN[name]:,} are read.")


def require(where: Path | str, found: set[str]) -> None:
    """Raise `PackageError` unless both of PEFT's files are among the names."""
    for name in (CONFIG, WEIGHTS):
        if name not in found:
            raise PackageError(f"{where} is no adapter: there is no {name} in it.")

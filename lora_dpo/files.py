"""Writing results so that a reader sees either the whole thing or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_dpo.errors import OutputError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, renamed to it when the block ends well.

    The rename is one step on one file system, so a killed process leaves `target` whole or absent.
    Raises `OutputError` when `target` exists or the disk refuses the write. If `target` appeared while
    the block ran, the temporary folder stays and the message names it: it may hold hours of work.
    """
    refuse_existing(target)
    with _beside(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    kept = False
    try:
        with disk_errors(target):
            yield temporary
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes 0700: results are ordinary folders
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())  # safetensors makes 0600
                    _fsync(path)
            try:
                temporary.rename(target)
            except OSError as error:
                kept = target.exists()
                if not kept:
                    raise
                raise OutputError(
                    f"{target} already exists: it appeared while its content was made. The finished result is kept "
                    f"in {temporary}: give that folder another name."
                ) from error
    finally:
        if not kept:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, renamed to it when the block ends well. Never overwrites.

    Raises `OutputError` when `target` exists or the disk refuses the write.
    """
    refuse_existing(target)
    with _beside(target):
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(number)
    temporary = Path(name)
    try:
        with disk_errors(target):
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600
            _fsync(temporary)
            refuse_existing(target)
            temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(target: Path) -> None:
    """Raise `OutputError` if `target` is already there, or cannot be: its name is too long."""
    with disk_errors(target):
        there = target.exists()
    if there:
        raise OutputError(f"{target} already exists and is never overwritten. Choose another name, or remove it first.")


def refuse_unwritable(target: Path) -> None:
    """Raise `OutputError` unless a file of that name can be made there; leaves nothing.

    For work that takes long before it writes: folders are not made yet, so the nearest one that exists is tried.
    """
    with disk_errors(target):
        folder = next(folder for folder in target.absolute().parents if folder.exists())
        try:
            number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target)) from error
        os.close(number)
        os.unlink(name)


@contextmanager
def _beside(target: Path) -> Iterator[None]:
    """Make the parent folder; what the block makes in it may be refused as `disk_errors` says."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one `OutputError` that names the next step."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        # safetensors and torch.save report a full disk in their own words
        if not re.search(r"No space left|os error 28|failed writing file", str(error)):
            raise
        raise OutputError(f"Cannot write {target}: the disk is full. {_DISK_ADVICE[errno.ENOSPC]}") from error
    except OSError as error:
        if error.errno not in _DISK_ADVICE or (error.errno == errno.ENOENT and not _on_the_way(error.filename, target)):
            raise
        # mkdir says "File exists" of a file in the middle of the path
        said = os.strerror(errno.ENOTDIR if error.errno == errno.EEXIST else error.errno)
        raise OutputError(f"Cannot write {target}: {said}. {_DISK_ADVICE[error.errno]}") from error


def _on_the_way(missing: object, target: Path) -> bool:
    """True if what was not found is `target`, one of its folders, or a file beside it.

    Long work runs inside `disk_errors`: a file that is missing elsewhere is no matter of this disk.
    """
    if not isinstance(missing, str | os.PathLike):
        return False
    path, goal = Path(missing).absolute(), target.absolute()
    return path in goal.parents or path.parent == goal.parent


_DISK_ADVICE = {
    errno.ENOSPC: "Free some space or choose another disk; nothing half-written was left.",
    errno.EDQUOT: "Your disk quota is used up; nothing half-written was left.",
    errno.EACCES: "Choose a folder you may write to.",
    errno.EPERM: "Choose a folder you may write to.",
    errno.EROFS: "Choose a folder on a writable disk.",
    errno.ENOENT: "Nothing can be made there: choose another folder.",  # such as /proc, which takes no files
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOTDIR: "A part of that path is a file, not a folder.",
    errno.EEXIST: "A part of that path is a file, not a folder.",
}


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

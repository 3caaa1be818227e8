"""Writing results so that a reader sees either the whole thing or nothing.

Also what a disk that refuses means in words, and which names are paths of this machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lora_dpo.errors import LoraDPOError, OutputError
from lora_dpo.leftovers import put_together, settle, temporary_file, temporary_folder
from lora_dpo.systems import flush, nearest_existing, rename, replace, sync, sync_folder


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def numbered(name: str, end: str = "") -> Iterator[str]:
    """Names to try until one is free: `name`, `name-2`, `name-3` and so on, each with `end`."""
    yield name + end
    yield from (f"{name}-{number}{end}" for number in itertools.count(2))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, renamed to it when the block ends well.

    The rename is one step on one file system, so a killed process leaves `target` whole or absent.
    Raises `OutputError` when `target` exists or the disk refuses the write. If `target` appeared while
    the block ran, the temporary folder stays and the message names it: it may hold hours of work.
    """
    refuse_existing(target)
    with _beside(target), temporary_folder(target) as temporary:
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # as the system makes folders here: safetensors makes 0600
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(readable)
                sync(path)
            else:
                sync_folder(path)
        sync_folder(temporary)
        try:
            rename(temporary, target)
        except OSError as error:
            if not target.exists():
                raise
            kept = rename(temporary, temporary.with_suffix(""))  # a name that is never swept
            raise OutputError(
                f"{target} already exists: it appeared while its content was made. The finished result is kept "
                f"in {kept}: give that folder another name."
            ) from error
        _settle_name(target)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which gets its name when the block ends well. Never overwrites.

    Raises `OutputError` when `target` exists or the disk refuses the write.
    """
    with atomic_files([target]) as [temporary]:
        yield temporary


@contextmanager
def atomic_files(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """`atomic_file` for files that belong together: all of them appear, or none.

    A kill between the first name and the last is made good by whoever next writes, or misses a file, there.
    """
    for target in targets:
        settle(target.parent)  # of all of them, before the first that is there is refused
    for target in targets:
        refuse_existing(target)
    with ExitStack() as stack:
        temporaries = []
        for target in targets:
            stack.enter_context(_beside(target))
            temporaries.append(stack.enter_context(temporary_file(target)))
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        try:
            put_together(temporaries, targets)
        except FileExistsError:
            for target in targets:
                refuse_existing(target)
            raise
        for target in targets:
            _settle_name(target)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file anew, for good: a reader or a kill finds the old one or the new one. Raises `OSError`."""
    with temporary_file(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            flush(file.fileno())
        replace(temporary, path)
        sync_folder(path.parent)


def refuse_existing(target: Path) -> None:
    """Raise `OutputError` if `target` is already there, or cannot be: its name is too long.

    What a killed command left in that folder, or within what has the name, is finished or removed first.
    """
    for folder in (target.parent, target, *_folders_in(target)):  # a merge's report is written into what is there
        settle(folder)
    with disk_errors(target), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        target.lstat()
        raise OutputError(f"{target} already exists and is never overwritten. Choose another name, or remove it first.")


def _folders_in(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def refuse_unwritable(target: Path) -> None:
    """Raise `OutputError` unless a file of that name can be made there; leaves nothing.

    For work that takes long before it writes: folders are not made yet, so the nearest one that exists is tried.
    """
    with disk_errors(target):
        folder = nearest_existing(target)
        if len(os.fsencode(target.name)) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(target))
        try:
            with temporary_file(folder / target.name):
                pass
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target)) from error


@contextmanager
def _beside(target: Path) -> Iterator[None]:
    """Make the parent folder; what the block makes in it may be refused as `disk_errors` says."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        yield


def _settle_name(target: Path) -> None:
    """Wait for a result's new name. Power lost before that leaves no result, which is whole or nothing, too."""
    with contextlib.suppress(OSError):
        sync_folder(target.parent)


# --- what the disk refuses ------------------------------------------------------------------------


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one `OutputError` that names whose file it was, and the next step."""
    try:
        yield
    except LoraDPOError:
        raise
    except Exception as error:  # safetensors, tokenizers and torch tell of a full disk in classes of their own
        said = refusal(error, target)
        if said is None:
            raise
        raise OutputError(said) from error


def refusal(error: BaseException, target: Path | None = None) -> str | None:
    """What the operating system refused and what to do, in a sentence; None for an error of another kind.

    Args:
        target: what is being written, for errors that name no file.
    """
    number, named = _number(error), getattr(error, "filename", None)
    path = Path(named) if isinstance(named, str | os.PathLike) else None
    elsewhere = path is not None and (target is None or not _belongs(path, target))
    if windows := _WINDOWS.get(getattr(error, "winerror", None) or 0):
        return f"Cannot write {(path if elsewhere else target) or 'a file'}: {windows}"
    if number is None:
        return None
    if number == errno.ENOENT and not _on_the_way(path, target):
        return None  # a file that is missing elsewhere is no matter of this disk
    if elsewhere:
        if number == errno.EEXIST:
            return f"Cannot make {path}: a file of that name is there. Move it away."
        return f"Cannot open or write {path}: {os.strerror(number)}. {_DISK_ADVICE[number]}"
    # mkdir says "File exists" of a file in the middle of the path
    said = os.strerror(errno.ENOTDIR if number == errno.EEXIST else number)
    left = " Nothing half-written was left." if target and number in _IN_THE_MIDDLE else ""
    return f"Cannot write {target or 'a file'}: {said}. {_DISK_ADVICE[number]}{left}"


def _number(error: BaseException | None) -> int | None:
    """The operating system's number of an error, also of one that a library passes on in its own words."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _DISK_ADVICE else None
    text = str(error)
    if found := re.search(r"os error (\d+)", text):  # Rust: safetensors, tokenizers
        code = int(found[1])
        number = _RUST_ON_WINDOWS.get(code, 0) if sys.platform == "win32" else code
        return number if number in _DISK_ADVICE else None
    if isinstance(error, RuntimeError) and _TORCH_WRITES.search(text):
        below = error.__cause__ or error.__context__
        return (_number(below) if isinstance(below, OSError) else None) or errno.ENOSPC
    return None


_OPEN = "another program has it open. Close it there and try again."
_WINDOWS = {
    32: _OPEN,
    33: _OPEN,
    123: "it has a letter that no name may have there, such as : or ? or *. Choose another one.",
    206: "the name is too long there. Choose a shorter one.",
}
"""Windows' own numbers of errors whose usual ones say less."""
_RUST_ON_WINDOWS = {
    2: errno.ENOENT,
    3: errno.ENOENT,
    5: errno.EACCES,
    19: errno.EROFS,
    32: errno.EACCES,
    39: errno.ENOSPC,
    112: errno.ENOSPC,
}
"""Rust names Windows' own numbers alone."""

_TORCH_WRITES = re.compile(r"No space left|failed writing file|enforce fail at inline_container|unexpected pos \d+")
"""torch.save when a write fails: it does not say why, and that is nearly always a full disk."""


def _on_the_way(missing: Path | None, target: Path | None) -> bool:
    """True if what was not found is `target`, one of its folders, or a file beside it."""
    if target is None or missing is None:
        return False
    path, goal = missing.absolute(), target.absolute()
    return path in goal.parents or path.parent == goal.parent


def _belongs(path: Path, target: Path) -> bool:
    """True if a path is the target, one of its folders, a file beside it, or in what will become the target."""
    path, goal = path.absolute(), target.absolute()
    if path in (goal, *goal.parents) or goal in path.parents or path.parent == goal.parent:
        return True
    inside = path.is_relative_to(goal.parent)
    return inside and path.relative_to(goal.parent).parts[0].removeprefix(".").startswith(goal.name[:40])


_IN_THE_MIDDLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What comes when a part is written already. Whoever writes inside `disk_errors` removes that part."""

_DISK_ADVICE = {
    errno.ENOSPC: "Free some space or choose another disk.",
    errno.EDQUOT: "Your disk quota is used up: free some space or choose another disk.",
    errno.EFBIG: "Files may not grow so large there (see ulimit -f): choose another disk.",
    errno.EIO: "The disk, or the connection to it, failed: look after it or choose another one.",
    errno.EACCES: "Choose a folder you may write to.",
    errno.EPERM: "Choose a folder you may write to.",
    errno.EROFS: "Choose a folder on a writable disk.",
    errno.ENOENT: "Nothing can be made there: choose another folder.",  # such as /proc, which takes no files
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOTDIR: "A part of that path is a file, not a folder.",
    errno.EEXIST: "A part of that path is a file, not a folder.",
}


def write_json(path: Path, value: object) -> None:
    """Write readable JSON, whole or not at all."""
    replace_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


OWN_FOLDERS = ("adapters", "models", "merged", "evaluations", "reports", "runs", "collected", "configs", "data")
"""Folders that lora-dpo makes, or this repository has: `adapters/quickstart` is never asked of the hub's "adapters"."""
_OF_A_FILE = (".zip", ".partial", ".safetensors", ".gguf", ".json", ".jsonl", ".yaml", ".yml")


def looks_local(name: str) -> bool:
    """True for what can only be meant as a path of this machine, also when nothing is there (any more).

    Whoever owns that name on the hub must not be asked for it: it is there, or its first folder is, or that is one of
    lora-dpo's own; or it is written as a path or a file's name.
    """
    first, slash, _ = name.partition("/")
    return (
        not slash  # a model of the hub is written owner/name
        or name.startswith((".", "/", "~"))
        or "\\" in name
        or re.match("[A-Za-z]:", name) is not None  # a drive of Windows
        or name.count("/") > 1
        or len(name) > 2 * 96 + 1  # longer than any hub id
        or os.path.exists(name)
        or (bool(slash) and (first in OWN_FOLDERS or os.path.isdir(first)))
        or name.lower().endswith(_OF_A_FILE)
    )

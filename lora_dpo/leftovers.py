"""What a killed command leaves behind: names that are never taken for a result, and who still owns them.

.NAME.1a2b3c4d.unfinished   being written; becomes NAME in one step at the end
.NAME.1a2b3c4d.removed      being deleted; was NAME until one step before
.NAME.1a2b3c4d.together     the names of files that must appear together
lora-dpo-WHAT-1a2b3c4d      a scratch folder, in the system's folder for temporary files

Whoever makes one holds a lock on it, which the system drops when the process ends, however it ends. What nobody
holds is rubbish: the next command that writes into the same folder removes it. Windows knows no such locks: there
nothing is removed by itself, and `lora-dpo clean` removes what is a day old.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_dpo.systems import flush, is_mine, is_old, knows_locks, lock, rename, sync_folder, unlock

UNFINISHED, REMOVED, TOGETHER = "unfinished", "removed", "together"
_OURS = re.compile(rf"\..*\.[0-9a-f]{{8}}\.({UNFINISHED}|{REMOVED}|{TOGETHER})", re.DOTALL)
_SCRATCH = re.compile(r"lora-dpo-[a-z]+-[0-9a-f]{8}")
_NO_LINKS = {
    getattr(errno, name, errno.EPERM)  # not every system has every number
    for name in ("EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EINVAL")  # EINVAL: exFAT on Windows
}
"""How file systems without hard links say so."""

_held: dict[Path, int] = {}
"""Open descriptors of what this process holds for its whole life."""


def temporary_name(target: Path, kind: str = UNFINISHED) -> Path:
    """A free name beside `target` that no reader takes for a result."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.{kind}")


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, held by this process and removed when the block ends."""
    while True:
        path = temporary_name(target)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        held = lock(path, wait=True)
        if os.path.exists(path):
            break
        unlock(held)  # swept in the moment before it was held
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # what cannot be removed now is swept later
            path.unlink(missing_ok=True)
        unlock(held)


@contextlib.contextmanager
def temporary_folder(path_of: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """An empty folder beside `path_of`, held by this process and removed, with what is in it, when the block ends."""
    path, held = _make_folder(lambda: temporary_name(path_of), mode)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        unlock(held)


@contextlib.contextmanager
def scratch(what: str, folder: Path | None = None) -> Iterator[Path]:
    """A private folder for a command's own use, removed when the block ends.

    Args:
        what: one word, for the folder's name.
        folder: where; by default the system's place for temporary files.
    """
    path = scratch_folder(what, folder)
    try:
        yield path
    finally:
        give_up(path)


def scratch_folder(what: str, folder: Path | None = None) -> Path:
    """A private folder that this process holds until `give_up`; those of killed processes are removed."""
    place = folder or Path(tempfile.gettempdir())
    for left in scratch_folders(place):
        sweep_one(left)
    path, held = _make_folder(lambda: place / f"lora-dpo-{what}-{secrets.token_hex(4)}", 0o700)
    if held is not None:
        _held[path] = held
    return path


def give_up(path: Path) -> None:
    """Remove a folder of `scratch_folder`."""
    shutil.rmtree(path, ignore_errors=True)
    unlock(_held.pop(path, None))


def discard(path: Path) -> None:
    """Remove a file or a folder so that it is there whole or not at all: it loses its name in one step.

    What is not there is no error. Raises `OSError` if the name cannot be taken away.
    """
    grave = temporary_name(path, REMOVED)
    try:
        rename(path, grave)
    except FileNotFoundError:
        return
    _delete(grave)


# --- files that belong together -------------------------------------------------------------------


def put(temporary: Path, target: Path) -> None:
    """Give a finished file its name; `temporary` may stay. Raises `FileExistsError` if the name is taken."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        rename(temporary, target)


def put_together(temporaries: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give finished files their names: all of them, or none.

    The names are on the disk before the first is given. If this process is killed between two of them, whoever
    next looks at the folder gives the rest (`settle`).

    Raises:
        FileExistsError: a name is taken; then none is given.
    """
    if len(targets) == 1:
        put(temporaries[0], targets[0])
        return
    given: list[Path] = []
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(target.parent for target in targets):
            stack.enter_context(_intention(folder, temporaries, targets))
        try:
            for temporary, target in zip(temporaries, targets, strict=True):
                put(temporary, target)
                given.append(target)
        except BaseException:
            for target in given:
                target.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _intention(folder: Path, temporaries: Sequence[Path], targets: Sequence[Path]) -> Iterator[None]:
    """Keep a note of what is to be named in a folder, for the length of the block."""
    steps = [[os.path.relpath(old, folder), new.name] for old, new in zip(temporaries, targets, strict=True)]
    with temporary_file(folder / targets[0].name) as path:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(steps))
            file.flush()
            flush(file.fileno())
        note = rename(path, path.with_suffix(f".{TOGETHER}"))
        sync_folder(folder)
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def _finish(note: Path) -> None:
    """Do what a killed process had begun: once one of the files has its name, the others get theirs."""
    try:
        steps = [(note.parent / old, str(new)) for old, new in json.loads(note.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, RecursionError):
        steps = []
    # A note may have come from elsewhere, with a folder: it moves nothing but what is named as ours is.
    pairs = [(old, old.with_name(new)) for old, new in steps if _OURS.fullmatch(old.name) and Path(new).name == new]
    if any(_named(old, new) for old, new in pairs):
        for old, new in pairs:
            if old.exists() and not os.path.lexists(new):
                put(old, new)
    for old, _ in pairs:
        old.unlink(missing_ok=True)
    note.unlink(missing_ok=True)


def _named(temporary: Path, target: Path) -> bool:
    if temporary.exists():
        return target.exists() and temporary.samefile(target)
    return target.exists()  # renamed, where there are no hard links


# --- sweeping -------------------------------------------------------------------------------------


def settle(folder: Path) -> None:
    """Finish or remove what killed commands left in a folder; what a living process holds stays as it is."""
    for path in left_in(folder):
        if path.name.endswith(TOGETHER):
            sweep_one(path)  # first: it says what is to become of others
    for path in left_in(folder):
        sweep_one(path)


def left_in(folder: Path) -> list[Path]:
    """Everything in a folder that has a temporary name, whoever holds it."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if _OURS.fullmatch(entry.name))
    except (OSError, ValueError):
        return []  # not there, not ours to look into, or no path at all


def scratch_folders(folder: Path) -> list[Path]:
    """This user's scratch folders in the place for temporary files, whoever holds them."""
    with contextlib.suppress(OSError):
        entries = [entry for entry in os.scandir(folder) if _SCRATCH.fullmatch(entry.name)]
        mine = [entry for entry in entries if is_mine(entry.stat(follow_symlinks=False))]
        return sorted(Path(entry.path) for entry in mine if entry.is_dir(follow_symlinks=False))
    return []


def sweep_one(path: Path, *, asked: bool = False) -> bool:
    """Remove (or finish) one leftover, unless a process holds it or it cannot be removed; True if it is gone.

    Args:
        asked: somebody asked for it: where the system knows no locks, what is a day old goes as well.
    """
    if path.name.endswith(f".{REMOVED}"):
        _delete(path)
        return not os.path.lexists(path)
    with contextlib.suppress(OSError, ValueError):  # a note that came from elsewhere may name anything
        held = lock(path, wait=False)
        if held is not None or (asked and not is_held(path)):
            try:
                if path.name.endswith(f".{TOGETHER}"):
                    _finish(path)
                else:
                    _delete(path)
            finally:
                unlock(held)
    return not os.path.lexists(path)


def is_held(path: Path) -> bool:
    """True if a process may still be at work on a leftover: for a day, where the system knows no locks."""
    if path.name.endswith(f".{REMOVED}"):
        return False
    if not knows_locks():
        return not is_old(path)
    held = None
    with contextlib.suppress(OSError):
        held = lock(path, wait=False)
    unlock(held)
    return held is None


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _make_folder(name: Callable[[], Path], mode: int) -> tuple[Path, int | None]:
    """A new folder with a name that `name()` gives, and the lock that holds it."""
    while True:
        path = name()
        path.mkdir(mode=mode)
        held = lock(path, wait=True)
        if path.is_dir():
            return path, held
        unlock(held)  # swept in the moment before it was held

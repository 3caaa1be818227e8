"""What Windows and macOS do otherwise than Linux: names that cannot be, files that are held, words for a shell.

`sys.platform == "win32"` is written out where it is asked: mypy then reads the code as that system would
(`mypy --platform win32`, part of `make types`), and a test can give another answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

DAY = 86_400.0
WAITS = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
"""Seconds between tries to rename what Windows holds for a moment."""

# --- names ----------------------------------------------------------------------------------------

_PORTS = (f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))
_DEVICES = frozenset(("con", "prn", "aux", "nul", "conin$", "conout$", *_PORTS))


def is_reserved(name: str) -> bool:
    """Whether Windows takes a file's name for a device (`con`, `nul.txt`), or cuts its end off (`a.`, `a `).

    Asked on every system: adapters and files of pairs move between them.
    """
    return name.endswith((".", " ")) or name.partition(".")[0].rstrip(" ").casefold() in _DEVICES


def command_line(words: Sequence[str]) -> str:
    """Words of a command as one line for this system's shell; on Windows for cmd and PowerShell alike."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def nearest_existing(path: Path) -> Path:
    """The nearest part above a path that is there; of a Windows drive that is not there, its root."""
    above = path.absolute().parents
    return next((part for part in above if part.exists()), above[-1])


# --- renaming -------------------------------------------------------------------------------------


def rename(old: Path, new: Path) -> Path:
    """`old.rename(new)`. Raises `OSError`."""
    return _patiently(lambda: old.rename(new))


def replace(old: Path, new: Path) -> Path:
    """`old.replace(new)`: in place of what is there. Raises `OSError`."""
    return _patiently(lambda: old.replace(new))


def _patiently(step: Callable[[], Path]) -> Path:
    """Windows refuses to rename what is open: for a moment that is any new file, while a virus scanner looks at it."""
    for wait in WAITS:
        try:
            return step()
        except PermissionError:
            if sys.platform != "win32":
                raise
            time.sleep(wait)
    return step()


# --- the disk -------------------------------------------------------------------------------------


def flush(number: int) -> None:
    """Wait until what was written to a descriptor is on the disk. Raises `OSError`."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # a network disk may not know it
            fcntl.fcntl(number, fcntl.F_FULLFSYNC)  # fsync alone leaves it in the drive's own memory there
            return
    os.fsync(number)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk. Raises `OSError`."""
    # Windows syncs only what was opened for writing
    with path.open("r+b" if sys.platform == "win32" else "rb") as file:
        flush(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises `OSError`."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # Windows opens no folders
    try:
        flush(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(number)


# --- who is at it ---------------------------------------------------------------------------------


def lock(path: Path, *, wait: bool) -> int | None:
    """Hold a file or folder: the descriptor, or None if another holds it or the system cannot say (`knows_locks`).

    Windows locks too, but an open file cannot be renamed there, and what is held here is renamed in the end.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if stat.S_IFMT(os.fstat(number).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.EINVAL, "neither file nor folder")
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(number)
        return None
    return number


def unlock(number: int | None) -> None:
    """Let go of what `lock` holds."""
    if number is not None:
        os.close(number)


def knows_locks() -> bool:
    """Whether `lock` can hold anything on this system."""
    return sys.platform != "win32"


def is_mine(entry: os.stat_result) -> bool:
    """Whether something in the place for temporary files is this user's; on Windows that place is."""
    if sys.platform == "win32":
        return True
    return entry.st_uid == os.getuid()


def is_old(path: Path) -> bool:
    """Whether nothing of a file or folder has been written for a day. What cannot be looked at is not old."""
    with contextlib.suppress(OSError):
        newest: float = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
        return time.time() - newest > DAY
    return False


# --- GPUs -----------------------------------------------------------------------------------------

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch reads how a card's memory is handed out. Both are set: of torch 2.9 the first is said to be ignored for
CUDA (pytorch#183387), and alone the second makes torch 2.9 to 2.11 warn."""
SEGMENTS = "expandable_segments:True"
"""Segments that grow: blocks of fixed sizes are left over between parts of steps, whose lengths change all the time."""


def let_segments_grow() -> None:
    """Ask torch for them, before it is imported; not where its user has said how, nor on Windows, which has none."""
    if sys.platform == "win32" or any(name in os.environ for name in ALLOCATOR):
        return
    os.environ.update(dict.fromkeys(ALLOCATOR, SEGMENTS))


# --- Apple's GPU ----------------------------------------------------------------------------------


def wants_apple_gpu() -> bool:
    """Whether LORA_DPO_DEVICE asks for it: not by itself, since nobody has measured it. Raises `ConfigError`."""
    asked = os.environ.get("LORA_DPO_DEVICE") or "auto"
    if asked not in ("auto", "mps"):
        raise ConfigError(
            f"LORA_DPO_DEVICE is {shown(asked)}: allowed are auto and mps. auto takes an NVIDIA GPU if there is one; "
            "CUDA_VISIBLE_DEVICES= before the command hides it."
        )
    return asked == "mps"


# --- the terminal ---------------------------------------------------------------------------------


def nobody_reads(error: OSError) -> bool:
    """Whether a write failed because its reader is gone (`| head`); Windows calls that an invalid argument."""
    gone = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or gone


def make_writable(stream: Any) -> None:
    r"""Let a text stream write every letter: those that its encoding has not as `\u03b2`.

    Files and pipes of Windows get UTF-8, unless PYTHONIOENCODING says otherwise: the code page of the system would
    make JSON that no program reads.
    """
    if sys.platform == "win32" and not stream.isatty() and not os.environ.get("PYTHONIOENCODING"):
        stream.reconfigure(encoding="utf-8")
    stream.reconfigure(errors="backslashreplace")

"""What Windows refuses, refused here: so that code which must get along with it can be run on Linux, and there alone.

- A folder cannot be opened.
- What is open or mapped, and a folder with such a file in it, can be neither renamed nor removed.
- A descriptor that was not opened for writing cannot be synced.
- What is locked can be neither read nor written through another descriptor: `running.lock` here.
- There are no symbolic links without a right that few have.

It is no Windows: names, time, the terminal and the libraries behave as on Linux.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock  # noqa: F401 - it looks at the platform when it is imported
import psutil
import pytest


def in_use() -> set[str]:
    """Every path that this process has open or mapped."""
    found = set()
    for link in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{link}"))
        except OSError:
            continue  # the listing's own
    for line in Path("/proc/self/maps").read_text().splitlines():
        found.update(re.findall(r" (/\S.*)$", line))
    return found


def is_in_use(path: str) -> bool:
    """Whether a file, or one in a folder, is open or mapped here."""
    return any(used == path or used.startswith(path + os.sep) for used in in_use())


def as_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on until the test ends."""
    monkeypatch.setattr(sys, "platform", "win32")
    _refuse_folders(monkeypatch)
    _refuse_syncing_readers(monkeypatch)
    _refuse_what_is_in_use(monkeypatch)
    _refuse_what_is_locked(monkeypatch)
    monkeypatch.setattr(os, "symlink", _refused)
    memory = psutil.Process.memory_info
    monkeypatch.setattr(
        psutil.Process,
        "memory_info",
        lambda self: SimpleNamespace(**memory(self)._asdict(), peak_wset=memory(self).rss),
    )


def _refused(*given: object, **named: object) -> None:
    raise OSError(errno.EPERM, "a right that few have", str(given[0]))


def _refuse_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_file(path, flags, *rest, **named):
        number = real(path, flags, *rest, **named)
        if stat.S_ISDIR(os.fstat(number).st_mode) and not _called_from("shutil"):  # rmtree opens none on Windows
            os.close(number)
            raise PermissionError(errno.EACCES, "a folder", str(path))
        return number

    monkeypatch.setattr(os, "open", open_file)


def _refuse_syncing_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    real = os.fsync

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "opened for reading alone")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)


def _refuse_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        real = getattr(os, name)

        def changed(path, *rest, _real=real, dir_fd=None, **named):
            folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            whole = os.path.join(folder, os.fspath(path))
            # filelock for Windows closes its file first; this is the one for Linux
            if is_in_use(whole) and not _called_from("filelock"):
                raise PermissionError(errno.EACCES, "in use", str(path))
            return _real(path, *rest, **named, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        monkeypatch.setattr(os, name, changed)


def _refuse_what_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def open_path(self, *rest, **named):
        if self.name.endswith(".lock"):
            raise PermissionError(errno.EACCES, "locked", str(self))
        return real(self, *rest, **named)

    monkeypatch.setattr(Path, "open", open_path)  # read_text and write_text open so, too


def _called_from(module: str) -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] == module

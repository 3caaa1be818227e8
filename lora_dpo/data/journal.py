"""A file that long work is written to row by row, so that a killed run goes on where it was.

The first line names the settings that the rows were made with; rows of other settings are never mixed in.
Beside it: one durable row, a durable rewrite, and a place that one process holds at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dpo.errors import OutputError
from lora_dpo.files import atomic_file, disk_errors, replace_file
from lora_dpo.leftovers import settle
from lora_dpo.systems import flush, sync_folder
from lora_dpo.text import shown

Row = dict[str, Any]

OTHERWISE = "Go on with those settings, or choose another output."


class Journal:
    """JSONL with a header line. Rows are on the disk when `append` returns."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, instead: str = OTHERWISE) -> None:
        """Open or start the journal; a last line that a killed process left half-written is cut off.

        Args:
            instead: what to do if the file holds rows of other settings. Without rows it is begun anew.

        Raises:
            OutputError: the file holds rows of other settings, or cannot be written.
        """
        self.path = path
        self.rows: list[Row] = []
        header = json.dumps({"settings": dict(settings)}, ensure_ascii=False)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = b""
            if path.exists():
                content = path.read_bytes()
                whole = content[: content.rfind(b"\n") + 1]
            if whole:
                first, *self.rows = _parsed(whole, path)
                changed = _changed(path, first.get("settings"), json.loads(header)["settings"])
                if changed and self.rows:
                    raise OutputError(f"{path} was begun with other settings ({changed}). {instead}")
                if not changed:
                    os.truncate(path, len(whole))
                    return
            self._write(header + "\n", mode="w")

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows and wait until they are on the disk."""
        with disk_errors(self.path):
            self._write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), mode="a")
        self.rows.extend(rows)

    def _write(self, text: str, *, mode: str) -> None:
        with self.path.open(mode, encoding="utf-8", newline="\n") as file:
            size = file.seek(0, os.SEEK_END)
            try:
                file.write(text)
                file.flush()
                flush(file.fileno())
                if size == 0:
                    sync_folder(self.path.parent)
            except OSError:
                with contextlib.suppress(OSError):  # on a disk that fails; then the next opening cuts it off
                    os.truncate(self.path, size)
                raise


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet: whole or not at all.

    Raises:
        OutputError: it exists, or the disk refuses.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold `path` for this process: two runs that write to one place would spoil each other's work.

    Raises:
        OutputError: another process holds it.
    """
    import filelock

    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_name(path.name + ".lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise OutputError(
                f"Another process is writing {path}. Wait for its end, or choose another output."
            ) from None
    try:
        yield
    finally:
        # Removed while it is held, never after: whoever waits for this file sees that it has no name any more.
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _parsed(content: bytes, path: Path) -> list[Row]:
    try:
        # By line feeds alone: str.splitlines also parts at U+2028 and the like, which stand unescaped in an answer.
        rows = [json.loads(line) for line in content.decode("utf-8").removesuffix("\n").split("\n")]
    except ValueError as error:
        raise OutputError(f"{path} cannot be read ({error}). Move it away, or choose another output.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise OutputError(f"{path} is no journal of lora-dpo. Move it away, or choose another output.")
    return rows


def _changed(path: Path, old: Any, new: Row) -> str:
    """The first setting that differs, with both values; empty if none does."""
    if not isinstance(old, dict):
        raise OutputError(f"{path} is no journal of lora-dpo. Move it away, or choose another output.")
    key = next((key for key in [*new, *old] if old.get(key) != new.get(key)), None)
    return "" if key is None else f"{key} was {shown(old.get(key))}, now {shown(new.get(key))}"


def append_durably(path: Path, row: Row, *, ours: bool = True) -> None:
    """Add one JSON line and wait for the disk. What a kill left of an earlier line is cut off first."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        settle(path.parent)
        with path.open("a+b") as file:
            _mend_end(file, ours=ours)
            size = file.seek(0, os.SEEK_END)
            try:
                file.write(line)
                file.flush()
                flush(file.fileno())
                if new:
                    sync_folder(path.parent)
            except OSError:
                with contextlib.suppress(OSError):  # on a disk that fails; then the next one cuts it off
                    os.truncate(path, size)
                raise


def rewrite_durably(path: Path, change: Callable[[int, Row], Row | None]) -> int:
    """Write a JSONL file anew: `change` gets each line's number and row and returns what to keep of it, or None.

    A reader or a kill finds the old file or the new one. Lines that are no rows stay as they are. Returns how many
    rows are left.
    """
    kept: list[bytes] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        row = _row_of(line)
        if row is None:
            kept.append(line)
            continue
        new = change(number, row)
        if new is row:
            kept.append(line)
        elif new is not None:
            kept.append(json.dumps(new, ensure_ascii=False).encode("utf-8") + b"\n")
    with disk_errors(path):
        replace_file(path, b"".join(kept))
    return sum(_row_of(line) is not None for line in kept)


def _row_of(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _mend_end(file: Any, *, ours: bool) -> None:
    """Leave the file ending with a whole line. A whole last line without its line break is kept: an editor made it.

    Args:
        ours: what is no row was cut off by a kill, and goes; in anybody else's file it stays.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(max(0, size - (1 << 20)))
    tail = file.read()
    if b"\n" not in tail:
        file.seek(0)  # one very long line
        tail = file.read()
    if tail.endswith(b"\n"):
        return
    start = tail.rfind(b"\n") + 1
    if not ours or _row_of(tail[start:]) is not None:
        file.write(b"\n")
    else:
        file.truncate(size - len(tail) + start)

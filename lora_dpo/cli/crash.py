"""The report of an error that nobody foresaw: a file that its finder can read, look through and send."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lora_dpo.systems import is_mine

PACKAGES = ("lora-dpo", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "gradio")
_REPORT = re.compile(r"lora-dpo-crash-\d{8}-\d{6}-\d+\.txt")
_SECRET_OPTION = re.compile(r"--[a-z-]*(key|auth|token|password)[a-z-]*")
_SECRET = re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{8,}")


def write_crash(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """Write the traceback, the command and the versions to a file in the temporary folder, for this user alone.

    Args:
        arguments: the command's; values of options for keys and passwords are left out.

    Returns:
        The file, or None where none can be written.
    """
    lines = [
        f"lora-dpo {' '.join(without_secrets(arguments))}",
        f"Python {platform.python_version()} on {platform.platform()}",
        ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
        "",
        "".join(traceback.format_exception(error)),
    ]
    name = f"lora-dpo-crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        path = Path(tempfile.gettempdir()) / name
        with open(path, "x", encoding="utf-8", errors="backslashreplace", newline="\n", opener=_private) as file:
            file.write(_SECRET.sub(r"\1…", "\n".join(lines)))
    except OSError:
        return None  # the disk may be what broke
    return path


def crash_reports(folder: Path) -> list[Path]:
    """This user's crash reports in a folder."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            mine = entry.is_file(follow_symlinks=False) and is_mine(entry.stat(follow_symlinks=False))
            if mine and _REPORT.fullmatch(entry.name):
                found.append(Path(entry.path))
    return sorted(found)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The words of a command with `…` for the values of options such as `--api-key`."""
    shown, hide = [], False
    for word in arguments:
        option, equals, _ = word.partition("=")
        secret = bool(_SECRET_OPTION.fullmatch(option))
        shown.append("…" if hide else f"{option}=…" if secret and equals else word)
        hide = secret and not equals
    return shown


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, the first line of it, in a length that a terminal can show."""
    said = next(iter(str(error).splitlines()), "")[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def quiet_exit() -> None:
    """Nobody reads on (`| head`): leave Python nothing to flush, which it would complain about at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

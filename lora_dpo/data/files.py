"""Rows of local files and hub data sets, before anyone asks what they mean."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lora_dpo.errors import DataError

Row = dict[str, Any]


OnBroken = Callable[[int, str, str], None]
"""Called with the line number, the reason and the line's text."""


def files_of(source: str) -> list[str]:
    """The files of a folder that rows can be read from, by name, with those of folders in it; else the source itself.

    Raises:
        DataError: the folder holds none.
    """
    path = Path(source)
    if not path.is_dir():
        return [source]
    inside = sorted(item for item in path.rglob("*") if item.is_file() and _kind(item) in _READERS)
    found = [str(item) for item in inside if not any(part.startswith(".") for part in item.relative_to(path).parts)]
    if not found:
        raise DataError(f"{source} is a folder without a preference file in it. Known are {_known()}.")
    return found


def read_rows(source: str, *, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    """Yield `(row number, row)` of a file or a hub data set, numbered from 1 (lines in JSONL).

    Args:
        on_broken: told of each line of a JSONL file that is no JSON object, in place of an error.

    Raises:
        DataError: the file is missing, empty or broken (with file and line), or the hub refuses.
    """
    path = Path(source)
    reader = _READERS.get(_kind(path))
    if reader is None and not path.exists():
        yield from _hub_rows(source)
        return
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise DataError(f"{source} {problem}. Give the path of a preference file.")
    if reader is None:
        raise DataError(f"{source}: unknown kind of file. Known are {_known()}.")
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty. It should hold rows with prompt, chosen and rejected.")
    try:
        with _open(path) as file:
            yield from _jsonl_rows(file, path, on_broken) if reader is _jsonl_rows else reader(file, path)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {_first_bad_byte(path)}). Save it as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source}: broken gzip ({error}). Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _kind(path: Path) -> str:
    """The suffix that says what is inside: `.jsonl` for `pairs.jsonl` and for `pairs.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] == ".gz" else "".join(suffixes[-1:])


def _known() -> str:
    return f"{', '.join(sorted(_READERS))}, and gzip of each"


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _jsonl_rows(file: IO[bytes], path: Path, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_text(file), start=1):
        if not line.strip():
            continue
        try:
            row = _as_row(_parse_json(line.rstrip("\r\n"), path, number), path, number)
        except DataError as error:
            if on_broken is None:
                raise
            on_broken(number, str(error).removeprefix(f"{path}, ").partition(": ")[2].rstrip("."), line.rstrip("\r\n"))
        else:
            yield number, row


def _json_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Row]]:
    text = _text(file).read()
    if _is_json_lines(text):
        yield from _jsonl_rows(io.BytesIO(text.encode("utf-8")), path)
        return
    parsed = _parse_json(text, path, None)
    if not isinstance(parsed, list):
        raise DataError(f"{path} holds one {type(parsed).__name__}, not a list of rows.")
    for number, row in enumerate(parsed, start=1):
        yield number, _as_row(row, path, number)


def _is_json_lines(text: str) -> bool:
    """Many files that end in `.json` hold one object a line."""
    lines = [line for line in text[: 1 << 20].split("\n", 3) if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines[:2]):
        return False
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        return False
    return True


def _csv_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # answers are longer than the 128 KiB that the module allows
    try:
        for number, row in enumerate(csv.DictReader(_text(file, newline=""), strict=True), start=1):
            yield number, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError(f"{path}: broken CSV ({error}).") from error


def _parquet_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    source = io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file  # its index is at the end
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:  # Arrow reports broken pages as OSError
        raise DataError(f"{path}: broken Parquet ({(str(error).splitlines() or ['no detail'])[0]}).") from error


def _hub_rows(source: str) -> Iterator[tuple[int, Row]]:
    """`owner/name`, or `owner/name:split` for another split than `train`."""
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"{source} is neither a file here nor a data set that could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield number, dict(row)


def _parse_json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line if line is not None else error.lineno
        raise DataError(f"{path}, line {where}: broken JSON ({error.msg}, column {error.colno}).") from None
    except ValueError:  # more than 4,300 digits
        raise DataError(f"{path}, line {line or 1}: broken JSON (a number is too long).") from None
    except RecursionError:
        raise DataError(f"{path}, line {line or 1}: JSON nested too deeply to be a preference row.") from None


def _first_bad_byte(path: Path) -> int:
    """Counted from the file's start; the reader's own error counts from the start of a block."""
    try:
        with _open(path) as file:
            file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _as_row(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {number}: expected an object, found {type(value).__name__}.")
    return value


_READERS: dict[str, Callable[[IO[bytes], Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}

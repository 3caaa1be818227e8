"""Rows of local files and hub data sets, before anyone asks what they mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_dpo.errors import DataError

Row = dict[str, Any]


def read_rows(source: str) -> Iterator[tuple[int, Row]]:
    """Yield `(row number, row)` of a file or a hub data set, numbered from 1 (lines in JSONL).

    Raises:
        DataError: the file is missing, empty or broken (with file and line), or the hub refuses.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and not path.exists():
        yield from _hub_rows(source)
        return
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{source} {problem}. Give the path of a preference file.")
    if reader is None:
        raise DataError(f"{source}: unknown kind of file. Known are {', '.join(sorted(_READERS))}.")
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty. It should hold rows with prompt, chosen and rejected.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {_first_bad_byte(path)}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _as_row(_parse_json(line.rstrip("\r\n"), path, number), path, number)


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    parsed = _parse_json(path.read_text(encoding="utf-8-sig"), path, None)
    if not isinstance(parsed, list):
        raise DataError(f"{path} holds one {type(parsed).__name__}, not a list of rows.")
    for number, row in enumerate(parsed, start=1):
        yield number, _as_row(row, path, number)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # answers are longer than the 128 KiB that the module allows
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=1):
                yield number, {key: value for key, value in row.items() if key is not None}
        except csv.Error as error:
            raise DataError(f"{path}: broken CSV ({error}).") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: broken Parquet ({str(error).splitlines()[0]}).") from error


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
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _as_row(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {number}: expected an object, found {type(value).__name__}.")
    return value


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}

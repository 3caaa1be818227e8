"""Rows of JSON and JSONL files."""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lora_dpo.data.row_reading import COLUMNS, TABLE, Reading, Row, as_row, is_a_table
from lora_dpo.errors import DataError
from lora_dpo.text import shown


def read_jsonl(file: IO[bytes], reading: Reading) -> Iterator[tuple[int, Row]]:
    """Rows of a JSONL file by line number. Whoever listens is told of broken lines; else they are a `DataError`."""
    start, path = 0, reading.path
    for number, content in enumerate(file, start=1):  # bytes are split at line feeds alone
        mark = len(codecs.BOM_UTF8) if number == 1 and content.startswith(codecs.BOM_UTF8) else 0
        try:
            line = _decoded(content[mark:], path, number, start + mark).rstrip("\r\n")
            row = as_row(_parse_json(line, path, number), path, number) if line.strip() else None
        except DataError as error:
            reading.broken(error, number, content.decode("utf-8", "backslashreplace").rstrip("\r\n"))
        else:
            if row is not None:
                yield number, row
        start += len(content)


def _decoded(content: bytes, path: Path, line: int, start: int) -> str:
    """The text of a line that starts at byte `start` of the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {line}: not UTF-8 text (byte {start + error.start} of the file). Save it as UTF-8."
        ) from error


def read_json(file: IO[bytes], reading: Reading) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON file: a list of objects, or one object that holds such a list."""
    content, path = file.read(), reading.path
    if _is_json_lines(content):
        yield from read_jsonl(io.BytesIO(content), reading)
        return
    parsed = _parse_json(content.decode("utf-8-sig"), path, None)
    for number, item in enumerate(_listed(parsed, path), start=1):
        try:
            row = as_row(item, path, number)
        except DataError as error:
            reading.broken(error, number, json.dumps(item))
        else:
            yield number, row


def _listed(parsed: Any, path: Path) -> list[Any]:
    """The rows of a JSON file: a list of them, or one object that has a column of a row."""
    if isinstance(parsed, list):
        return parsed
    if not isinstance(parsed, dict):
        raise DataError(f"{path} holds one {type(parsed).__name__}, not a list of rows.")
    if is_a_table(parsed):
        raise DataError(f"{path} {TABLE}.")
    if not COLUMNS.isdisjoint(parsed):
        return [parsed]
    lists = {key: len(value) for key, value in parsed.items() if isinstance(value, list) and value}
    hint = "".join(f" Its {shown(key)} is a list of {length}: save that list alone." for key, length in lists.items())
    raise DataError(f"{path} holds one object, not a list of rows.{hint}")


def _is_json_lines(content: bytes) -> bool:
    """Many files that end in `.json` hold one object a line."""
    start = content[: 1 << 20].removeprefix(codecs.BOM_UTF8)
    lines = [line for line in start.split(b"\n", 3) if line.strip()][:2]
    return len(lines) == 2 and all(line.lstrip().startswith(b"{") for line in lines) and any(map(_is_json, lines))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


class _Twice(Exception):
    """A key that stands twice in one object."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


def _parse_json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except _Twice as twice:
        at = f"line {line}" if line is not None else "somewhere"
        raise DataError(f"{path}, {at}: an object has the key {shown(str(twice))} twice. Remove one.") from None
    except json.JSONDecodeError as error:
        where = line if line is not None else error.lineno
        raise DataError(f"{path}, line {where}: broken JSON ({error.msg}, column {error.colno}).") from None
    except ValueError:  # more than 4,300 digits
        raise DataError(f"{path}, line {line or 1}: broken JSON (a number is too long).") from None
    except RecursionError:
        raise DataError(f"{path}, line {line or 1}: JSON nested too deeply to be a preference row.") from None

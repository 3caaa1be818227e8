"""Rows of local files and hub data sets, before anyone asks what they mean."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lora_dpo.errors import ConfigError, DataError
from lora_dpo.files import looks_local
from lora_dpo.leftovers import settle
from lora_dpo.text import shown

Row = dict[str, Any]


OnBroken = Callable[[int, str, str], None]
"""Called with the row number, the reason and the row's text."""

NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the rows."""
COLUMNS = frozenset(
    (
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "question",
        "history",
        "chosen_messages",
        "chosen_response",
        "generations",
        "answers",
        "response_j",
        "human_ref_A",
        "snapshot",
    )
)
"""Columns by which one JSON object is known for a row: some form of `table.py` needs them."""
_BESIDE = re.compile(r"\.jsonl(\.gz)?\.(dropped|samples|scores)\.jsonl(\.gz)?$", re.IGNORECASE)
"""What lora-dpo itself writes beside pairs: no pairs."""


def files_of(source: str) -> list[str]:
    """The files of a folder that rows can be read from, by name, with those of folders in it; else the source itself.

    Descriptions of a data set, and the journals that lora-dpo writes beside pairs, hold no rows and are left out.

    Raises:
        DataError: the folder holds none.
    """
    if not source.strip():  # to pathlib that is the current folder
        raise DataError("A preference file has an empty name. Name a file, a hub data set or a folder (. is this one).")
    path = Path(source)
    if not _looked_at(source, path.is_dir):
        return [source]
    inside = sorted(item for item in path.rglob("*") if item.is_file() and _kind(item) in _READERS)
    rows = [item for item in inside if item.name not in NO_DATA and not _BESIDE.search(item.name)]
    found = [str(item) for item in rows if not any(part.startswith(".") for part in item.relative_to(path).parts)]
    if not found:
        raise DataError(f"{source} is a folder without a preference file in it. Known are {_known()}.")
    return found


def refuse_twice(sources: Sequence[str]) -> None:
    """Raise `ConfigError` for a file that is named twice, by itself or through a folder: its rows have one name."""
    seen: set[Path] = set()
    for file in (file for source in sources for file in files_of(source)):
        path = Path(file).resolve()
        if path in seen:
            raise ConfigError(f"{file} is named twice, by itself or through a folder. Name it once.")
        seen.add(path)


def read_rows(source: str, *, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    """Yield `(row number, row)` of a file or a hub data set, numbered from 1 (lines in JSONL).

    Args:
        on_broken: told of each row that is none, in place of an error: a line that is no JSON object or no UTF-8, an
            item of a JSON list that is no object, a CSV row with more cells than columns.

    Raises:
        DataError: the file is missing, empty or broken (with file and line), or the hub refuses.
    """
    path = Path(source)
    reader = _READERS.get(_kind(path))
    there = _looked_at(source, path.exists)
    if not there and reader is None and _is_hub_id(source):
        yield from _hub_rows(source)
        return
    if not there:
        settle(path.parent)  # it may be the second file of two that a killed command had not named yet
        there = _looked_at(source, path.exists)
    if not there:
        hint = near_file(path) or " Give the path of a preference file, or owner/name of the hub."
        raise DataError(f"{source} does not exist.{hint}")
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no ordinary file"
        raise DataError(f"{source} {problem}. Give the path of a preference file.")
    if reader is None:
        raise DataError(f"{source}: unknown kind of file. Known are {_known()}.")
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty. It should hold rows with prompt, chosen and rejected.")
    try:
        with _open(path) as file:
            yield from reader(file, path, on_broken)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {_first_bad_byte(path)}). Save it as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source}: broken gzip ({error}). Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def near_file(path: Path) -> str:
    """A hint ` Did you mean …?` with a file or folder beside `path` whose name is like its own, or the empty string."""
    try:
        names = [name for name in os.listdir(path.parent) if not name.startswith(".")]
    except OSError:
        return ""
    # What comes before the suffixes decides: they alone make none.jsonl look like eval.jsonl.
    close = difflib.get_close_matches(_base(path.name), set(map(_base, names)), n=1)
    if not close:
        return ""
    alike = [name for name in names if _base(name) == close[0]]
    nearest = max(alike, key=lambda name: difflib.SequenceMatcher(None, path.name, name).ratio())
    return f" Did you mean {path.with_name(nearest)}?"


def _base(name: str) -> str:
    return name.partition(".")[0]


def _looked_at(source: str, question: Callable[[], bool]) -> bool:
    """The answer to a question about a path; `DataError` where the system will not look, as at too long a name."""
    try:
        return question()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


_HUB_ID = re.compile(r"(?P<owner>\w[\w.-]*)/[\w.-]+(/[\w.-]+)?(:.+)?")


def _is_hub_id(source: str) -> bool:
    """True for `owner/name…` unless `owner` looks like a folder here: a local file's name is nobody else's matter."""
    found = _HUB_ID.fullmatch(source)
    return found is not None and not looks_local(f"{found['owner']}/name")


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


def _tell(on_broken: OnBroken | None, error: DataError, path: Path, number: int, text: str) -> None:
    """Tell of a broken row if somebody listens; else the error stands."""
    if on_broken is None:
        raise error
    on_broken(number, str(error).removeprefix(f"{path}, ").partition(": ")[2].rstrip("."), text)


def _jsonl_rows(file: IO[bytes], path: Path, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    start = 0
    for number, content in enumerate(file, start=1):  # bytes are split at line feeds alone
        mark = len(codecs.BOM_UTF8) if number == 1 and content.startswith(codecs.BOM_UTF8) else 0
        try:
            line = _decoded(content[mark:], path, number, start + mark).rstrip("\r\n")
            row = _as_row(_parse_json(line, path, number), path, number) if line.strip() else None
        except DataError as error:
            _tell(on_broken, error, path, number, content.decode("utf-8", "backslashreplace").rstrip("\r\n"))
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


def _json_rows(file: IO[bytes], path: Path, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    content = file.read()
    if _is_json_lines(content):
        yield from _jsonl_rows(io.BytesIO(content), path, on_broken)
        return
    parsed = _parse_json(content.decode("utf-8-sig"), path, None)
    for number, item in enumerate(_listed(parsed, path), start=1):
        try:
            row = _as_row(item, path, number)
        except DataError as error:
            _tell(on_broken, error, path, number, json.dumps(item))
        else:
            yield number, row


def _listed(parsed: Any, path: Path) -> list[Any]:
    """The rows of a JSON file: a list of them, or one object that has a column of a row."""
    if isinstance(parsed, list):
        return parsed
    if not isinstance(parsed, dict):
        raise DataError(f"{path} holds one {type(parsed).__name__}, not a list of rows.")
    if _is_a_table(parsed):
        raise DataError(f"{path} {_TABLE}.")
    if not COLUMNS.isdisjoint(parsed):
        return [parsed]
    lists = {key: len(value) for key, value in parsed.items() if isinstance(value, list) and value}
    hint = "".join(f" Its {shown(key)} is a list of {length}: save that list alone." for key, length in lists.items())
    raise DataError(f"{path} holds one object, not a list of rows.{hint}")


_TABLE = "holds columns, not rows: with pandas write it by to_json(PATH, orient='records', lines=True)"
_ONE_OF_EACH = ("prompt", "chosen", "rejected", "instruction", "question", "completion")
"""Columns that never hold a list of texts in a row."""


def _is_a_table(value: dict[str, Any]) -> bool:
    """True for a whole table in one object, as pandas writes it but for `orient='records'`."""
    if value.keys() in ({"columns", "index", "data"}, {"columns", "data"}, {"schema", "data"}):
        return True
    inside = list(value.values())
    if inside and all(isinstance(column, dict) and column and all(map(str.isdigit, column)) for column in inside):
        return True  # columns of numbered cells
    if value and all(map(str.isdigit, value)) and all(isinstance(row, dict) for row in inside):
        return True  # numbered rows
    columns = [value[name] for name in _ONE_OF_EACH if name in value]
    return bool(columns) and all(
        isinstance(column, list) and column and not any(isinstance(cell, dict) for cell in column) for column in columns
    )


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


def _csv_rows(file: IO[bytes], path: Path, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # answers are longer than the 128 KiB that the module allows
    try:
        text = _text(file, newline="")
        head = _header(text)
        _refuse_other_separator(head, path)
        header = [name.strip().strip('"') for name in head]
        _refuse_twice_named(header, path)
        # Written by hand, with a space after each comma: quotes begin behind it.
        spaced = len(head) > 1 and all(name.startswith(" ") for name in head[1:])
        cells = csv.reader(text, strict=True, skipinitialspace=spaced)
        for number, row in enumerate(filter(None, cells), start=1):
            if any(cell.strip() for cell in row[len(header) :]):  # a comma at the line's end alone is nobody's cell
                error = DataError(f"{path}, row {number}: more cells than columns: quote texts that hold commas.")
                _tell(on_broken, error, path, number, json.dumps(row, ensure_ascii=False))
            else:
                yield number, dict(itertools.zip_longest(header, row[: len(header)]))
    except csv.Error as error:
        raise DataError(f"{path}: broken CSV ({error}).") from error


def _header(text: io.TextIOWrapper) -> list[str]:
    """The names of the columns: the first line that is neither blank nor Excel's `sep=,`."""
    for row in csv.reader(text, strict=True, skipinitialspace=False):
        if any(cell.strip() for cell in row) and not (row[0].startswith("sep=") and not any(row[1:])):
            return row
    return []


def _refuse_twice_named(columns: Sequence[str], path: Path) -> None:
    """Raise `DataError` if two columns have one name: one of them would be lost."""
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise DataError(f"{path} has two columns named {shown(twice[0])}. Rename or remove one of them.")


def _refuse_other_separator(header: Sequence[str], path: Path) -> None:
    """Raise `DataError` if the whole header is one column in which other separators stand: spreadsheets write those."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and separator in header[0]:
            raise DataError(
                f"{path}: its header is one column, {shown(header[0][:80])}: its cells seem to stand between {name}. "
                "Save it with commas between them."
            )


def _parquet_rows(file: IO[bytes], path: Path, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    source = io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file  # its index is at the end
    try:
        number, stored = 0, pyarrow.parquet.ParquetFile(source)
        _refuse_twice_named(stored.schema_arrow.names, path)
        for batch in stored.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_padding(row)
    except (pyarrow.ArrowException, OSError) as error:  # Arrow reports broken pages as OSError
        raise DataError(f"{path}: broken Parquet ({(str(error).splitlines() or ['no detail'])[0]}).") from error


def _hub_rows(source: str) -> Iterator[tuple[int, Row]]:
    """`owner/name`, with `/configuration` and `:split` where it is not the only one and not `train`."""
    import datasets

    path, _, split = source.partition(":")
    owner_name, configuration = path.split("/")[:2], path.split("/")[2:]
    try:
        rows = datasets.load_dataset("/".join(owner_name), *configuration, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        hint = " Name one as owner/name/CONFIGURATION." if str(error).startswith("Config name is missing") else ""
        raise DataError(
            f"{source} is neither a file here nor a data set that could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}).{hint}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield number, _without_padding(dict(row))


def _without_padding(row: Row) -> Row:
    """A row out of Arrow as it was put in: one column's structs all have the same keys, null where a row had none.

    A null that the row had itself looks the same and goes, too. Those of columns stay: they are the table's own.
    """
    return {column: _unpadded(value) for column, value in row.items()}


def _unpadded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return [_unpadded(item) for item in value] if isinstance(value, list) else value


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
    if _is_a_table(value):
        raise DataError(f"{path}, row {number}: it {_TABLE}.")
    return value


_READERS: dict[str, Callable[[IO[bytes], Path, OnBroken | None], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}

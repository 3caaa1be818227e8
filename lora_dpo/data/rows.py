"""The rows of any source, before anyone asks what they mean: which reader it needs, and those of CSV and Parquet."""

from __future__ import annotations

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
from typing import IO

from lora_dpo.data.hub_rows import is_hub_source, read_hub, without_padding
from lora_dpo.data.json_rows import read_json, read_jsonl
from lora_dpo.data.row_reading import NO_DATA, OnBroken, Row, as_text, first_bad_byte, open_unpacked, tell_broken
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.leftovers import settle
from lora_dpo.text import shown

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


def is_readable(source: str) -> bool:
    """True for the name of a kind of file that rows are read from, and for a folder."""
    return Path(source).is_dir() or _kind(Path(source)) in _READERS


def refuse_twice(sources: Sequence[str]) -> None:
    """Raise `ConfigError` for a file that is named twice, by itself or through a folder: its rows have one name."""
    seen: set[Path] = set()
    for file in (file for source in sources for file in files_of(source)):
        path = Path(file).resolve()
        if path in seen:
            raise ConfigError(f"{file} is named twice, by itself or through a folder. Name it once.")
        seen.add(path)


def refuse_missing(sources: Sequence[str]) -> None:
    """Raise `DataError` for a file that is missing, empty or of an unknown kind. No file is read, and no hub asked."""
    for file in (file for source in sources for file in files_of(source)):
        path = Path(file)
        known = _kind(path) in _READERS
        if known and path.is_file() and path.stat().st_size:
            continue
        if known or not is_hub_source(file) or path.exists():
            next(read_rows(file), None)  # says what is wrong before it reads anything


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
    if not there and reader is None and is_hub_source(source):
        yield from read_hub(source)
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
        with open_unpacked(path) as file:
            yield from reader(file, path, on_broken)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {first_bad_byte(path)}). Save it as UTF-8.") from error
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


def _kind(path: Path) -> str:
    """The suffix that says what is inside: `.jsonl` for `pairs.jsonl` and for `pairs.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] == ".gz" else "".join(suffixes[-1:])


def _known() -> str:
    return f"{', '.join(sorted(_READERS))}, and gzip of each"


def _csv_rows(file: IO[bytes], path: Path, on_broken: OnBroken | None = None) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # answers are longer than the 128 KiB that the module allows
    try:
        text = as_text(file, newline="")
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
                tell_broken(on_broken, error, path, number, json.dumps(row, ensure_ascii=False))
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
                yield number, without_padding(row)
    except (pyarrow.ArrowException, OSError) as error:  # Arrow reports broken pages as OSError
        raise DataError(f"{path}: broken Parquet ({(str(error).splitlines() or ['no detail'])[0]}).") from error


_READERS: dict[str, Callable[[IO[bytes], Path, OnBroken | None], Iterator[tuple[int, Row]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}

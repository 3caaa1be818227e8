"""The rows of any source, before anyone asks what they mean: which reader it needs, and that of Parquet."""

from __future__ import annotations

import difflib
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lora_dpo.data.csv_rows import read_csv
from lora_dpo.data.hub_rows import is_hub_source, read_hub, without_padding
from lora_dpo.data.json_rows import read_json, read_jsonl
from lora_dpo.data.row_reading import NO_DATA, FileFacts, OnBroken, Reading, Row, first_bad_byte, open_unpacked
from lora_dpo.data.sheet_rows import read_ods, read_xlsx
from lora_dpo.data.table import refuse_twice_named
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.leftovers import settle

_BESIDE = re.compile(r"\.jsonl(\.gz)?\.(dropped|samples|scores)\.jsonl(\.gz)?$", re.IGNORECASE)
"""What lora-dpo itself writes beside pairs: no pairs."""
_SHEET = re.compile(r"(?P<file>.*\.(?:xlsx|xlsm|ods)(?:\.gz)?):(?P<sheet>.+)", re.IGNORECASE | re.DOTALL)
_BY_HAND = {
    **dict.fromkeys((".xls", ".xlsb", ".numbers", ".gsheet"), "Save it as .xlsx, .ods or .csv."),
    ".txt": "If it is a table, as Excel's Unicode text is, give it a name that ends in .tsv.",
}
"""What to do with kinds of tables that are not read."""


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
    # ~$pairs.xlsx is what Excel puts beside a file that it has open
    found = [str(item) for item in rows if not any(part[:2] == "~$" or part[0] == "." for part in _parts(item, path))]
    if not found:
        raise DataError(f"{source} is a folder without a preference file in it. Known are {_known()}.")
    return found


def _parts(item: Path, folder: Path) -> tuple[str, ...]:
    return item.relative_to(folder).parts


def is_readable(source: str) -> bool:
    """True for the name of a kind of file that rows are read from, and for a folder."""
    return Path(source).is_dir() or _kind(file_of(source)) in _READERS


def file_of(source: str) -> Path:
    """The file of a source: `pairs.xlsx` of `pairs.xlsx:Sheet2`."""
    return Path(_split_sheet(source)[0])


def _split_sheet(source: str) -> tuple[str, str | None]:
    found = _SHEET.fullmatch(source)
    return (found["file"], found["sheet"]) if found else (source, None)


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
        path = file_of(file)
        known = _kind(path) in _READERS
        if known and path.is_file() and path.stat().st_size:
            continue
        if known or not is_hub_source(file) or path.exists():
            next(read_rows(file), None)  # says what is wrong before it reads anything


def read_rows(
    source: str, *, on_broken: OnBroken | None = None, facts: FileFacts | None = None
) -> Iterator[tuple[int, Row]]:
    """Yield `(row number, row)` of a file or a hub data set, numbered from 1.

    In JSONL that is the line; in a table the row as a spreadsheet shows it, where the header is a row, too.

    Args:
        on_broken: told of each row that is none, in place of an error: a line that is no JSON object or no UTF-8, an
            item of a JSON list that is no object, a CSV row with more cells than columns.
        facts: filled in with what is seen of the file beside its rows, all of it before the first row.

    Raises:
        DataError: the file is missing, empty or broken (with file and line), or the hub refuses.
    """
    name, sheet = _split_sheet(source)
    path = Path(name)
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
        raise DataError(f"{name} does not exist.{hint}")
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no ordinary file"
        raise DataError(f"{name} {problem}. Give the path of a preference file.")
    if reader is None:
        raise DataError(f"{name}: unknown kind of file. {_BY_HAND.get(_kind(path), f'Known are {_known()}.')}")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty. It should hold rows with prompt, chosen and rejected.")
    try:
        with open_unpacked(path) as file:
            yield from reader(file, Reading(path, on_broken, facts or FileFacts(), sheet))
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {first_bad_byte(path)}). Save it as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: broken gzip ({error}). Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


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


def _parquet_rows(file: IO[bytes], reading: Reading) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    path = reading.path
    source = io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file  # its index is at the end
    try:
        number, stored = 0, pyarrow.parquet.ParquetFile(source)
        refuse_twice_named(stored.schema_arrow.names, path)
        for batch in stored.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, without_padding(row)
    except (pyarrow.ArrowException, OSError) as error:  # Arrow reports broken pages as OSError
        raise DataError(f"{path}: broken Parquet ({(str(error).splitlines() or ['no detail'])[0]}).") from error


_READERS: dict[str, Callable[[IO[bytes], Reading], Iterator[tuple[int, Row]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".xlsx": read_xlsx,
    ".xlsm": read_xlsx,
    ".ods": read_ods,
    ".parquet": _parquet_rows,
}

"""What every reader of rows shares: a row, how a file is opened, and how a broken one is told."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora_dpo.errors import DataError

Row = dict[str, Any]

OnBroken = Callable[[int, str, str], None]
"""Called with the row number, the reason and the row's text."""


@dataclass
class FileFacts:
    """What a reader saw of a file beside its rows; it is all there when the first row is."""

    table: bool = False
    """True if one header stands above all rows and every cell is text; rows have the numbers of a spreadsheet."""
    decimal_comma: bool = False
    """True if the numbers of a table are written as 4,5."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how it was read: its encoding, its separator, its sheet."""


@dataclass(frozen=True)
class Reading:
    """One reading of a file: where it is, who is told of broken rows, and what is seen of it beside its rows."""

    path: Path
    on_broken: OnBroken | None = None
    facts: FileFacts = field(default_factory=FileFacts)
    sheet: str | None = None
    """Of a file with several sheets, the one to read; None for the first."""

    def broken(self, error: DataError, number: int, text: str) -> None:
        """Tell of a broken row if somebody listens; else the error stands."""
        if self.on_broken is None:
            raise error
        self.on_broken(number, str(error).removeprefix(f"{self.path}, ").partition(": ")[2].rstrip("."), text)


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
        "rejected_response",
        "rejected_messages",
        "preferred_output",
        "response_a",
        "conversation_a",
        "human_ref_A",
        "snapshot",
    )
)
"""Columns by which one JSON object is known for a row: some format of `formats/registry.py` needs them."""


def open_unpacked(path: Path) -> IO[bytes]:
    """Open a file, unpacked if it is gzip."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def first_bad_byte(path: Path) -> int:
    """Counted from the file's start; the reader's own error counts from the start of a block."""
    try:
        with open_unpacked(path) as file:
            file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def as_row(value: Any, path: Path, number: int) -> Row:
    """A value as a row. Raises `DataError` if it is no object, or a whole table."""
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {number}: expected an object, found {type(value).__name__}.")
    if is_a_table(value):
        raise DataError(f"{path}, row {number}: it {TABLE}.")
    return value


TABLE = "holds columns, not rows: with pandas write it by to_json(PATH, orient='records', lines=True)"

_ONE_OF_EACH = ("prompt", "chosen", "rejected", "instruction", "question", "completion")
"""Columns that never hold a list of texts in a row."""


def is_a_table(value: dict[str, Any]) -> bool:
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

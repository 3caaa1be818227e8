"""Rows of tables that are text: CSV and TSV, as programs, spreadsheets and hands write them."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from lora_dpo.data.encoding import encoding_of, name_of
from lora_dpo.data.row_reading import Reading, Row
from lora_dpo.data.table import is_blank, named
from lora_dpo.errors import DataError

_SAMPLE = 256 << 10
"""Characters from which a separator is told."""
_ROWS = 200
"""Rows of them that are looked at."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SEP_LINE = re.compile(r"\ufeff?\s*\"?sep=(.)\"?\s*\Z", re.IGNORECASE)
"""Excel's own first line, which names the separator and is no row."""
_DECIMALS = re.compile(r"[+-]?\d+([.,])\d+")


@dataclass(frozen=True)
class _Layout:
    """How the cells of a file are written."""

    separator: str
    spaced: bool
    """Written by hand, with a space after each separator: quotes begin behind it."""
    quoted: bool = True
    """False where quotes are part of the texts, as in a TSV that no spreadsheet wrote."""
    told: bool = False
    """True if a line `sep=;` stands above the header."""


def read_csv(file: IO[bytes], reading: Reading) -> Iterator[tuple[int, Row]]:
    """Rows of a table of text, numbered as a spreadsheet numbers them: the header is one, and so are blank rows."""
    csv.field_size_limit(1 << 30)  # answers are longer than the 128 KiB that the module allows
    path, facts = reading.path, reading.facts
    facts.table = True
    codec, said = encoding_of(file, path)
    facts.notes += [said] if said else []
    try:
        layout = _layout(file, codec, reading)
        with _text(file, codec) as text:
            yield from _rows(_numbered(text, layout), reading, layout)
    except csv.Error as error:
        raise DataError(f"{path}: broken CSV ({error}).") from error
    except UnicodeDecodeError as error:
        if codec.startswith("utf-8"):
            raise
        raise DataError(f"{path}: its text is no whole {name_of(codec)} ({error.reason}). Save it as UTF-8.") from error


@contextlib.contextmanager
def _text(file: IO[bytes], codec: str) -> Iterator[io.TextIOWrapper]:
    """The text of a file from its start; the file stays open behind it."""
    file.seek(0)
    text = io.TextIOWrapper(file, encoding=codec, newline="")
    try:
        yield text
    finally:
        with contextlib.suppress(ValueError):  # the file was closed meanwhile
            text.detach()


def _rows(cells: Iterator[tuple[int, list[str]]], reading: Reading, layout: _Layout) -> Iterator[tuple[int, Row]]:
    header: list[str] | None = None
    for number, row in cells:
        if is_blank(row):
            continue
        if header is None:
            header = named(row, reading.path)
        elif not is_blank(row[len(header) :]):  # a separator at the line's end alone is nobody's cell
            marks = _SEPARATORS.get(layout.separator, f"{layout.separator!r}")
            error = DataError(f"{reading.path}, row {number}: more cells than columns: quote texts that hold {marks}.")
            reading.broken(error, number, json.dumps(row, ensure_ascii=False))
        else:
            yield number, dict(itertools.zip_longest(header, row[: len(header)]))


def _numbered(text: io.TextIOBase, layout: _Layout) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(
        text,
        delimiter=layout.separator,
        strict=True,
        skipinitialspace=layout.spaced,
        quoting=csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE,
    )
    return enumerate(itertools.islice(rows, int(layout.told), None), start=1)


def _layout(file: IO[bytes], codec: str, reading: Reading) -> _Layout:
    """How the cells of a file are written; what a person should know of that is noted."""
    with _text(file, codec) as text:
        sample = text.read(_SAMPLE)
    told = _SEP_LINE.fullmatch(sample.split("\n", 1)[0])
    if told:
        sample = sample.partition("\n")[2]
    separator = told[1] if told else _separator(sample, tabs=".tsv" in map(str.lower, reading.path.suffixes))
    rows = _parsed(sample, separator)
    spaced = bool(rows) and len(rows[0]) > 1 and all(name.startswith(" ") for name in rows[0][1:])
    layout = _Layout(separator, spaced, told=bool(told))
    facts = reading.facts
    if separator != ",":
        facts.notes.append(f"{_SEPARATORS.get(separator, repr(separator))} between its cells")
        marks = {found[1] for row in rows[1:] for cell in row if (found := _DECIMALS.fullmatch(cell.strip()))}
        facts.decimal_comma = marks == {","}
        facts.notes += ["decimal commas"] if facts.decimal_comma else []
    if separator == "\t" and not _quotes_close(file, codec, layout):
        facts.notes.append("quotes are part of its texts")
        return _Layout(separator, spaced, quoted=False, told=bool(told))
    return layout


def _separator(sample: str, *, tabs: bool) -> str:
    """What stands between the cells: what divides the header, and the rows below it into as many cells."""
    best, most = "\t" if tabs else ",", (0.0, 1)
    for separator in sorted(_SEPARATORS, key=lambda mark: mark != best):
        rows = _parsed(sample, separator)
        if not rows or len(rows[0]) < 2:
            continue
        alike = sum(len(row) == len(rows[0]) for row in rows[1:]) / max(1, len(rows) - 1)
        if (alike, len(rows[0])) > most or most == (0.0, 1):
            best, most = separator, (alike, len(rows[0]))
    return best


def _parsed(sample: str, separator: str) -> list[list[str]]:
    """The rows of a sample in which something is written; what comes after its first broken one is left out."""
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):
        for row in csv.reader(io.StringIO(sample, newline=""), delimiter=separator):
            if not is_blank(row):
                rows.append(row)
            if len(rows) > _ROWS:
                break
    return rows[:-1] if len(sample) >= _SAMPLE and len(rows) > 1 else rows  # the last one is cut


def _quotes_close(file: IO[bytes], codec: str, layout: _Layout) -> bool:
    """Whether a table with tabs can be read with quotes around its cells, as Excel writes it, to its end.

    Other programs put quotes around nothing: there a text that begins with one would swallow the cells behind it.
    """
    width = None
    with _text(file, codec) as text:
        try:
            for _, row in _numbered(text, layout):
                if is_blank(row):
                    continue
                width = width or len(row)
                if not is_blank(row[width:]) or len(row) < width:
                    return False
        except csv.Error:
            return False
    return True

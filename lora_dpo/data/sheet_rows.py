"""Rows of spreadsheets: `.xlsx` through openpyxl, `.ods` from the XML that it is.

Both are read as a stream, cell by cell, since a small file may name a cell a million rows down, or repeat one as often.
"""

from __future__ import annotations

import datetime
import itertools
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from lora_dpo.config.reading import nearest
from lora_dpo.data.row_reading import Reading, Row
from lora_dpo.data.table import is_blank, named
from lora_dpo.errors import DataError
from lora_dpo.quiet import never_warn
from lora_dpo.text import shown

MOST_COLUMNS = 1024
MOST_ROWS = 1 << 20
"""A sheet of Excel and of LibreOffice has no more rows; of columns they have more, a table of pairs has not."""
_LOOKED_AT = 32
"""Rows from which the width of a table is told: its header may lack a name."""

Cells = Iterator[tuple[int, list[str]]]
"""Rows in which something is written, with their numbers as a spreadsheet shows them, from 1."""
Book = tuple[list[tuple[str, bool]], Callable[[str], Cells]]
"""The names of a file's sheets and whether each can be seen, and the rows of the one with a name."""


def read_xlsx(file: IO[bytes], reading: Reading) -> Iterator[tuple[int, Row]]:
    """Rows of a sheet of an Excel workbook. Raises `DataError` as `_rows` does."""
    yield from _well_read(_rows(_xlsx, file, reading), reading.path)


def read_ods(file: IO[bytes], reading: Reading) -> Iterator[tuple[int, Row]]:
    """Rows of a sheet of an OpenDocument spreadsheet. Raises `DataError` as `_rows` does."""
    yield from _well_read(_rows(_ods, file, reading), reading.path)


def sheet_size(file: IO[bytes], kind: str, limit: int, row_size: int) -> int:
    """Bytes that the rows of a file's sheets hold, each text counted where it stands; `row_size` more for a row.

    Counting ends above `limit`. What is broken counts as far as it can be read: the reader says what is wrong.

    Args:
        kind: `.ods`, or one of Excel's.
    """
    size = 0
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > limit:
            return size
        size = 0
        with ExitStack() as stack:
            sheets, rows_of = (_ods if kind == ".ods" else _xlsx)(file, stack)
            for name, _ in sheets:  # whichever of them is asked for
                of_sheet = 0
                for _, row in rows_of(name):
                    of_sheet += row_size + sum(len(cell.encode("utf-8", "replace")) for cell in row)
                    if of_sheet > limit:
                        return of_sheet
                size = max(size, of_sheet)
    except Exception:  # noqa: S110 - whatever a broken file makes the readers raise, they raise again when it is read
        pass
    return size


def _rows(open_book: Callable[[IO[bytes], ExitStack], Book], file: IO[bytes], reading: Reading) -> Iterator[Any]:
    """The rows below the first one in which something is written, which names the columns.

    Raises:
        DataError: the file has no such sheet, or the sheet is empty.
    """
    reading.facts.table = True
    with ExitStack() as stack:
        sheets, rows_of = open_book(file, stack)
        name = _chosen([sheet for sheet, _ in sheets], sheets, reading)
        cells = rows_of(name)
        first = list(itertools.islice(cells, _LOOKED_AT))
        if not first:
            others = [shown(sheet) for sheet, _ in sheets if sheet != name]
            hint = f" Name one of {', '.join(others[:6])} behind a colon: {reading.path}:SHEET." if others else ""
            raise DataError(f"{reading.path}: its sheet {shown(name)} is empty.{hint}")
        width = max(len(row) for _, row in first)
        header = named([*first[0][1], *[""] * width][:width], reading.path)
        for number, row in itertools.chain(first[1:], cells):
            if not is_blank(row[:width]):
                yield number, dict(zip(header, itertools.chain(row, itertools.repeat("")), strict=False))


def _chosen(names: list[str], sheets: Sequence[tuple[str, bool]], reading: Reading) -> str:
    """The sheet to read: the one that was asked for, or the first that can be seen."""
    if not names:
        raise DataError(f"{reading.path} has no sheet that can be read. Save it as an ordinary .xlsx, or as .csv.")
    if reading.sheet is not None and reading.sheet not in names:
        listed = ", ".join(shown(name) for name in names[:12])
        hint = nearest(reading.sheet, names)
        raise DataError(f"{reading.path} has no sheet {shown(reading.sheet)}.{hint} Its sheets are {listed}.")
    chosen = reading.sheet or next((name for name, seen in sheets if seen), names[0])
    if len(names) > 1:
        others = ", ".join(shown(name) for name in names[:7] if name != chosen)
        reading.facts.notes.append(f"its sheet {shown(chosen)}, and not {others}")
    return chosen


def _well_read(rows: Iterator[tuple[int, Row]], path: Path) -> Iterator[tuple[int, Row]]:
    """Rows, where whatever a broken file makes a reader raise is one error."""
    try:
        yield from rows
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a workbook is a dozen files of XML, and openpyxl raises whatever comes of a broken one
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, zipfile.BadZipFile) and _is_old_or_locked(path):
            raise DataError(
                f"{path} is locked by a password, or is an old Excel file (.xls) under another name. Save it as .xlsx "
                "without a password, or as .csv."
            ) from error
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: broken spreadsheet ({detail[:120]}). Save it once more, or as .csv.") from error


def _is_old_or_locked(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\xd0\xcf\x11\xe0"  # the compound files of Office before 2007, and of its encryption


def _written(row: Sequence[str]) -> list[str]:
    """A row up to its last cell in which something is written."""
    width = len(row)
    while width and not row[width - 1].strip():
        width -= 1
    return list(row[:width])


# --- .xlsx ----------------------------------------------------------------------------------------


def _xlsx(file: IO[bytes], stack: ExitStack) -> Book:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise DataError(
            "An Excel file needs openpyxl, which is not installed. Get it: pip install 'lora-dpo[data]', or save the "
            "sheet as .csv."
        ) from None
    never_warn(UserWarning, r"openpyxl\.")  # of what it would lose if it wrote the file again
    book = load_workbook(file, read_only=True, data_only=True, keep_links=False)
    stack.callback(book.close)

    def rows_of(name: str) -> Cells:
        sheet = book[name]
        first = next(_xlsx_rows(sheet, MOST_COLUMNS), None)
        if first is None:
            return iter(())
        looked_at = _xlsx_rows(sheet, MOST_COLUMNS, last=first[0] + _LOOKED_AT)
        return _xlsx_rows(sheet, max(len(row) for _, row in looked_at))

    return [(sheet.title, sheet.sheet_state == "visible") for sheet in book.worksheets], rows_of


def _xlsx_rows(sheet: Any, width: int, last: int = MOST_ROWS) -> Cells:
    """The rows of a sheet, as many cells of each as asked for: openpyxl fills every row up to there."""
    for number, values in enumerate(sheet.iter_rows(max_row=last, max_col=width, values_only=True), start=1):
        if values.count(None) < len(values):
            row = _written([_as_text(value) for value in values])
            if row:
                yield number, row


_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")


def _as_text(value: Any) -> str:
    """A cell as a person reads it: 5 and not 5.0, TRUE, 2024-05-01."""
    if value is None:
        return ""
    if isinstance(value, str):  # Excel writes a character that XML has not as _x000D_
        return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value).replace("\r\n", "\n")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"  # the digits that a spreadsheet keeps
    if isinstance(value, datetime.datetime):
        day, clock = value.date(), value.time()
        return day.isoformat() if clock == datetime.time() else f"{day.isoformat()} {_clock(clock)}"
    return _clock(value) if isinstance(value, datetime.time) else str(value)


def _clock(value: datetime.time) -> str:
    return value.isoformat("seconds" if value.second else "minutes")


# --- .ods -----------------------------------------------------------------------------------------

_OFFICE = "{urn:oasis:names:tc:opendocument:xmlns:office:1.0}"
_TABLE = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}"
_TEXT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"
_STYLE = "{urn:oasis:names:tc:opendocument:xmlns:style:1.0}"
_SIGNS = {f"{_TEXT}tab": "\t", f"{_TEXT}line-break": "\n"}
_ASIDE = (f"{_OFFICE}annotation", f"{_TEXT}note", f"{_TEXT}ruby-text")
"""What stands in a paragraph and is none of its text."""


def _ods(file: IO[bytes], stack: ExitStack) -> Book:
    archive = stack.enter_context(zipfile.ZipFile(file))
    with archive.open("META-INF/manifest.xml") as manifest:
        if b"encryption-data" in manifest.read(1 << 20):
            raise DataError("A spreadsheet that is locked by a password cannot be read. Save it without, or as .csv.")

    def rows_of(name: str) -> Cells:
        with archive.open("content.xml") as content:
            yield from _ods_rows(content, name)

    with archive.open("content.xml") as content:
        return list(_ods_sheets(content)), rows_of


def _elements(content: IO[bytes], *names: str) -> Iterator[tuple[str, ElementTree.Element]]:
    """Starts and ends of the elements with these names; what is in one is forgotten once its end was seen."""
    # Python's parser fetches nothing, and (expat from 2.4.1 on) it refuses entities that grow without end.
    for event, element in ElementTree.iterparse(content, events=("start", "end")):  # noqa: S314
        if element.tag in names:
            yield event, element
            if event == "end":
                element.clear()


def _ods_sheets(content: IO[bytes]) -> Iterator[tuple[str, bool]]:
    hidden: set[str | None] = set()
    depth = 0
    style, table, row = f"{_STYLE}style", f"{_TABLE}table", f"{_TABLE}table-row"
    for event, element in _elements(content, style, table, row):
        if element.tag == style and event == "end":
            properties = element.find(f"{_STYLE}table-properties")
            if properties is not None and properties.get(f"{_TABLE}display") == "false":
                hidden.add(element.get(f"{_STYLE}name"))
        elif element.tag == table:
            depth += 1 if event == "start" else -1
            if event == "start" and depth == 1:  # a table within a cell is no sheet
                yield element.get(f"{_TABLE}name") or "", element.get(f"{_TABLE}style-name") not in hidden


def _ods_rows(content: IO[bytes], name: str) -> Cells:
    number, depth, inside = 1, 0, False
    table, row = f"{_TABLE}table", f"{_TABLE}table-row"
    for event, element in _elements(content, table, row):
        if element.tag == table:
            depth += 1 if event == "start" else -1
            if depth == 1 and event == "start":
                inside = element.get(f"{_TABLE}name") == name
            elif depth == 0 and inside:
                return
        elif inside and depth == 1 and event == "end":
            times = _times(element, "rows")
            cells = _ods_row(element)
            if cells:
                yield from ((again, cells) for again in range(number, min(number + times, MOST_ROWS + 1)))
            number += times
            if number > MOST_ROWS:
                return


def _times(element: ElementTree.Element, what: str) -> int:
    return max(1, int(element.get(f"{_TABLE}number-{what}-repeated") or 1))


def _ods_row(row: ElementTree.Element) -> list[str]:
    cells: list[str] = []
    blank = 0  # cells without text, which are written only if another one follows
    for cell in row:
        if cell.tag in (f"{_TABLE}table-cell", f"{_TABLE}covered-table-cell"):
            times, text = _times(cell, "columns"), _ods_text(cell)
            if not text.strip():
                blank += times
            elif len(cells) + blank < MOST_COLUMNS:
                cells += [""] * blank + [text] * min(times, MOST_COLUMNS - len(cells) - blank)
                blank = 0
    return cells


def _ods_text(cell: ElementTree.Element) -> str:
    """A cell as `_as_text` writes it: by its value where that has a kind, else its paragraphs."""
    kind = cell.get(f"{_OFFICE}value-type")
    value = cell.get(f"{_OFFICE}value")
    if kind in ("float", "percentage", "currency") and value is not None and not _is_error(cell):
        return _as_text(float(value))
    if kind == "boolean":
        return (cell.get(f"{_OFFICE}boolean-value") or "").upper()
    if kind == "date":
        day, _, clock = (cell.get(f"{_OFFICE}date-value") or "").partition("T")
        return f"{day} {clock.removesuffix(':00')}" if clock.strip("0:") else day
    paragraphs = [_said(part) for part in cell if part.tag in (f"{_TEXT}p", f"{_TEXT}h")]
    return "\n".join(paragraphs) or cell.get(f"{_OFFICE}string-value") or ""


def _is_error(cell: ElementTree.Element) -> bool:
    """LibreOffice says of a formula's error that it is one in an attribute of its own."""
    return any(name.endswith("}value-type") and value == "error" for name, value in cell.attrib.items())


def _said(element: ElementTree.Element) -> str:
    """The text of a paragraph: a tab, a break and every space after the first are elements in it."""
    parts = [_one_space(element.text)]
    for part in element:
        if part.tag == f"{_TEXT}s":
            parts.append(" " * min(1000, int(part.get(f"{_TEXT}c") or 1)))
        elif part.tag in _SIGNS:
            parts.append(_SIGNS[part.tag])
        elif part.tag not in _ASIDE:
            parts.append(_said(part))
        parts.append(_one_space(part.tail))
    return "".join(parts)


def _one_space(text: str | None) -> str:
    return re.sub(r"[ \t\r\n]+", " ", text or "")

"""Small spreadsheets as Excel and LibreOffice write them, for tests: sheets of rows of cells."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

Sheets = Mapping[str, Sequence[Sequence[Any]]]


class Error(str):
    """What a cell shows whose formula failed."""


def as_xlsx(path: Path, sheets: Sheets) -> str:
    """Write a workbook with openpyxl, which writes what Excel does. Returns the path as text."""
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for number, row in enumerate(rows, start=1):
            for place, value in enumerate(row, start=1):
                cell = sheet.cell(number, place)
                cell.value = value
                if isinstance(value, Error):
                    cell.data_type = "e"
    book.save(path)
    return str(path)


OFFICE = "urn:oasis:names:tc:opendocument:xmlns:"
SPACES = " ".join(f'xmlns:{name}="{OFFICE}{name}:1.0"' for name in ("office", "table", "text", "style"))
CALC = 'xmlns:calcext="urn:org:documentfoundation:names:experimental:calc:xmlns:calcext:1.0"'
MANIFEST = (
    f'<manifest:manifest xmlns:manifest="{OFFICE}manifest:1.0"><manifest:file-entry manifest:full-path="/" '
    'manifest:media-type="application/vnd.oasis.opendocument.spreadsheet"/>{more}</manifest:manifest>'
)


def ods_cell(value: Any) -> str:
    """A cell as LibreOffice writes it: blank, an error, a boolean, a number, a date or text in paragraphs."""
    if value is None:
        return "<table:table-cell/>"
    if isinstance(value, Error):
        return (
            '<table:table-cell table:formula="of:=[.#REF!]" office:value-type="string" office:string-value="" '
            f'calcext:value-type="error"><text:p>{escape(value)}</text:p></table:table-cell>'
        )
    if isinstance(value, bool):
        kind = f'office:value-type="boolean" office:boolean-value="{str(value).lower()}"'
    elif isinstance(value, int | float):
        kind = f'office:value-type="float" office:value="{value}"'
    elif isinstance(value, datetime.date):
        kind = f'office:value-type="date" office:date-value="{value.isoformat()}"'
    else:
        kind = 'office:value-type="string"'
    shown = "".join(
        "<text:p>" + escape(line).replace("  ", ' <text:s text:c="1"/>').replace("\t", "<text:tab/>") + "</text:p>"
        for line in str(value).replace(".", "," if isinstance(value, float) else ".").split("\n")
    )
    return f"<table:table-cell {kind}>{shown}</table:table-cell>"


def as_ods(path: Path, sheets: Sheets, *, hidden: Sequence[str] = (), tail: str = "", more: str = "") -> str:
    """Write an OpenDocument spreadsheet. Returns the path as text.

    Args:
        hidden: sheets that cannot be seen.
        tail: XML behind the rows of each sheet.
        more: XML in the manifest.
    """
    tables = "".join(
        f"<table:table table:name={quoteattr(name)} table:style-name={quoteattr('off' if name in hidden else 'on')}>"
        + "".join(
            f"<table:table-row>{''.join(map(ods_cell, row))}"
            '<table:table-cell table:number-columns-repeated="16380"/></table:table-row>'
            if row
            else '<table:table-row table:number-rows-repeated="1"><table:table-cell/></table:table-row>'
            for row in rows
        )
        + f'{tail}<table:table-row table:number-rows-repeated="1048000"><table:table-cell/></table:table-row>'
        "</table:table>"
        for name, rows in sheets.items()
    )
    styles = (
        '<style:style style:name="on" style:family="table"><style:table-properties table:display="true"/></style:style>'
        '<style:style style:name="off" style:family="table"><style:table-properties table:display="false"/>'
        "</style:style>"
    )
    content = (
        f'<?xml version="1.0" encoding="UTF-8"?><office:document-content {SPACES} {CALC}>'
        f"<office:automatic-styles>{styles}</office:automatic-styles>"
        f"<office:body><office:spreadsheet>{tables}</office:spreadsheet></office:body></office:document-content>"
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet", zipfile.ZIP_STORED)
        archive.writestr("META-INF/manifest.xml", MANIFEST.format(more=more))
        archive.writestr("content.xml", content)
    return str(path)

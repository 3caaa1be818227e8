"""What all tables share, whatever file they are in: a header above rows of cells, and how both are told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_dpo.errors import DataError
from lora_dpo.text import shown

_LETTERS = 26


def named(header: Sequence[str], path: Path) -> list[str]:
    """The names of a table's columns: on one line each, and `column C` for one without a name.

    Raises:
        DataError: two columns have one name, so one of them would be lost.
    """
    names = [_name(cell) or f"column {letters_of(place)}" for place, cell in enumerate(header)]
    refuse_twice_named(names, path)
    return names


def _name(cell: str) -> str:
    text = " ".join(cell.split())
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text  # by hand, after a space


def refuse_twice_named(columns: Sequence[str], path: Path) -> None:
    """Raise `DataError` if two columns have one name: one of them would be lost."""
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise DataError(f"{path} has two columns named {shown(twice[0])}. Rename or remove one of them.")


def letters_of(place: int) -> str:
    """What a spreadsheet calls a column: A for 0, Z for 25, AA for 26."""
    before, letter = divmod(place, _LETTERS)
    return (letters_of(before - 1) if before else "") + chr(ord("A") + letter)


def is_blank(cells: Sequence[str]) -> bool:
    """True for a row in which nothing is written."""
    return not any(cell.strip() for cell in cells)


_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*%?")


def is_number(cell: str) -> bool:
    """True for a cell that holds a number and nothing else, however its decimals are written."""
    return _NUMBER.fullmatch(cell.strip()) is not None


def without_comma(cell: str, *, decimal_comma: bool) -> str:
    """A number as Python reads it: `4,5` is 4.5.

    Args:
        decimal_comma: the table has decimal commas, so that 1,234 is a little more than 1. Without that knowledge it
            may be a thousand and is left as it is.
    """
    text = cell.strip()
    if decimal_comma and re.fullmatch(r"[+-]?\d+(?:\.\d{3})*,\d+", text):
        return text.replace(".", "").replace(",", ".")
    if re.fullmatch(r"[+-]?\d+,\d+", text) and not re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text):
        return text.replace(",", ".")
    return cell

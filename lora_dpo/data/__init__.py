"""Preference data: files and hub data sets to pairs, and pairs to token ids."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dpo.data.files import read_rows
from lora_dpo.data.forms import BadRow, pair_from_row
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, ReadReport
from lora_dpo.data.template import Message
from lora_dpo.data.tokens import TokenPair, tokenize_pairs
from lora_dpo.errors import DataError

__all__ = [
    "Dropped",
    "Message",
    "Origin",
    "PreferencePair",
    "ReadReport",
    "TokenPair",
    "read_pairs",
    "tokenize_pairs",
]


def read_pairs(sources: str | Sequence[str], *, on_bad_row: str = "drop") -> tuple[list[PreferencePair], ReadReport]:
    """Read preference pairs from files or hub data sets, in order.

    Args:
        sources: one path or hub id, or several.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" raises at the first.

    Raises:
        DataError: a source cannot be read, or no row of it is usable.
    """
    if not sources:
        raise DataError("The list of preference files is empty. Name at least one file or hub data set.")
    pairs: list[PreferencePair] = []
    report = ReadReport()
    for source in [sources] if isinstance(sources, str) else sources:
        before, dropped_before = len(pairs), len(report.dropped)
        for number, row in read_rows(source):
            report.rows += 1
            origin = Origin(source, number)
            try:
                pairs.append(pair_from_row(row, origin))
            except BadRow as error:
                if on_bad_row == "error":
                    raise DataError(f"{source}, row {number}: {error}.") from None
                report.dropped.append(Dropped(origin, str(error)))
        if len(pairs) == before:
            why = report.dropped[dropped_before].reason if len(report.dropped) > dropped_before else "no rows"
            raise DataError(f"{source} holds no usable pair: {why}. See docs/data.md for the forms that are read.")
    return pairs, report

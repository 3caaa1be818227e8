"""Rows of data sets on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lora_dpo.data.row_reading import Row
from lora_dpo.errors import DataError
from lora_dpo.files import looks_local

_HUB_ID = re.compile(r"(?P<owner>\w[\w.-]*)/[\w.-]+(/[\w.-]+)?(:.+)?")


def is_hub_source(source: str) -> bool:
    """True for `owner/name…` unless `owner` looks like a folder here: a local file's name is nobody else's matter."""
    found = _HUB_ID.fullmatch(source)
    return found is not None and not looks_local(f"{found['owner']}/name")


def read_hub(source: str) -> Iterator[tuple[int, Row]]:
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
        yield number, without_padding(dict(row))


def without_padding(row: Row) -> Row:
    """A row out of Arrow as it was put in: one column's structs all have the same keys, null where a row had none.

    A null that the row had itself looks the same and goes, too. Those of columns stay: they are the table's own.
    """
    return {column: _unpadded(value) for column, value in row.items()}


def _unpadded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return [_unpadded(item) for item in value] if isinstance(value, list) else value

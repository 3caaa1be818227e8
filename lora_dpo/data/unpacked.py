"""How much a packed file of rows holds, counted before anything is made of it."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any

from lora_dpo.data.sheet_rows import sheet_size

SHEETS = (".xlsx", ".xlsm", ".ods")
ROW = 64
"""Bytes that a row counts beside its values: about what braces, names and quotes take as a line of JSON."""


def unpacked_size(path: Path, limit: int) -> int:
    """Bytes of a file's rows as they are when nothing is packed any more: gzip, Parquet with its dictionaries, sheets.

    Counting ends above `limit`. What is broken counts as far as it can be read: the reader says what is wrong.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join((suffixes[:-1] if packed else suffixes)[-1:])
    inner = kind == ".parquet" or kind in SHEETS
    if not packed and not inner:
        return path.stat().st_size
    content: IO[bytes] | None = io.BytesIO() if inner else None
    if packed:
        size = _gzip_size(path, limit, content)
        if content is None or size > limit:
            return size
        return _inner_size(content, kind, limit)
    with path.open("rb") as file:
        return _inner_size(file, kind, limit)


def _inner_size(content: IO[bytes], kind: str, limit: int) -> int:
    return _parquet_size(content, limit) if kind == ".parquet" else sheet_size(content, kind, limit, ROW)


def _gzip_size(path: Path, limit: int, content: IO[bytes] | None) -> int:
    size = 0
    try:
        with gzip.open(path) as file:
            while size <= limit and (block := file.read(1 << 20)):
                size += len(block)
                if content is not None:
                    content.write(block)
    except (OSError, EOFError, zlib.error):
        pass
    return size


def _parquet_size(source: IO[bytes], limit: int) -> int:
    """Parquet stores a text that repeats once, and a million rows of it in a few bytes: its own sizes say little."""
    import pyarrow
    import pyarrow.parquet

    size = 0
    try:
        index = pyarrow.parquet.read_metadata(source)
        claimed = sum(_claimed(index.row_group(group)) for group in range(index.num_row_groups))
        if max(index.num_rows * ROW, claimed) > limit:
            return limit + 1
        columns = [index.schema.column(number) for number in range(index.num_columns)]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts)
        for batch in file.iter_batches(batch_size=1024):
            size += ROW * batch.num_rows + sum(_values_size(column) for column in batch.columns)
            if size > limit:
                break
    except pyarrow.ArrowNotImplementedError:  # a kind of column that cannot be counted
        return limit + 1
    except (pyarrow.ArrowException, OSError):
        pass
    return size


def _claimed(group: Any) -> int:
    """Bytes that a group of rows takes at least: its pages without compression, and a place for each value."""
    places = sum(8 * group.column(number).num_values for number in range(group.num_columns))
    return int(max(group.total_byte_size, places))


def _values_size(column: Any) -> int:
    """Bytes of a column's values, each counted where it stands and not once for all."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
        return int(pyarrow.compute.sum(lengths.cast(pyarrow.int64())).as_py() or 0)
    if pyarrow.types.is_map(kind):
        pairs = pyarrow.StructArray.from_arrays([column.keys, column.items], ["key", "value"])
        column = pyarrow.ListArray.from_arrays(column.offsets, pairs)
    if pyarrow.types.is_nested(kind) and not pyarrow.types.is_struct(kind):
        return 8 * len(column) + _values_size(column.flatten())
    if pyarrow.types.is_struct(kind):
        return sum(_values_size(part) for part in column.flatten())
    return int(column.nbytes)

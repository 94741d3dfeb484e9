"""Lists in Parquet: only the named columns are read, row group by row group.

A row whose URL or caption is not UTF-8, or too large, is counted with its number and left out.
"""

import contextlib
import functools
from collections.abc import Generator, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.data.list_columns import ListColumns
from pipeline.data.reading import MAX_CELL, Reading
from pipeline.errors import DataError
from pipeline.workspace.files import is_remote, open_file

pc: Any = pyarrow.compute  # its functions are made when it is imported


@contextlib.contextmanager
def open_parquet(uri: str) -> Generator[pq.ParquetFile]:
    """Open a file, here or in an object store."""
    if is_remote(uri):
        with open_file(uri) as stream, pq.ParquetFile(stream) as parquet:
            yield parquet
    else:
        with pq.ParquetFile(uri.removeprefix("file://")) as parquet:
            yield parquet


def row_group_spans(uri: str, num_bytes: float) -> list[tuple[int, int, int]]:
    """First row group, row group after the last, and size in bytes of consecutive spans of about ``num_bytes``."""
    with open_parquet(uri) as parquet:
        sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
    spans: list[tuple[int, int, int]] = []
    start = size = 0
    for group, group_bytes in enumerate(sizes):
        if size and size + group_bytes > num_bytes:
            spans.append((start, group, size))
            start, size = group, 0
        size += group_bytes
    return [*spans, (start, len(sizes), size)]


def extra_types(uri: str, columns: ListColumns) -> pa.Schema:
    """The types of the other columns, under the names that they get."""
    with open_parquet(uri) as parquet:
        schema = parquet.schema_arrow
        kinds = [schema.field(name).type for name in columns.find(schema.names, uri)[2:]]
    return pa.schema(list(zip(columns.extra, kinds, strict=True)))


def parquet_tables(
    uri: str, groups: tuple[int, int | None], columns: ListColumns, reading: Reading, batch_rows: int
) -> Iterator[pa.Table]:
    """Stream row groups as tables of ``url``, ``caption`` and the other columns.

    Args:
        uri: The file.
        groups: First row group, and the one after the last; None: to the end.
        columns: The columns to read.
        reading: Counts the rows that are left out.
        batch_rows: Most rows in a table.
    """
    with open_parquet(uri) as parquet:
        url, caption, *others = columns.find(parquet.schema_arrow.names, uri)
        numbers = list(range(groups[0], parquet.num_row_groups if groups[1] is None else groups[1]))
        row = 0
        if not numbers:
            return
        needed = list(dict.fromkeys(name for name in (url, caption, *others) if name))
        for batch in parquet.iter_batches(batch_rows, row_groups=numbers, columns=needed):
            num_rows = reading.take(batch.num_rows)
            table = pa.Table.from_batches([batch.slice(0, num_rows)]).replace_schema_metadata(None)
            texts = [_text_column(table.column(url), url)]
            texts.append(_text_column(table.column(caption), caption) if caption else pa.nulls(len(table), pa.string()))
            is_bad = functools.reduce(pc.or_, [_is_bad(column) for column in texts])
            result = pa.table(
                [*texts, *(table.column(name) for name in others)],
                names=["url", "caption", *columns.extra],
            )
            if pc.any(is_bad).as_py():
                for number in pc.indices_nonzero(is_bad).to_pylist():
                    reading.leave_out(
                        row + number + 1, f"a URL or caption that is not UTF-8, or above {MAX_CELL} bytes"
                    )
                result = result.filter(pc.invert(is_bad))
            row += num_rows
            reading.at_line(row)
            yield result
            if reading.is_full:
                return


def _text_column(column: Any, name: str) -> Any:
    """A column as text; its cells may still be invalid UTF-8.

    Raises:
        DataError: If it holds no texts; names the column and its type.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_floating(kind):  # a column of a table that has no text in it: pandas writes NaN
        column = pc.if_else(pc.is_nan(column), None, column)
    if column.null_count == len(column):
        return pa.nulls(len(column), pa.string())
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return column.cast(pa.binary()).cast(pa.string(), safe=False) if pa.types.is_binary(kind) else column
    is_text = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) or pa.types.is_string_view(kind)
    if not is_text and not pa.types.is_integer(kind):
        raise DataError(f"column {name} is {kind}, not text")
    return column.cast(pa.string(), safe=False)


def _is_bad(column: Any) -> Any:
    """Which cells are too large, or are not UTF-8."""
    is_large = pc.fill_null(pc.greater(pc.binary_length(column), MAX_CELL), False)
    try:
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            chunk.validate(full=True)
    except pa.ArrowInvalid:
        cells = column.cast(pa.binary(), safe=False).to_pylist()
        return pc.or_(is_large, pa.array([cell is not None and not _is_utf8(cell) for cell in cells]))
    return is_large


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True

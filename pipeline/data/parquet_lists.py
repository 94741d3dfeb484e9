"""Lists in Parquet: only the named columns are read, row group by row group.

A row whose URL or caption is too large, or of which a cell is not UTF-8, is counted with its number and left out.
"""

import contextlib
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
            extra = [_decoded(table.column(name)) for name in others]
            result = pa.table([*texts, *extra], names=["url", "caption", *columns.extra])
            fault = f"a URL or caption that is not UTF-8, or above {MAX_CELL} bytes"
            bad_rows = {number: fault for column in texts for number in _bad_rows(column)}
            for name, column in zip(others, extra, strict=True):
                bad_rows = dict.fromkeys(_not_utf8(column), f"column {name} is not UTF-8") | bad_rows
            if bad_rows:
                for number, reason in bad_rows.items():
                    reading.leave_out(row + number + 1, reason)
                result = result.filter(pa.array([number not in bad_rows for number in range(num_rows)]))
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


def _decoded(column: Any) -> Any:
    """A column beside URL and caption, bytes as text; its cells may still be invalid UTF-8."""
    kind = column.type
    if pa.types.is_dictionary(kind) and _is_bytes(kind.value_type):
        column, kind = column.cast(kind.value_type), kind.value_type
    return column.cast(pa.binary()).cast(pa.string(), safe=False) if _is_bytes(kind) else column


def _is_bytes(kind: Any) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _bad_rows(column: Any) -> list[int]:
    """Rows whose text is too large, or is not UTF-8."""
    is_large = pc.greater(pc.binary_length(column), MAX_CELL)
    return [*pc.indices_nonzero(is_large).to_pylist(), *_not_utf8(column)]


def _not_utf8(column: Any) -> list[int]:
    """Rows whose cell holds text that is not UTF-8, also inside of a list or a record."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return [row for row, cell in enumerate(column) if not _is_readable(cell)]
    return []


def _is_readable(cell: Any) -> bool:
    try:
        cell.as_py()
    except UnicodeDecodeError:
        return False
    return True

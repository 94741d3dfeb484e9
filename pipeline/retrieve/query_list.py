"""A user's list of queries, as one Parquet file with a row group for each part."""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.data.vectors import to_arrow
from pipeline.errors import DataError

PART_ROWS = 2048
"""Queries of a part."""
QUERY_COLUMNS = ("text", "image", "uid", "embedding")
"""What a row may hold; several in one row are added."""

_OTHER_NAMES = {"query": "text", "caption": "text", "prompt": "text", "path": "image", "vector": "embedding"}
_BLOCK_BYTES = 8 << 20


def write_queries(source: Path, target: Path) -> int:
    """Write a list of queries, each with its number in the list.

    Args:
        source: ``.txt`` (a text in each line), ``.csv``, ``.tsv``, ``.jsonl`` (each also compressed), ``.parquet`` or
            ``.npy`` (N, D). Tables have some of the columns ``text`` (or query, caption, prompt), ``image`` (or path),
            ``uid`` and ``embedding`` (or vector); other columns are left out.
        target: Parquet file to write.

    Returns:
        Number of queries.

    Raises:
        DataError: If the list cannot be read, has none of these columns, or is empty.
    """
    try:
        tables = _READERS[_suffix(source)](source)
        num_rows = _write(source, tables, target)
    except KeyError:
        raise DataError(f"{source}: not a list of queries; it may be {', '.join(_READERS)}") from None
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    except (pa.ArrowInvalid, OSError, ValueError, EOFError) as error:
        raise DataError(f"{source}: cannot be read: {error}") from None
    if not num_rows:
        raise DataError(f"{source}: holds no queries")
    return num_rows


def num_parts(queries: Path) -> int:
    """Number of parts of a file that ``write_queries`` wrote."""
    return pq.read_metadata(queries).num_row_groups


def _write(source: Path, tables: Iterable[pa.Table], target: Path) -> int:
    num_rows, waiting, writer = 0, list[pa.Table](), None
    try:
        for table in itertools.chain(tables, [None]):
            if table is not None:
                waiting.append(_named(table, source))
            while waiting and (table is None or sum(map(len, waiting)) >= PART_ROWS):
                whole = pa.concat_tables(waiting)
                part = whole.slice(0, PART_ROWS)
                waiting = [whole.slice(PART_ROWS)] if len(whole) > PART_ROWS else []
                if not len(part):
                    break
                numbers = pa.array(range(num_rows, num_rows + len(part)), pa.int64())
                part = part.add_column(0, "query", numbers)
                writer = writer or pq.ParquetWriter(target, part.schema, compression="zstd")
                writer.write_table(part, row_group_size=PART_ROWS)
                num_rows += len(part)
    finally:
        if writer is not None:
            writer.close()
    return num_rows


def _named(table: pa.Table, source: Path) -> pa.Table:
    """The columns that are queries, under our names; empty texts become null."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        ours = _query_column(name)
        if ours and ours not in columns:
            columns[ours] = _typed(table.column(name), ours, f"{source}: column {name}")
    if not columns:
        raise DataError(
            f"{source}: no column {', '.join(QUERY_COLUMNS)} (or {', '.join(_OTHER_NAMES)}); "
            f"it has {', '.join(table.column_names)}"
        )
    return pa.table({name: columns[name] for name in QUERY_COLUMNS if name in columns})


def _typed(column: pa.ChunkedArray, name: str, where: str) -> Any:
    kind = column.type
    if name == "embedding":
        if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
            return column.cast(pa.list_(pa.float32()))
        raise DataError(f"{where} is {kind}, not lists of numbers")
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where} is {kind}, not text")
    texts = column.cast(pa.string()).to_pylist()
    return pa.array([text if text and text.strip() else None for text in texts], pa.string())


def _text_tables(source: Path) -> Iterator[pa.Table]:
    with pa.input_stream(str(source)) as stream:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8", "replace") for number, line in _lines(stream))
        while chunk := list(itertools.islice(lines, PART_ROWS)):
            yield pa.table({"text": pa.array(chunk, pa.string())})


def _json_tables(source: Path) -> Iterator[pa.Table]:
    with pa.input_stream(str(source)) as stream:
        rows = ((number, _record(line, source, number)) for number, line in _lines(stream) if line.strip())
        names: dict[str, None] = {}
        while chunk := list(itertools.islice(rows, PART_ROWS)):
            for number, row in chunk:
                new = [name for name in row if name not in names and _query_column(name)]
                if new and number >= PART_ROWS:
                    raise DataError(f"{source}: line {number + 1}: has {new[0]}, unlike the first {PART_ROWS} lines")
                names |= dict.fromkeys(new)
            shown = names or chunk[0][1]
            yield pa.table({name: [row.get(name) for _, row in chunk] for name in shown})


def _query_column(name: str) -> str:
    """The column of ours that a user's column is; empty if it is none."""
    ours = _OTHER_NAMES.get(name.lower(), name.lower())
    return ours if ours in QUERY_COLUMNS else ""


def _record(line: bytes, source: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{source}: line {number + 1}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f'{source}: line {number + 1}: not an object, as {{"text": ...}}')
    return row


def _csv_tables(source: Path) -> Iterator[pa.Table]:
    delimiter = "\t" if _suffix(source) == ".tsv" else ","
    with pa.input_stream(str(source)) as stream:
        reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, quote_char=False if delimiter == "\t" else '"'
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys([*QUERY_COLUMNS, *_OTHER_NAMES], pa.string())
            ),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _parquet_tables(source: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(source) as parquet:
        for batch in parquet.iter_batches(batch_size=PART_ROWS):
            yield pa.Table.from_batches([batch])


def _vector_tables(source: Path) -> Iterator[pa.Table]:
    vectors = np.load(source, mmap_mode="r", allow_pickle=False)
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise DataError(f"{source}: {vectors.dtype} of shape {vectors.shape}, not floats (N, D)")
    for start in range(0, len(vectors), PART_ROWS):
        yield pa.table({"embedding": to_arrow(vectors[start : start + PART_ROWS])})


def _lines(stream: Any) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line, without its end."""
    return ((number, line.rstrip(b"\r\n")) for number, line in enumerate(io.BufferedReader(stream)))


_READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".txt": _text_tables,
    ".csv": _csv_tables,
    ".tsv": _csv_tables,
    ".jsonl": _json_tables,
    ".ndjson": _json_tables,
    ".parquet": _parquet_tables,
    ".npy": _vector_tables,
}


def _suffix(source: Path) -> str:
    """The suffix that says the format: that before a compression's."""
    suffixes = [suffix.lower() for suffix in source.suffixes]
    if suffixes and suffixes[-1] in {".gz", ".zst", ".bz2"}:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""

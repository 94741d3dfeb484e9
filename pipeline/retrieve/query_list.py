"""A user's list of queries, as one Parquet file with a row group for each part.

A row that cannot be read, or holds something else than a query, keeps its place and its number, with what is wrong with
it: it fails alone. A list is refused if it is empty, or has no column of queries.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.delimited import csv_records, lines_of, tsv_records
from pipeline.data.json_lists import jsonl_records
from pipeline.data.reading import Reading
from pipeline.data.vectors import to_arrow
from pipeline.errors import DataError

PART_ROWS = 2048
"""Queries of a part."""
QUERY_COLUMNS = ("text", "image", "uid", "embedding")
"""What a row may hold; several in one row are added."""
PROBLEM = "problem"
"""Column of what is wrong with a row of the list; null if nothing is."""

_T = TypeVar("_T")
_OTHER_NAMES = {"query": "text", "caption": "text", "prompt": "text", "path": "image", "vector": "embedding"}
_Row = tuple[dict[str, Any], str]
"""What a row holds, by our names, and what is wrong with it."""


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
        DataError: If the list cannot be read, has none of these columns (of JSON, in none of the first part's rows),
            or it is empty.
    """
    num_rows = _write(_tables(source), target)
    if not num_rows:
        raise DataError(f"{source}: holds no queries")
    return num_rows


def num_parts(queries: Path) -> int:
    """Number of parts of a file that ``write_queries`` wrote."""
    return pq.read_metadata(queries).num_row_groups


def _tables(source: Path) -> Iterator[pa.Table]:
    """The list, table by table. What cannot be written, such as to a full disk, is no error of it."""
    reader = _READERS.get(_suffix(source))
    if reader is None:
        raise DataError(f"{source}: not a list of queries; it may be {', '.join(_READERS)}")
    try:
        yield from reader(source)
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except (pa.ArrowInvalid, OSError, ValueError, EOFError) as error:
        raise DataError(f"{source}: cannot be read: {error}") from None


def _write(tables: Iterable[pa.Table], target: Path) -> int:
    num_rows, waiting, writer = 0, list[pa.Table](), None
    try:
        for table in itertools.chain(tables, [None]):
            if table is not None:
                problems = table.column(PROBLEM) if PROBLEM in table.column_names else pa.nulls(len(table), pa.string())
                table = table.select([name for name in QUERY_COLUMNS if name in table.column_names])  # noqa: PLW2901
                waiting.append(table.append_column(PROBLEM, problems))
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


def _text_tables(source: Path) -> Iterator[pa.Table]:
    reading = _InOrder(source)
    with pa.input_stream(str(source)) as stream:
        lines = lines_of(cast("IO[bytes]", stream), reading)
        yield from _row_tables(
            ({"text": text and text.rstrip("\r\n")}, f"line {number}: {why}" if why else "")
            for number, text, why in reading.rows(lines)
        )


def _json_tables(source: Path) -> Iterator[pa.Table]:
    reading = _InOrder(source)
    with pa.input_stream(str(source)) as stream:
        records = jsonl_records(cast("IO[bytes]", stream), reading)
        yield from _row_tables(_json_row(number, record, why) for number, record, why in reading.rows(records))


def _json_row(number: int, record: dict[str, Any] | None, problem: str) -> _Row:
    values: dict[str, Any] = {}
    for name, value in (record or {}).items():
        ours = _query_column(name)
        if ours and values.get(ours) is None:
            try:
                values[ours] = _checked(ours, value)
            except (TypeError, ValueError, OverflowError) as error:
                problem = problem or f"{name}: {error}"
    return values, f"line {number}: {problem}" if problem else ""


def _checked(name: str, value: Any) -> Any:
    """A value of JSON for one of our columns.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is a text with half a character.
        OverflowError: If one of its numbers is too large.
    """
    if value is None:
        return None
    if name == "embedding":
        if not isinstance(value, list) or any(type(one) not in {int, float} for one in cast("list[Any]", value)):
            raise TypeError("not a list of numbers")
        return [float(one) for one in cast("list[Any]", value)]
    if not isinstance(value, str):
        raise TypeError("not a text")
    value.encode()  # half of a surrogate pair is no character
    return value


def _delimited_tables(source: Path) -> Iterator[pa.Table]:
    reading, split = _InOrder(source), tsv_records if _suffix(source) == ".tsv" else csv_records
    with pa.input_stream(str(source)) as stream:
        records = split(lines_of(cast("IO[bytes]", stream), reading), reading)
        header = next(records, (0, list[str]()))[1]
        places = dict[str, int]()
        for place, name in enumerate(header):
            if ours := _query_column(name.strip()):
                places.setdefault(ours, place)
        if header and not places:
            raise _without_queries(header)
        if "embedding" in places:
            raise DataError(f"column {header[places['embedding']]} is text, not lists of numbers")

        def rows() -> Iterator[_Row]:
            for number, cells, problem in reading.rows(records):
                values: dict[str, Any] = dict.fromkeys(places)
                if cells is not None and len(cells) == len(header):
                    values = {name: cells[place] for name, place in places.items()}
                elif cells is not None:
                    problem = f"{len(cells)} cells, not {len(header)}"  # noqa: PLW2901
                yield values, f"line {number}: {problem}" if problem else ""

        yield from _row_tables(rows())


def _row_tables(rows: Iterator[_Row]) -> Iterator[pa.Table]:
    """Tables of the columns that the first part has.

    Raises:
        DataError: If it has none.
    """
    names = list[str]()
    while chunk := list(itertools.islice(rows, PART_ROWS)):
        if not names:
            names = [name for name in QUERY_COLUMNS if any(name in values for values, _ in chunk)]
            if not names:
                problem = next((problem for _, problem in chunk if problem), "")
                raise DataError(problem) if problem else _without_queries([])
        columns: dict[str, Any] = {}
        for name in names:
            column = [values.get(name) for values, _ in chunk]
            columns[name] = pa.array(column, pa.list_(pa.float64())) if name == "embedding" else _texts(column)
        columns[PROBLEM] = pa.array([problem or _unlike(values, names) for values, problem in chunk], pa.string())
        yield pa.table(columns)


def _unlike(values: dict[str, Any], names: list[str]) -> str | None:
    new = [name for name, value in values.items() if value is not None and name not in names]
    return f"it has {new[0]}, unlike the first {PART_ROWS:,} rows" if new else None


def _parquet_tables(source: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(source) as parquet:
        for batch in parquet.iter_batches(batch_size=PART_ROWS):
            yield _named(pa.Table.from_batches([batch]))


def _named(table: pa.Table) -> pa.Table:
    """The columns of a typed table that are queries, under our names, and what is wrong with its rows."""
    columns = dict[str, Any]()
    problems: list[str | None] = [None] * len(table)
    for place, name in enumerate(table.column_names):  # several may have one name; the first counts
        ours = _query_column(name)
        if ours == "embedding" and ours not in columns:
            columns[ours] = _vectors(table.column(place), name)
        elif ours and ours not in columns:
            columns[ours] = _decoded(table.column(place), name, problems)
    if not columns:
        raise _without_queries(table.column_names)
    return pa.table(columns | {PROBLEM: pa.array(problems, pa.string())})


def _vectors(column: pa.ChunkedArray, name: str) -> Any:
    kind: Any = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not (is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
        raise DataError(f"column {name} is {kind}, not lists of numbers")
    floats = kind.value_type if pa.types.is_floating(kind.value_type) else pa.float64()
    return column.cast(pa.list_(floats), safe=False)  # a safe cast refuses integers that float64 rounds


def _decoded(column: pa.ChunkedArray, name: str, problems: list[str | None]) -> Any:
    """A column of texts; notes in ``problems`` which rows have none, because a writer need not check them."""
    kind: Any = column.type
    if pa.types.is_dictionary(kind):  # a category of pandas
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_null(kind)):
        raise DataError(f"column {name} is {column.type}, not text")
    texts = list[str | None]()
    for row, cell in enumerate(column.cast(kind).cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(cell if cell is None else cell.decode())
        except UnicodeDecodeError as error:
            texts.append(None)
            problems[row] = f"{name}: not UTF-8 ({error.reason} at byte {error.start})"
    return _texts(texts)


def _texts(values: Iterable[str | None]) -> Any:
    """A column of texts; empty ones become null."""
    return pa.array([text if text and text.strip() else None for text in values], pa.string())


def _without_queries(names: list[str]) -> DataError:
    columns = f"no column {', '.join(QUERY_COLUMNS)} (or {', '.join(_OTHER_NAMES)})"
    return DataError(columns + (f"; it has {', '.join(names)}" if names else ""))


def _query_column(name: str) -> str:
    """The column of ours that a user's column is; empty if it is none."""
    ours = _OTHER_NAMES.get(name.lower(), name.lower())
    return ours if ours in QUERY_COLUMNS else ""


class _InOrder(Reading):
    """Keeps the rows that a reader of lists leaves out, between those that it reads.

    Args:
        source: The list.
    """

    def __init__(self, source: Path) -> None:
        super().__init__(lines=[(str(source), 0)])
        self._left_out: list[tuple[int, str]] = []

    def malformed(self, line: int, reason: str, file: str = "") -> None:
        """Keep a row that is left out."""
        del file
        self._left_out.append((line, reason))

    def rows(self, records: Iterator[tuple[int, _T]]) -> Iterator[tuple[int, _T | None, str]]:
        """All rows in their order: line, and the record or what is wrong with it."""
        for record in itertools.chain(records, [None]):
            left_out, self._left_out = self._left_out, []
            for line, reason in left_out:
                yield line, None, reason
            if record is not None:
                yield *record, ""


def _vector_tables(source: Path) -> Iterator[pa.Table]:
    vectors: Any = np.load(source, mmap_mode="r", allow_pickle=False)
    if not isinstance(vectors, np.ndarray):
        raise DataError("several arrays (.npz), not one of floats (N, D)")
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise DataError(f"{vectors.dtype} of shape {vectors.shape}, not floats (N, D)")
    # As wide as they are, since a query may have any length; only the widest floats Arrow has not.
    dtype = np.dtype(f"f{min(vectors.dtype.itemsize, 8)}")
    for start in range(0, len(vectors), PART_ROWS):
        yield pa.table({"embedding": to_arrow(vectors[start : start + PART_ROWS], dtype)})


_READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".txt": _text_tables,
    ".csv": _delimited_tables,
    ".tsv": _delimited_tables,
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

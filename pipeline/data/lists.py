"""Streams lists of URLs and captions: csv, tsv, json, jsonl, txt (each also .gz) and Parquet.

Every reader yields Arrow tables of at most ``BATCH_ROWS`` rows with the columns ``url``, ``caption`` and the list's
other columns. Text formats give text columns, because types guessed from the first block fail on the millionth row.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.data.rows import require_columns
from pipeline.errors import DataError

BATCH_ROWS = 10_000
FORMATS = ("csv", "tsv", "json", "jsonl", "txt", "parquet")
_RESERVED = ("uid", "url", "caption", "split")
_BLOCK_BYTES = 8 << 20
OnMalformed = Callable[[int], None]


def list_files(path: Path) -> list[Path]:
    """The files of a list: the list itself, or the files of a folder of parts, sorted by name.

    Raises:
        DataError: If no file has a format that can be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such list")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    readable = [file for file in files if file.is_file() and _format_of(file) in FORMATS]
    if not readable:
        raise DataError(f"{path}: not a list that unclip reads ({', '.join(FORMATS)}; each but parquet also .gz)")
    return readable


def list_columns(path: Path) -> list[str]:
    """Column names of a list's first file; a txt list has one column, ``url``.

    Raises:
        DataError: If the file cannot be read.
    """
    file = list_files(path)[0]
    kind = _format_of(file)
    with _explain_damage(file):
        if kind == "parquet":
            return list(pq.read_schema(file).names)
        if kind == "txt":
            return ["url"]
        if kind in {"csv", "tsv"}:
            return _header(file, _DELIMITERS[kind])
        return _names(next(iter(_json_batches(file, kind, _ignore)), []))


def read_list(path: Path, url_column: str, caption_column: str, on_malformed: OnMalformed) -> Iterator[pa.Table]:
    """Stream a list.

    Args:
        path: The list, or a folder of its parts.
        url_column: Column that holds the URL.
        caption_column: Column that holds the caption; empty if the list has none.
        on_malformed: Called with the number of rows that could not be parsed and are left out.

    Yields:
        Tables of ``url`` and ``caption`` (strings or nulls) and the other columns under their own names. A column whose
        name is one of ``uid``, ``url``, ``caption`` and ``split`` is renamed to ``source_<name>``.

    Raises:
        DataError: If a column is missing or a file is damaged; names the file.
    """
    columns: list[str] | None = None
    for file in list_files(path):
        for table in _read_file(file, url_column, caption_column, on_malformed):
            rows = _rename(table, file, url_column, caption_column)
            columns = columns or rows.column_names
            require_columns(rows.column_names, columns, where=f"{file} (unlike the parts before it)")
            yield rows.select(columns)


def count_list_rows(path: Path) -> int:
    """About how many rows a list has: from Parquet's metadata, or from its size and the lines at its beginning.

    Raises:
        DataError: If a file is damaged.
    """
    return sum(_count_file_rows(file) for file in list_files(path))


def _count_file_rows(file: Path) -> int:
    kind = _format_of(file)
    with _explain_damage(file):
        if kind == "parquet":
            return pq.read_metadata(file).num_rows
        if kind == "json":
            with _open(file) as stream:
                return len(_records(json.loads(stream.read()), file))
        with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else contextlib.nullcontext(raw) as stream:
            block = stream.read(_BLOCK_BYTES)
            num_lines = block.count(b"\n") + (not block.endswith(b"\n")) - (kind in _DELIMITERS)
            # Of a compressed file, the bytes that were read so far say how much of it the block is.
            return max(1, round(num_lines * file.stat().st_size / max(1, raw.tell())))


def _read_file(file: Path, url_column: str, caption_column: str, on_malformed: OnMalformed) -> Iterator[pa.Table]:
    kind = _format_of(file)
    with _explain_damage(file):
        if kind == "parquet":
            with pq.ParquetFile(file) as parquet:
                required = [name for name in (url_column, caption_column) if name]
                require_columns(parquet.schema_arrow.names, required, where=str(file))
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                    yield pa.Table.from_batches([batch]).replace_schema_metadata(None)
        elif kind == "txt":
            yield from _text_batches(file, url_column)
        elif kind in {"csv", "tsv"}:
            yield from _csv_batches(file, _DELIMITERS[kind], on_malformed)
        else:
            names: list[str] = []
            for rows in _json_batches(file, kind, on_malformed):
                names = names or _names(rows)
                yield pa.table(
                    {name: pa.array([_as_text(row.get(name)) for row in rows], pa.string()) for name in names}
                )


_DELIMITERS = {"csv": ",", "tsv": "\t"}


def _csv_batches(file: Path, delimiter: str, on_malformed: OnMalformed) -> Iterator[pa.Table]:
    def skip(_row: object) -> str:
        on_malformed(1)
        return "skip"

    names = _header(file, delimiter)
    with pa.input_stream(str(file), compression="gzip" if file.suffix == ".gz" else None) as stream:
        reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
        for batch in reader:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield pa.Table.from_batches([batch.slice(start, BATCH_ROWS)])


def _header(file: Path, delimiter: str) -> list[str]:
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        return next(csv.reader(text, delimiter=delimiter), [])


def _text_batches(file: Path, url_column: str) -> Iterator[pa.Table]:
    with _open(file) as stream:
        for lines in _chunks(line.strip().decode() for line in stream):
            yield pa.table({url_column: pa.array(lines, pa.string())})


def _json_batches(file: Path, kind: str, on_malformed: OnMalformed) -> Iterator[list[dict[str, Any]]]:
    with _open(file) as stream:
        if kind == "json":
            yield from _chunks(_records(json.loads(stream.read()), file))
            return

        def parse() -> Iterator[dict[str, Any]]:
            for line in stream:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield cast("dict[str, Any]", row)
                else:
                    on_malformed(1)

        yield from _chunks(parse())


def _records(value: Any, file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON file: a list of records, or pandas' columns ({name: {row: value}} or {name: [value]})."""
    if isinstance(value, list) and all(isinstance(row, dict) for row in cast("list[Any]", value)):
        return cast("list[dict[str, Any]]", value)
    if isinstance(value, dict) and all(isinstance(column, dict | list) for column in value.values()):
        columns = {
            name: list(c.values()) if isinstance(c, dict) else c for name, c in cast("dict[str, Any]", value).items()
        }
        if len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    raise DataError(f'{file}: must hold a list of records, such as [{{"url": ..., "caption": ...}}]')


def _rename(table: pa.Table, file: Path, url_column: str, caption_column: str) -> pa.Table:
    is_text = _format_of(file) == "txt"
    if is_text:
        caption_column = ""
    require_columns(table.column_names, [n for n in (url_column, caption_column) if n], where=str(file))
    captions = table.column(caption_column) if caption_column else pa.nulls(table.num_rows)
    columns = {"url": _to_string(table.column(url_column), file, url_column)}
    columns["caption"] = _to_string(captions, file, caption_column)
    for name in table.column_names:
        if name not in {url_column, caption_column}:
            columns[f"source_{name}" if name in _RESERVED else name] = table.column(name)
    return pa.table(columns)


def _to_string(column: Any, file: Path, name: str) -> Any:
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{file}: column {name} is {column.type}, not text: {error}") from None


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, BATCH_ROWS)):
        yield chunk


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _format_of(file: Path) -> str:
    suffixes = [suffix.lstrip(".").lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _ignore(_count: int) -> None:
    """Do not count malformed rows: only the column names are read."""


@contextlib.contextmanager
def _explain_damage(file: Path) -> Generator[None]:
    try:
        yield
    except (pa.ArrowInvalid, gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: damaged, or not what its name says: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error

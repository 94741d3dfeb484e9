"""Reads lists of URLs and captions: txt, csv, tsv, json, jsonl, ndjson (each also .gz and .zst) and Parquet.

A list is a file, a folder of parts at any depth, or a pattern, here or in an object store. Every reader yields Arrow
tables of at most ``BATCH_ROWS`` rows with ``url``, ``caption`` and the columns that were asked for; no other column is
read. A row that cannot be read is counted with its file and line, and the list goes on.
"""

import contextlib
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.addresses import without_secrets
from pipeline.data.delimited import csv_records, lines_of, tsv_records
from pipeline.data.json_lists import json_records, jsonl_records
from pipeline.data.list_columns import ListColumns, names_of
from pipeline.data.parquet_lists import extra_types, open_parquet, parquet_tables, row_group_spans
from pipeline.data.reading import MAX_CELL, Reading, has_surrogates, within_limit
from pipeline.errors import DataError
from pipeline.workspace.files import UserFile, find_files, open_file

BATCH_ROWS = 10_000
FORMATS = ("parquet", "csv", "tsv", "jsonl", "ndjson", "json", "txt")
COMPRESSIONS = ("gz", "zst")
_OTHER_COMPRESSIONS = frozenset(
    {"7z", "br", "bz2", "gzip", "lz", "lz4", "lzma", "lzo", "snappy", "sz", "xz", "z", "zip", "zstd"}
)
"""Suffixes of compressed files that are not read."""
_CUT_AT_LINES = frozenset({"tsv", "jsonl", "ndjson", "txt"})
_SAMPLE_BYTES = 8 << 20
_FILES_TO_COUNT = 16


@dataclass(frozen=True)
class Span:
    """A file of a list, or a part of one."""

    uri: str
    """The file."""
    start: int = 0
    """First byte, or first row group of Parquet."""
    stop: int | None = None
    """Byte, or row group, after the last; None: to the end."""
    num_bytes: int = 0
    """Size of the span."""
    list_number: int = 0
    """Which of the recipe's lists it is of, from 0."""
    first_path: str = ""
    """Of a part of a folder of pictures: path in it where the part begins; empty: at the beginning."""
    stop_path: str = ""
    """Path before which it ends; empty: at the end."""
    is_flat: bool = False
    """Whether the folder in which the part begins has no sub-folders."""
    caption_files: Sequence[str] = ()
    """Paths of the files in it that may hold captions of the part's pictures."""


def list_files(path: str) -> list[UserFile]:
    """The files of a list, sorted by name.

    Raises:
        DataError: If there is none of a known format, or if they are of several formats, or if one is lost: a link
            that leads to no file, or a file of a known format in a compression that is not read.
    """
    dead_links = list[str]()
    files = find_files(path, dead_links)
    require_parts(path, [name for name in dead_links if format_of(name) in FORMATS])
    if not files:
        raise DataError(f"{path}: no such list")
    readable = [file for file in files if format_of(file.uri) in FORMATS]
    if not readable:
        raise DataError(f"{path}: not a list that unclip reads ({', '.join(FORMATS)}; each but parquet also .gz, .zst)")
    unread = [file.uri for file in files if _is_compressed_otherwise(file.uri)]
    if unread:
        raise DataError(
            f"{path}: {len(unread)} of its files have a compression that unclip does not read, such as {unread[0]}: "
            "compress them with gzip (.gz) or zstd (.zst), or name the other files by a pattern, such as "
            f"*.{format_of(readable[0].uri)}"
        )
    kinds = sorted({format_of(file.uri) for file in readable})
    if len(kinds) > 1:
        counts = ", ".join(f"{sum(format_of(file.uri) == kind for file in readable)} {kind}" for kind in kinds)
        raise DataError(
            f"{path}: holds files of several formats ({counts}); choose one, such as {path}/**/*.{kinds[0]}"
        )
    return readable


def require_parts(path: str, dead_links: Sequence[str]) -> None:
    """Refuse a list without some of its parts.

    Raises:
        DataError: If there are any ``dead_links``: links that lead to no file.
    """
    if dead_links:
        raise DataError(
            f"{path}: {len(dead_links)} of its files are links that lead to no file, such as {dead_links[0]}: "
            "mend these links, or remove them"
        )


def list_columns(path: str) -> list[str]:
    """Column names of a list's first file; a txt list has one column, ``url``.

    Raises:
        DataError: If the file cannot be read.
    """
    return file_columns(list_files(path)[0].uri)


def file_columns(uri: str) -> list[str]:
    """``list_columns`` of one file, whose name is no pattern.

    Raises:
        DataError: If it cannot be read.
    """
    with explain_damage(uri):
        return _column_names(uri)


def list_spans(path: str, num_bytes: float = math.inf) -> list[Span]:
    """The spans of a list's files, in order.

    Args:
        path: The list.
        num_bytes: Larger files are cut into spans of about this size, between lines or row groups. A csv file is not,
            because a line end may stand inside quotes, and neither is a compressed file.
    """
    spans: list[Span] = []
    for file in list_files(path):
        kind, size = format_of(file.uri), file.num_bytes
        if size <= num_bytes or (kind != "parquet" and (kind not in _CUT_AT_LINES or compression_of(file.uri))):
            spans.append(Span(file.uri, num_bytes=size))
        elif kind == "parquet":
            with explain_damage(file.uri):
                spans += [Span(file.uri, *numbers) for numbers in row_group_spans(file.uri, num_bytes)]
        else:
            step = int(num_bytes)
            spans += [Span(file.uri, start, min(size, start + step), step) for start in range(0, size, step)]
    return spans


def read_span(span: Span, columns: ListColumns, reading: Reading) -> Iterator[pa.Table]:
    """Stream a span of a list.

    Args:
        span: The span.
        columns: The columns to read.
        reading: Counts the rows that cannot be read and are left out.

    Yields:
        Tables of ``url`` and ``caption`` (strings or nulls) and the other columns.

    Raises:
        DataError: If a column is missing or a file is damaged; names the file.
    """
    reading.begin(span.uri)
    with explain_damage(span.uri):
        if format_of(span.uri) == "parquet":
            yield from parquet_tables(span.uri, (span.start, span.stop), columns, reading, BATCH_ROWS)
        else:
            yield from _text_tables(span, columns, reading)


def extra_schemas(piece: Sequence[Span], columns: ListColumns) -> list[pa.Schema]:
    """The types of a piece's other columns, for each of its Parquet files."""
    schemas: list[pa.Schema] = []
    for uri in dict.fromkeys(span.uri for span in piece if columns.extra and format_of(span.uri) == "parquet"):
        with explain_damage(uri):
            schemas.append(extra_types(uri, columns))
    return schemas


def count_list_rows(path: str) -> int:
    """About how many rows a list has: from Parquet's metadata, or from its size and the lines at its beginning.

    Of a list of many files, the first ones stand for the others by their size.

    Raises:
        DataError: If a file is damaged.
    """
    files = list_files(path)
    looked_at = files[:_FILES_TO_COUNT]
    num_rows = sum(_count_file_rows(file) for file in looked_at)
    looked_bytes = sum(file.num_bytes for file in looked_at)
    return max(1, round(num_rows * sum(file.num_bytes for file in files) / looked_bytes)) if looked_bytes else num_rows


def format_of(uri: str) -> str:
    """The format of a file, by its name without the suffix of a compression."""
    suffixes = _suffixes(uri)
    return suffixes[-1] if suffixes else ""


def compression_of(uri: str) -> str:
    """``gz``, ``zst`` or empty, by the file's name."""
    last = uri.partition("?")[0].rpartition(".")[2].lower()
    return last if last in COMPRESSIONS else ""


@contextlib.contextmanager
def open_text(uri: str) -> Generator[IO[bytes]]:
    """Open a file of a list, without its compression."""
    with open_file(uri) as raw, decompressed(raw, uri) as stream:
        yield stream


@contextlib.contextmanager
def decompressed(raw: IO[bytes], uri: str) -> Generator[IO[bytes]]:
    """The bytes inside a compressed stream."""
    if compression_of(uri) == "gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast("IO[bytes]", stream)
    elif compression_of(uri) == "zst":
        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
            yield cast("IO[bytes]", stream)
    else:
        yield raw


@contextlib.contextmanager
def explain_damage(uri: str) -> Generator[None]:
    """Say which file is damaged.

    Raises:
        DataError: In place of a library's error.
    """
    try:
        yield
    except DataError as error:
        raise error if without_secrets(uri) in str(error) else DataError(f"{uri}: {error}") from None
    except (pa.ArrowInvalid, gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{uri}: damaged, or not what its name says: {error}") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read: {error}") from error


def _count_file_rows(file: UserFile) -> int:
    kind = format_of(file.uri)
    with explain_damage(file.uri):
        if kind == "parquet":
            with open_parquet(file.uri) as parquet:
                return parquet.metadata.num_rows
        if kind == "json" and file.num_bytes <= _SAMPLE_BYTES:
            with open_text(file.uri) as stream:
                reading = Reading(lines=[(file.uri, 0)])
                return sum(1 for _ in json_records(stream, reading)) + reading.counts["malformed"]
        with open_file(file.uri) as raw, decompressed(raw, file.uri) as stream:
            block = stream.read(_SAMPLE_BYTES)
            if kind == "json":
                num_lines = max(1, block.count(b"}"))
            else:
                num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
            if kind in _RECORDS and block:
                num_lines -= names_of(_first_row(file.uri))[1]
            # Of a compressed file, the bytes that were read so far say how much of it the block is.
            return max(0, round(num_lines * max(file.num_bytes, 1) / max(1, raw.tell())))


def _column_names(uri: str) -> list[str]:
    kind = format_of(uri)
    if kind == "parquet":
        with open_parquet(uri) as parquet:
            return list(parquet.schema_arrow.names)
    if kind == "txt":
        return ["url"]
    if kind in _RECORDS:
        return names_of(_first_row(uri))[0]
    with open_text(uri) as stream:
        reading = Reading(lines=[(uri, 0)])
        records = json_records(stream, reading) if kind == "json" else jsonl_records(stream, reading)
        return _record_names([record for _, record in itertools.islice(records, BATCH_ROWS)])


_RECORDS = {"csv": csv_records, "tsv": tsv_records}


def _first_row(uri: str) -> list[str]:
    with open_text(uri) as stream:
        reading = Reading(lines=[(uri, 0)])
        return next((cells for _, cells in _RECORDS[format_of(uri)](lines_of(stream, reading), reading)), [])


Values = tuple[int, list[Any]]
"""Line of a row, and its URL, its caption and its other columns."""


def _text_tables(span: Span, columns: ListColumns, reading: Reading) -> Iterator[pa.Table]:
    kind = format_of(span.uri)
    with open_text(span.uri) as stream:
        if kind == "txt":
            rows = (
                (number, [line.strip(), None])
                for number, line in lines_of(stream, reading, span.start, span.stop)
                if line.strip()
            )
            yield from _row_tables(within_limit(rows, reading), [], reading)
        elif kind in _RECORDS:
            yield from _delimited_tables(span, stream, columns, reading)
        else:
            yield from _json_tables(span, stream, columns, reading)


def _delimited_tables(span: Span, stream: IO[bytes], columns: ListColumns, reading: Reading) -> Iterator[pa.Table]:
    records = _RECORDS[format_of(span.uri)](lines_of(stream, reading, span.start, span.stop), reading)
    first = (0, _first_row(span.uri)) if span.start else next(records, None)
    if first is None:
        return
    names, has_header = names_of(first[1])
    columns_read = columns.find(names, span.uri)
    places = [names.index(name) if name else None for name in columns_read]
    if not has_header and not span.start:
        records = itertools.chain([first], records)

    def rows() -> Iterator[Values]:
        for number, cells in within_limit(records, reading):
            if len(cells) != len(names):
                reading.leave_out(number, f"{len(cells)} cells, not {len(names)}")
            else:
                yield number, [None if place is None else cells[place] for place in places]

    yield from _row_tables(rows(), columns.extra, reading)


def _json_tables(span: Span, stream: IO[bytes], columns: ListColumns, reading: Reading) -> Iterator[pa.Table]:
    if format_of(span.uri) == "json":
        records = json_records(stream, reading)
    else:
        records = jsonl_records(stream, reading, span.start, span.stop)
    records = within_limit(records, reading)
    first = list(itertools.islice(records, BATCH_ROWS))
    if not first:
        return
    url, caption, *others = columns.find(_record_names([record for _, record in first]), span.uri)

    def rows() -> Iterator[Values]:
        for number, record in itertools.chain(first, records):
            try:
                texts = [_as_url(record.get(url)), _as_caption(record.get(caption) if caption else None)]
                texts += [_as_text(record.get(name)) for name in others]
            except (ValueError, RecursionError) as error:
                reading.leave_out(number, str(error))
            else:
                yield number, texts

    yield from _row_tables(rows(), columns.extra, reading)


def _row_tables(rows: Iterator[Values], extra: Sequence[str], reading: Reading) -> Iterator[pa.Table]:
    names = ["url", "caption", *extra]
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        good = _without_large(chunk, reading)
        try:
            table = _table(names, good)
        except UnicodeEncodeError:
            table = _table(names, _without_surrogates(good, reading))
        yield table


def _table(names: list[str], rows: list[Values]) -> pa.Table:
    columns = zip(*(values for _, values in rows), strict=True) if rows else [[]] * len(names)
    return pa.table([pa.array(column, pa.string()) for column in columns], names=names)


def _without_large(rows: list[Values], reading: Reading) -> list[Values]:
    if max(len(values[place] or "") for _, values in rows for place in (0, 1)) <= MAX_CELL:
        return rows
    good: list[Values] = []
    for number, values in rows:
        size = max(len(values[0] or ""), len(values[1] or ""))
        if size > MAX_CELL:
            reading.leave_out(number, f"a URL or caption of {size} characters; the limit is {MAX_CELL}")
        else:
            good.append((number, values))
    return good


def _without_surrogates(rows: list[Values], reading: Reading) -> list[Values]:
    good: list[Values] = []
    for number, values in rows:
        if any(value and has_surrogates(value) for value in values):
            reading.leave_out(number, "not UTF-8, or half of a surrogate pair, which is no character")
        else:
            good.append((number, values))
    return good


def _as_url(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"the URL is {kind_of(value)}")


def _as_caption(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(f"the caption is {kind_of(value)}")


def kind_of(value: Any) -> str:
    """What a value of JSON is that is no text, for people."""
    kinds = {dict: "a record", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "not a number" if isinstance(value, float) else "a number")


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


def _record_names(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _is_compressed_otherwise(uri: str) -> bool:
    *_, kind, compression = ["", "", *_suffixes(uri)]
    return kind in FORMATS and compression in _OTHER_COMPRESSIONS


def _suffixes(uri: str) -> list[str]:
    """The suffixes of a file's name, without that of a compression and without a URL's query."""
    suffixes = [suffix.lower() for suffix in uri.partition("?")[0].rpartition("/")[2].split(".")[1:]]
    return suffixes[:-1] if suffixes and suffixes[-1] in COMPRESSIONS else suffixes

"""Writes shards in img2dataset's webdataset layout: pictures in a tar, all rows in a Parquet table, totals in JSON.

The rows are sorted by key and the tar's times are zero, so the same responses give the same bytes.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.causes import cause_of, is_in_class
from pipeline.data.shard_tables import PLACE_FIELDS, Place
from pipeline.data.tar_index import index_tar, picture_span
from pipeline.workspace.hashing import HashedFile

SUCCESS = "success"
FAILED_TO_DOWNLOAD, FAILED_TO_RESIZE = "failed_to_download", "failed_to_resize"
FAILURES = (FAILED_TO_DOWNLOAD, FAILED_TO_RESIZE)
RESULT_FIELDS = (
    ("key", pa.string()),
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("exif", pa.string()),
)
"""The columns of img2dataset after those of the pairs; a column with the checksum follows, named by its kind. The table
has ``PLACE_FIELDS`` behind them."""

_NUM_REPEATED = 20
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 155)
"""Places of two fields in a tar's header (POSIX.1-1988, ustar); the checksum counts itself as spaces."""


def _empty_header() -> bytes:
    """The header of a tar's member as webdataset writes it, without a name."""
    member = tarfile.TarInfo()
    member.mode, member.uname, member.gname = 0o444, "bigdata", "bigdata"
    return member.tobuf(tarfile.USTAR_FORMAT)


_HEADER = _empty_header()


class ShardFiles(NamedTuple):
    """The three files of a shard."""

    tar: Path
    parquet: Path
    stats: Path


@dataclass(frozen=True)
class Span:
    """Bytes in an open file."""

    stream: IO[bytes]
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes."""
        self.stream.seek(self.offset)
        return self.stream.read(self.size)


@dataclass(frozen=True)
class ShardRow:
    """One row of a shard, good or failed."""

    values: dict[str, Any]
    """Its columns; ``status`` says what became of it."""
    picture: Span | None
    """Its stored picture, if it is good."""


def key_of(shard: str, row: int, samples_per_shard: int) -> str:
    """Key of a row: the shard's number, then the row's, as in img2dataset."""
    digits = len(str(samples_per_shard - 1)) if samples_per_shard > 1 else 0
    return str(int(shard) * 10**digits + row).zfill(len(shard) + digits)


def time_of_day(then: float) -> float:
    """A moment of ``time.monotonic`` in seconds since the epoch, by the clock as it is set now: it may have jumped."""
    return time.time() - (time.monotonic() - then)


def write_shard(
    rows: Sequence[ShardRow], schema: pa.Schema, extension: str, files: ShardFiles, *, start: float
) -> Counter[str]:
    """Write the files of a shard.

    Args:
        rows: All rows, sorted by key.
        schema: Columns of the rows; the table has the places of the pictures besides.
        extension: Suffix of the pictures, without a dot.
        files: The files to write.
        start: When the shard was begun, in seconds since the epoch.

    Returns:
        Numbers of rows: ``in`` = ``ok`` + ``failed_to_download`` + ``failed_to_resize``.
    """
    columns = {name: [row.values[name] for row in rows] for name in schema.names}
    with HashedFile(files.tar) as stream:
        places = [None if row.picture is None else _add_sample(stream, row, extension) for row in rows]
        end = stream.tell() + 2 * tarfile.BLOCKSIZE
        stream.write(bytes(end - stream.tell() + -end % tarfile.RECORDSIZE))
    of_table = columns | {
        name: [place and place[number] for place in places] for number, (name, _) in enumerate(PLACE_FIELDS)
    }
    with HashedFile(files.parquet) as stream:
        fields = [*schema, *(pa.field(*field) for field in PLACE_FIELDS)]
        pq.write_table(pa.table(of_table, schema=pa.schema(fields, metadata=schema.metadata)), stream)
    statuses = Counter(columns["status"])
    totals = {
        "count": len(rows),
        "successes": statuses[SUCCESS],
        **{status: statuses[status] for status in FAILURES},
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": dict(causes_of(rows).most_common()),
        **_oddities(rows, schema),
    }
    files.stats.write_text(json.dumps(totals, indent=4) + "\n")
    return Counter({"in": len(rows), "ok": statuses[SUCCESS], **{status: statuses[status] for status in FAILURES}})


def read_shard(tar: Path, parquet: Path, stream: IO[bytes]) -> tuple[list[ShardRow], pa.Schema]:
    """The rows of a written shard, sorted by key, and their columns, as ``write_shard`` takes both.

    Args:
        tar: Its pictures.
        parquet: Its table.
        stream: The tar, open for reading; the rows' pictures are read from it.
    """
    table = pq.read_table(parquet).sort_by("key")
    table = table.select([name for name in table.column_names if name not in Place._fields])
    members = index_tar(tar)
    rows: list[ShardRow] = []
    for values in table.to_pylist():
        span = picture_span(members.get(values["key"], {}))
        rows.append(ShardRow(values, Span(stream, *span) if span else None))
    return rows, table.schema


def failed_rows(rows: Sequence[ShardRow], failed_class: str) -> list[int]:
    """Numbers of the failed rows whose cause is in a class."""
    causes = [cause_of(row.values["error_message"] or SUCCESS) for row in rows]
    return [number for number, cause in enumerate(causes) if cause != SUCCESS and is_in_class(cause, failed_class)]


def causes_of(rows: Sequence[ShardRow]) -> Counter[str]:
    """Rows by class of cause; good ones count as ``success``."""
    return Counter(cause_of(row.values["error_message"] or SUCCESS) for row in rows)


def failure_causes(stats: Sequence[dict[str, Any]]) -> Counter[str]:
    """Number of rows by class of failure, summed over the totals of shards."""
    causes: Counter[str] = Counter()
    for shard_stats in stats:
        causes.update({cause: count for cause, count in shard_stats["status_dict"].items() if cause != SUCCESS})
    return causes


def repeated_pictures(stats: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files that most URLs share: most often a host's placeholder ("image not available").

    Args:
        stats: Totals of shards. URLs are counted where a file repeats within a shard, so counts are lower bounds.

    Returns:
        Entries of ``digest``, ``urls`` (how many) and ``url`` (one of them), the most frequent first.
    """
    urls: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for shard_stats in stats:
        for digest, entry in shard_stats.get("repeated", {}).items():
            urls[digest] += entry["urls"]
            examples.setdefault(digest, entry["url"])
    return [{"digest": name, "urls": count, "url": examples[name]} for name, count in urls.most_common(_NUM_REPEATED)]


def _add_sample(stream: HashedFile, row: ShardRow, extension: str) -> Place:
    """Add the files of a row to a tar; returns where its picture lies."""
    assert row.picture is not None
    key, caption, picture, offset = row.values["key"], row.values["caption"], row.picture.read(), 0
    files = {
        extension: picture,
        "json": _indented(row.values).encode(),
        "txt": ("" if caption is None else str(caption)).encode(),
    }
    for suffix in sorted(files):
        if suffix == extension:
            offset = stream.tell() + tarfile.BLOCKSIZE
        _write_member(stream, f"{key}.{suffix}", files[suffix])
    return Place.of(row.values["uid"], picture, offset)


def _indented(values: dict[str, Any]) -> str:
    """A flat object as ``json.dumps`` writes it with ``indent=4``, for which it has no C code."""
    text = json.dumps(values, separators=(",\n    ", ": "))
    return f"{{\n    {text[1:-1]}\n}}"


def _write_member(stream: HashedFile, name: str, data: bytes) -> None:
    """Add a file to a tar: ``tarfile`` writes the same bytes, and takes five times as long for the header."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[_SIZE] = b"%011o" % len(data)
    header[_CHECKSUM] = b" " * 7
    header[_CHECKSUM] = b"%06o\0" % sum(header)
    stream.write(header)
    stream.write(data)
    stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def _oddities(rows: Sequence[ShardRow], schema: pa.Schema) -> dict[str, Any]:
    """Pictures of one pixel, and files that came from several URLs."""
    good = [row.values for row in rows if row.values["status"] == SUCCESS]
    one_pixel = sum(row["original_width"] * row["original_height"] == 1 for row in good)
    last = schema.names[-1]  # the checksum, if the recipe wants one
    urls: defaultdict[str, set[str]] = defaultdict(set)
    if last not in dict(RESULT_FIELDS):
        for row in good:
            urls[row[last]].add(row["url"])
    most = Counter({digest: len(names) for digest, names in urls.items() if len(names) > 1}).most_common(_NUM_REPEATED)
    repeated = {digest: {"urls": count, "url": min(urls[digest])} for digest, count in most}
    return {"one_pixel": one_pixel, "repeated": repeated}

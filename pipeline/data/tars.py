"""Tars of pictures that somebody else wrote: webdataset's layout, with or without img2dataset's json.

The files of a sample have one key, the part of their name before the first dot: a picture, and its text in ``.txt``,
its record in ``.json``, or both.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.blank import BLANK
from pipeline.data.causes import FetchError, cause_of
from pipeline.data.list_columns import column_in_list
from pipeline.data.lists import explain_damage, require_parts
from pipeline.data.reading import Reading, has_surrogates, within_limit
from pipeline.data.shard_tables import PLACE_FIELDS, TAKEN_IN, Place
from pipeline.data.shard_writer import FAILED_TO_RESIZE, FAILURES, SUCCESS, failure_causes
from pipeline.data.tar_index import count_keys, index_tar, shown
from pipeline.data.tar_samples import TarSample, sample_of
from pipeline.errors import DataError
from pipeline.pictures.read import PictureError
from pipeline.workspace.files import UserFile, find_files, is_remote, open_file
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.data.decoders import Measures, Size

BATCH_ROWS = 10_000
_COUNTED_BYTES = 8 << 20
"""Part of a tar in a store of which the samples are counted."""
_HINT = "bring this file back from a copy, or leave it out of the folder"
_SIZES = ("width", "height", "original_width", "original_height")
_MOST_PX = 2**31 - 1


@dataclass(frozen=True)
class TakenIn:
    """A shard that was taken in."""

    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of each file, by name."""
    counts: dict[str, int]
    """Rows: ``in`` = ``ok`` + ``failed_to_download`` (forgotten pairs) + ``failed_to_resize`` (pictures that cannot be
    decoded)."""
    causes: dict[str, int]
    """Failed rows by class."""


def read_tar(tar: Path, reading: Reading) -> Iterator[TarSample]:
    """The samples of a tar, by key.

    Args:
        tar: The tar.
        reading: Counts the samples that cannot be used.

    Raises:
        DataError: If the file is no tar, or is damaged.
    """
    members = index_tar(tar, hint=_HINT)
    with tar.open("rb") as stream:
        for number, key in enumerate(sorted(members), start=1):
            reading.at_line(number)
            try:
                yield sample_of(key, members[key], partial(_read, stream))
            except ValueError as error:
                reading.malformed(number, f"key {shown(key)}: {error}")


def tar_tables(tar: Path, extra: tuple[str, ...], reading: Reading) -> Iterator[pa.Table]:
    """The rows of a tar: ``url``, ``caption``, ``key`` and the fields of the json that are kept."""
    names, rows = ("url", "caption", "key", *extra), list[list[str | None]]()
    for sample in within_limit(read_tar(tar, reading), reading):
        try:
            texts = [_as_text(sample.record.get(name, sample.record.get(column_in_list(name)))) for name in extra]
        except (ValueError, RecursionError) as error:
            reading.leave_out(reading.lines[-1][1], f"key {sample.key}: {error}")
            continue
        rows.append([sample.url, sample.caption, sample.key, *texts])
        if len(rows) == BATCH_ROWS:
            yield _table(names, rows)
            rows = []
    yield _table(names, rows)


def tar_files(path: str) -> list[UserFile]:
    """The tars at a path, sorted by name.

    Raises:
        DataError: If there is none, or if one is lost: a link that leads to no file.
    """
    dead_links = list[str]()
    files = [file for file in find_files(path, dead_links) if file.uri.endswith(".tar")]
    require_parts(path, [name for name in dead_links if name.endswith(".tar")])
    if not files:
        raise DataError(f"{path}: no shards (*.tar) in it or below it")
    return files


def count_samples(path: str) -> int:
    """About how many samples the tars hold: the first one, or its beginning in a store, stands for all by its size.

    Raises:
        DataError: If there is no tar, or the first is damaged.
    """
    files = tar_files(path)
    first = files[0]
    if not is_remote(first.uri):
        count, num_bytes = len(index_tar(Path(first.uri), hint=_HINT)), first.num_bytes
    else:
        try:
            with explain_damage(first.uri), open_file(first.uri) as stream:
                count, counted_bytes = count_keys(stream, _COUNTED_BYTES)
                num_bytes = counted_bytes or first.num_bytes
        except tarfile.TarError as error:
            raise DataError(f"{first.uri}: damaged tar ({error}); {_HINT}") from error
    return round(count * sum(file.num_bytes for file in files) / max(1, num_bytes))


def table_of(tar: Path, pairs: pa.Table, measures: Measures) -> pa.Table:
    """The table of a shard that is taken in as it is, as the download writes it for its own.

    Every picture is decoded once: as with pictures that were downloaded, no later step finds one that is damaged, or
    that takes a process down.

    Args:
        tar: The tar.
        pairs: Its part of the list of pairs, with the keys.
        measures: Decodes the pictures.

    Raises:
        DataError: If the tar lacks a key of the list, or has another uid for it.
    """
    by_key = {sample.key: sample for sample in read_tar(tar, Reading(lines=[(str(tar), 0)]))}
    rows: list[dict[str, Any]] = pairs.to_pylist()
    samples = [_sample_of(row, by_key, tar) for row in rows if row["uid"]]
    with tar.open("rb") as stream:
        sizes = measures.sizes([partial(_read, stream, sample.span) for sample in samples])
        columns = (_picture_columns(stream, *one) for one in zip(samples, sizes, strict=True))
        made = [row | (next(columns) if row["uid"] else BLANK) for row in rows]
    return pa.Table.from_pylist(made, schema=_schema(pairs.schema))


def take_in(uri: str, pairs: pa.Table, shard: str, output: Artifact, measures: Measures) -> TakenIn:
    """Record a tar as a shard of the download: a link to it, or a copy if one of them is remote, and its table.

    Args:
        uri: The tar.
        pairs: Its part of the list of pairs.
        shard: Name of the shard.
        output: The artifact of the download step.
        measures: Decodes the pictures.

    Raises:
        DataError: If the tar is damaged, or is not the one that the list of pairs was made from.
    """
    names = [f"{shard}.tar", f"{shard}.parquet", f"{shard}_stats.json"]
    output.link(names[0], uri)
    table = table_of(output.path(names[0]), pairs, measures)
    with output.write(names[1]) as path, HashedFile(path) as stream:
        pq.write_table(table, stream)
    totals = taken_in_totals(table)
    output.write_json(names[2], totals | {"start_time": 0.0, "end_time": 0.0, "duration": 0.0})
    files = {name: output.describe(name) for name in names}
    return TakenIn(files, counts_of(totals), dict(failure_causes([totals])))


def taken_in_totals(table: pa.Table) -> dict[str, Any]:
    """Numbers of rows in the table of a shard that was taken in, as ``<shard>_stats.json`` has them."""
    statuses = Counter(table.column("status").to_pylist())
    causes = Counter(cause_of(message or SUCCESS) for message in table.column("error_message").to_pylist())
    totals: dict[str, Any] = {"count": table.num_rows, "successes": statuses[SUCCESS]}
    return totals | {status: statuses[status] for status in FAILURES} | {"status_dict": dict(causes.most_common())}


def counts_of(totals: Mapping[str, Any]) -> dict[str, int]:
    """The counts of a shard's record from its ``taken_in_totals``."""
    failed = {status: totals[status] for status in FAILURES if totals[status]}
    return {"in": totals["count"], "ok": totals["successes"]} | failed


def _schema(pairs: pa.Schema) -> pa.Schema:
    fields = [("status", pa.string()), ("error_message", pa.string()), *((name, pa.int32()) for name in _SIZES)]
    fields += [("exif", pa.string()), ("sha256", pa.string()), *PLACE_FIELDS]
    # The tar may hold pictures that are no rows: repeated pairs, and samples that cannot be read.
    return pa.schema([*pairs, *(pa.field(*one) for one in fields)], metadata={TAKEN_IN: b"as it is"})


def _sample_of(row: Mapping[str, Any], by_key: Mapping[str, TarSample], tar: Path) -> TarSample:
    """The sample of a row.

    Raises:
        DataError: If the tar has none, or another one.
    """
    sample = by_key.get(row["key"])
    if sample is None or sample.uid != row["uid"]:
        raise DataError(f"{tar}: key {row['key']}: is not what it was when the list of pairs was made")
    return sample


def _picture_columns(stream: IO[bytes], sample: TarSample, size: Size | FetchError | PictureError) -> dict[str, Any]:
    """What the table says of a picture: its sizes and its place, or why it cannot be decoded."""
    if isinstance(size, FetchError):
        return {"status": FAILED_TO_RESIZE, "error_message": str(size)}
    if isinstance(size, PictureError):
        return {"status": FAILED_TO_RESIZE, "error_message": size.reason}
    picture, (width, height) = _read(stream, sample.span), size
    original = [sample.record.get(name) for name in ("original_width", "original_height")]
    original_width, original_height = original if all(map(_is_size, original)) else (width, height)
    exif, sha256 = (_text_or_none(sample.record.get(name)) for name in ("exif", "sha256"))
    return {
        "status": SUCCESS,
        **dict(zip(_SIZES, (width, height, original_width, original_height), strict=True)),
        "exif": exif,
        "sha256": hashlib.sha256(picture).hexdigest() if sha256 is None else sha256,
        **Place.of(sample.uid, picture, sample.span[0])._asdict(),
    }


def _is_size(value: Any) -> bool:
    """Whether a value of a json is a length in pixels that the table can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_PX


def _text_or_none(value: Any) -> str | None:
    """A value of a json if it is a text that the table can hold."""
    return value if isinstance(value, str) and not has_surrogates(value) else None


def _as_text(value: Any) -> str | None:
    """A field of the json as text.

    Raises:
        ValueError: If it holds half of a surrogate pair.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text.encode()
    return text


def _read(stream: IO[bytes], span: tuple[int, int]) -> bytes:
    stream.seek(span[0])
    return stream.read(span[1])


def _table(names: tuple[str, ...], rows: list[list[str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[]] * len(names)
    return pa.table([pa.array(column, pa.string()) for column in columns], names=list(names))

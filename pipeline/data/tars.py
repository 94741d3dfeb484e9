"""Tars of pictures that somebody else wrote: webdataset's layout, with or without img2dataset's json.

The files of a sample have one key, the part of their name before the first dot: a picture, and its text in ``.txt``,
its record in ``.json``, or both.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.blank import BLANK, num_blank
from pipeline.data.json_lists import parse_json
from pipeline.data.list_columns import column_in_list
from pipeline.data.lists import require_parts
from pipeline.data.reading import MAX_CELL, Reading, within_limit
from pipeline.data.rows import make_uid
from pipeline.data.shard_tables import PLACE_FIELDS, TAKEN_IN, Place
from pipeline.data.shards import sample_caption, sample_url
from pipeline.data.tar_index import index_tar, picture_span
from pipeline.errors import DataError
from pipeline.pictures.read import FORMATS
from pipeline.workspace.files import UserFile, find_files, local_copy
from pipeline.workspace.forgotten import CAUSE
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.store import Artifact

BATCH_ROWS = 10_000
_HINT = "bring this file back from a copy, or leave it out of the folder"
_SIZES = ("width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar that can be read."""

    key: str
    """The key of its files."""
    url: str
    """Where the picture was found; of a sample without a URL, its place in the tar."""
    caption: str
    """Its text; may be empty."""
    record: Mapping[str, Any]
    """Its json; empty if it has none."""
    span: tuple[int, int]
    """Offset and size of its picture in the tar, in bytes."""

    @property
    def uid(self) -> str:
        """The uid of its row."""
        return make_uid(self.url, self.caption)


def read_tar(tar: Path, shard: str, reading: Reading) -> Iterator[TarSample]:
    """The samples of a tar, by key.

    Args:
        tar: The tar.
        shard: Name of the shard that it becomes.
        reading: Counts samples without a picture or a readable text.

    Raises:
        DataError: If the file is no tar, or is damaged.
    """
    members = index_tar(tar, hint=_HINT)
    with tar.open("rb") as stream:
        for number, key in enumerate(sorted(members), start=1):
            reading.at_line(number)
            try:
                yield _sample(stream, members[key], shard, key)
            except ValueError as error:
                reading.malformed(number, f"key {key}: {error}")


def tar_tables(tar: Path, shard: str, extra: tuple[str, ...], reading: Reading) -> Iterator[pa.Table]:
    """The rows of a tar: ``url``, ``caption``, ``key`` and the fields of the json that are kept."""
    names, rows = ("url", "caption", "key", *extra), list[list[str | None]]()
    for sample in within_limit(read_tar(tar, shard, reading), reading):
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
    """About how many samples the tars hold: the first one stands for the others by its size.

    Raises:
        DataError: If there is no tar, or the first is damaged.
    """
    files = tar_files(path)
    with local_copy(files[0].uri) as tar:
        count = len(index_tar(tar, hint=_HINT))
    return round(count * sum(file.num_bytes for file in files) / max(1, files[0].num_bytes))


def table_of(tar: Path, shard: str, pairs: pa.Table) -> pa.Table:
    """The table of a shard that is taken in as it is, as the download writes it for its own.

    Args:
        tar: The tar.
        shard: Name of the shard.
        pairs: Its part of the list of pairs, with the keys.

    Raises:
        DataError: If the tar lacks a key of the list, or has another uid for it.
    """
    samples = {sample.key: sample for sample in read_tar(tar, shard, Reading(lines=[(str(tar), 0)]))}
    rows: list[dict[str, Any]] = []
    with tar.open("rb") as stream:
        for row in pairs.to_pylist():
            if not row["uid"]:
                rows.append(row | BLANK)
                continue
            sample = samples.get(row["key"])
            if sample is None or sample.uid != row["uid"]:
                raise DataError(f"{tar}: key {row['key']}: is not what it was when the list of pairs was made")
            rows.append(row | {"status": "success", "error_message": None} | _picture_columns(stream, sample))
    return pa.Table.from_pylist(rows, schema=_schema(pairs.schema))


def take_in(uri: str, pairs: pa.Table, shard: str, output: Artifact) -> dict[str, dict[str, Any]]:
    """Record a tar as a shard of the download: a link to it, or a copy if one of them is remote, and its table.

    Args:
        uri: The tar.
        pairs: Its part of the list of pairs.
        shard: Name of the shard.
        output: The artifact of the download step.

    Returns:
        Size and SHA-256 of each file, by name.

    Raises:
        DataError: If the tar is damaged, or is not the one that the list of pairs was made from.
    """
    names = [f"{shard}.tar", f"{shard}.parquet", f"{shard}_stats.json"]
    output.link(names[0], uri)
    table = table_of(output.path(names[0]), shard, pairs)
    with output.write(names[1]) as path, HashedFile(path) as stream:
        pq.write_table(table, stream)
    num_forgotten = num_blank(table)
    num_ok = table.num_rows - num_forgotten
    counts = {"count": table.num_rows, "successes": num_ok, "failed_to_download": num_forgotten, "failed_to_resize": 0}
    times = {"start_time": 0.0, "end_time": 0.0, "duration": 0.0}
    causes = {"success": num_ok} | ({CAUSE: num_forgotten} if num_forgotten else {})
    output.write_json(names[2], counts | times | {"status_dict": causes})
    return {name: output.describe(name) for name in names}


def _schema(pairs: pa.Schema) -> pa.Schema:
    fields = [("status", pa.string()), ("error_message", pa.string()), *((name, pa.int32()) for name in _SIZES)]
    fields += [("exif", pa.string()), ("sha256", pa.string()), *PLACE_FIELDS]
    # The tar may hold pictures that are no rows: repeated pairs, and samples that cannot be read.
    return pa.schema([*pairs, *(pa.field(*one) for one in fields)], metadata={TAKEN_IN: b"as it is"})


def _picture_columns(stream: IO[bytes], sample: TarSample) -> dict[str, Any]:
    picture = _read(stream, sample.span)
    sizes = {name: sample.record.get(name) for name in _SIZES}
    if not all(isinstance(size, int) for size in sizes.values()):
        width, height = _size(picture)
        sizes = {"width": width, "height": height, "original_width": width, "original_height": height}
    exif, sha256 = sample.record.get("exif"), sample.record.get("sha256")
    return {
        **sizes,
        "exif": exif if isinstance(exif, str) else None,
        "sha256": sha256 if isinstance(sha256, str) else hashlib.sha256(picture).hexdigest(),
        **Place.of(sample.uid, picture, sample.span[0])._asdict(),
    }


def _size(picture: bytes) -> tuple[int | None, int | None]:
    """Width and height in a picture's header; None if it has none that can be read: then no step can decode it."""
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None, None


def _sample(stream: IO[bytes], files: dict[str, tuple[int, int]], shard: str, key: str) -> TarSample:
    picture = picture_span(files)
    if picture is None:
        raise ValueError("no picture")
    record: dict[str, Any] = {}
    if "json" in files:
        value = parse_json(_read(stream, files["json"]))
        record = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    caption = sample_caption(record, _read(stream, files["txt"]) if "txt" in files else b"")
    url = sample_url(record, shard, key)
    (key + url + caption).encode()  # half of a surrogate pair is no character
    if max(len(url), len(caption)) > MAX_CELL:
        raise ValueError(f"a URL or caption longer than {MAX_CELL} characters")
    return TarSample(key, url, caption, record, picture)


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

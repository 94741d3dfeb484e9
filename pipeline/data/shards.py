"""Reading img2dataset's shards: a tar of pictures joined with its table, by key and by uid, never by position."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.rows import require_columns
from pipeline.errors import DataError

_SIDECARS = frozenset({"json", "txt"})
MEND = "remove manifest.json and the shard's .done.json beside it and run again: that shard alone is made again"
_BLOCK_BYTES = 512
_END = bytes(_BLOCK_BYTES)
SHARD_COLUMNS = ("uid", "key", "url", "caption", "split", "status")


@dataclass(frozen=True)
class Sample:
    """One good row of a shard."""

    uid: str
    key: str
    url: str
    caption: str
    split: str
    picture: bytes
    """The file as it is stored."""


Members = dict[str, dict[str, tuple[int, int]]]
"""Place of each file in a tar, (offset, size) in bytes, by key and by extension."""


def index_tar(path: Path) -> Members:
    """Where each file of a tar stands.

    Headers are read here and not by ``tarfile``, which takes 50 times as long: 3 s for a shard of 10,000 pictures.

    Raises:
        DataError: If the tar is truncated or not a tar; names it.
    """
    members: Members = {}
    size_bytes, offset, last = path.stat().st_size, 0, ""
    with path.open("rb") as stream:
        while True:
            stream.seek(offset)
            header = stream.read(_BLOCK_BYTES)
            if len(header) < _BLOCK_BYTES or offset > size_bytes:
                raise DataError(f"{path}: truncated after {last or 'its first bytes'}; {MEND}")
            if header == _END:
                return members
            if header[257:262] != b"ustar" or header[156:157] not in {b"0", b"\0"}:
                return _index_any_tar(path)
            last, size = _read_header(header, path, offset)
            key, _, extension = last.partition(".")
            members.setdefault(key, {})[extension] = (offset + _BLOCK_BYTES, size)
            offset += _BLOCK_BYTES + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _read_header(header: bytes, path: Path, offset: int) -> tuple[str, int]:
    """Name and size in a ustar header (POSIX.1-1988)."""
    told, size, prefix = header[148:156], header[124:136].strip(b" \0"), header[345:500].rstrip(b"\0").decode()
    if int(told.strip(b" \0") or b"0", 8) != sum(header) - sum(told) + 8 * ord(" "):
        raise DataError(f"{path}: damaged tar (header at byte {offset}); {MEND}")
    name = header[:100].rstrip(b"\0").decode()
    return f"{prefix}/{name}" if prefix else name, int(size, 8)


def _index_any_tar(path: Path) -> Members:
    """As ``index_tar``, for a tar that img2dataset did not write: long names, extended headers."""
    members: Members = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DataError(f"{path}: damaged tar ({error}); {MEND}") from error
    return members


def picture_extension(files: dict[str, tuple[int, int]]) -> str | None:
    """The extension of the picture among one sample's files; None where there is no picture."""
    return next((name for name in files if name not in _SIDECARS), None)


def read_table(path: Path, shard: str, extra_columns: tuple[str, ...] = ()) -> pa.Table:
    """The rows of a shard's table, sorted by key.

    Raises:
        DataError: If it is damaged or lacks a column; names the file.
    """
    try:
        names = pq.read_schema(path).names
        require_columns(list(names), [*SHARD_COLUMNS, *extra_columns], where=str(path))
        return pq.read_table(path, columns=[*SHARD_COLUMNS, *extra_columns]).sort_by("key")
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"shard {shard}: {path} is damaged ({error}); {MEND}") from error


def good_rows(table: pa.Table) -> pa.Table:
    """The rows whose picture was stored."""
    return table.filter(pc.field("status") == "success")


def read_samples(tar: Path, parquet: Path, shard: str) -> Iterator[Sample]:
    """Every good row of a shard with its picture, sorted by key.

    Raises:
        DataError: If table and tar do not hold the same keys and uids; names shard, row and uid.
    """
    table = good_rows(read_table(parquet, shard))
    members = index_tar(tar)
    strangers = members.keys() - set(table.column("key").to_pylist())
    if strangers:
        raise DataError(f"shard {shard}: {tar} holds key {min(strangers)}, which is no good row of {parquet.name}")
    with tar.open("rb") as stream:
        for row, values in enumerate(table.to_pylist()):
            yield _join(stream, members, values, f"shard {shard}: row {row}: uid {values['uid']}")


def _join(stream: Any, members: Members, values: dict[str, Any], where: str) -> Sample:
    files = members.get(values["key"], {})
    extension = picture_extension(files)
    if extension is None or "json" not in files:
        raise DataError(f"{where}: its key {values['key']} has no picture and json in the tar")
    told = _read_json(read_member(stream, files["json"]), where).get("uid")
    if told != values["uid"]:
        raise DataError(f"{where}: key {values['key']} has uid {told} in the tar: table and tar do not belong together")
    return Sample(
        uid=values["uid"],
        key=values["key"],
        url=values["url"],
        caption=values["caption"] or "",
        split=values["split"],
        picture=read_member(stream, files[extension]),
    )


def read_member(stream: Any, place: tuple[int, int]) -> bytes:
    """The bytes of one file of a tar."""
    stream.seek(place[0])
    return stream.read(place[1])


def _read_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: its json in the tar is malformed ({error})") from None

"""Readers of img2dataset's shards: they match the pictures of a tar with the rows of its table by key and uid.

Every read of a picture gives its key and its uid, and the uid is compared with the picture's json in the tar. So the
first read detects a tar that does not belong to the table, the embeddings or the index.
"""

import functools
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from PIL import Image

from pipeline.data.list_columns import CAPTION_COLUMNS
from pipeline.data.mends import repair_hint
from pipeline.data.rows import make_uid
from pipeline.data.shard_tables import TAKEN_IN, good_rows, read_table
from pipeline.data.tar_index import Members, find_in_tar, index_tar, picture_span
from pipeline.errors import DataError
from pipeline.pictures import decode
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

_SEARCHES = 700  # in one tar, as long as reading all headers of 10,000 pictures
_OPEN_SHARDS = 16  # the index of a tar of 10,000 pictures takes 8 MB


def sample_url(record: Mapping[str, Any], shard: str, key: str) -> str:
    """The URL in the json of a sample; of a sample without one, its place."""
    url = record.get("url")
    return url.strip() if isinstance(url, str) and url.strip() else f"shard:{shard}/{key}"


def sample_caption(record: Mapping[str, Any], text: bytes) -> str:
    """The caption in the json of a sample, or else its text file.

    Raises:
        ValueError: If the text is not UTF-8.
    """
    caption = next((one for name in CAPTION_COLUMNS if isinstance(one := record.get(name), str)), None)
    return text.decode("utf-8-sig").strip() if caption is None else caption


class ShardPictures:
    """Random access to the stored pictures of one shard; several threads may read at once.

    It holds the tar's index and one file handle, which is closed when the object is garbage-collected.

    Args:
        tar: Pictures of the shard.
        shard: Name of the shard, for messages.
        indexed: Whether all headers are read at once; else the first pictures are searched for one by one, and the
            headers are read only if a search finds none, or there are many.
        members: The tar's index, if it is known already.

    Raises:
        DataError: If the file is not a readable tar.
    """

    def __init__(self, tar: Path, shard: str, *, indexed: bool = True, members: Members | None = None) -> None:
        self._tar = tar
        self._shard = shard
        self._index = index_tar(tar) if members is None and indexed else members
        self._num_searches = 0
        self._file = os.open(tar, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[Any, tuple[Path, str, Members]]:
        return (_open_pictures, (self._tar, self._shard, self._members()))

    def part(self, keys: Sequence[str]) -> "ShardPictures":
        """The same tar with these keys alone: small enough to send to another process."""
        members = self._members()
        return _open_pictures(self._tar, self._shard, {key: members[key] for key in keys if key in members})

    def keys(self) -> set[str]:
        """Keys of the rows that have files in the tar."""
        return set(self._members())

    def read(self, key: str, uid: str) -> bytes:
        """The stored picture file of a row.

        Raises:
            DataError: If the tar has no such picture, or has another uid for it.
        """
        files = self._files(key)
        picture = picture_span(files)
        if picture is None or not files.keys() & {"json", "txt"}:
            raise DataError(
                f"{self.where(key, uid)}: no picture and json of this key in {self._tar}; {repair_hint(self._tar)}"
            )
        try:
            record = json.loads(self._read(files["json"])) if "json" in files else {}
            text = self._read(files["txt"]) if "txt" in files else b""
            # A tar that somebody else wrote holds no uid of ours, but what it is computed from.
            tar_uid = record.get("uid")
            if tar_uid != uid:
                computed = make_uid(sample_url(record, self._shard, key), sample_caption(record, text))
                tar_uid = computed if computed == uid else tar_uid or computed
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{self.where(key, uid)}: malformed json in {self._tar} ({error!r}); {repair_hint(self._tar)}"
            ) from None
        if tar_uid != uid:
            raise DataError(
                f"{self.where(key, uid)}: the row has uid {tar_uid} in {self._tar}; {repair_hint(self._tar)}"
            )
        return self._read(picture)

    def decode(self, key: str, uid: str) -> Image.Image:
        """The picture of a row, upright and RGB.

        Raises:
            DataError: As ``read``, or if the picture cannot be decoded.
        """
        return decode(self.read(key, uid), where=self.where(key, uid))

    def _files(self, key: str) -> dict[str, tuple[int, int]]:
        if self._index is None and self._num_searches < _SEARCHES:
            self._num_searches += 1
            files = find_in_tar(self._tar, self._file, key)
            if picture_span(files) and "json" in files:
                return files
        return self._members().get(key, {})

    def _members(self) -> Members:
        if self._index is None:
            self._index = index_tar(self._tar)
        return self._index

    def _read(self, span: tuple[int, int]) -> bytes:
        data = os.pread(self._file, span[1], span[0])
        if len(data) < span[1]:
            raise DataError(f"{self._tar}: truncated at byte {span[0] + len(data)}; {repair_hint(self._tar)}")
        return data

    def where(self, key: str, uid: str) -> str:
        """Name of a row in messages."""
        return f"shard {self._shard}: key {key}: uid {uid}"


def _open_pictures(tar: Path, shard: str, members: Members) -> ShardPictures:
    return ShardPictures(tar, shard, members=members)


class StoredPictures:
    """Random access to the stored pictures of all shards; the last few shards stay open.

    Args:
        download: The download step's artifact.
    """

    def __init__(self, download: Artifact) -> None:
        self._download = download
        self._open = functools.lru_cache(_OPEN_SHARDS)(self.shard)

    def shard(self, shard: str) -> ShardPictures:
        """Open one shard.

        Raises:
            DataError: If the shard is missing or damaged.
        """
        return ShardPictures(self._download.path(f"{shard}.tar"), shard, indexed=False)

    def read(self, shard: str, key: str, uid: str) -> bytes:
        """See ``ShardPictures.read``."""
        return self._open(shard).read(key, uid)

    def decode(self, shard: str, key: str, uid: str) -> Image.Image:
        """See ``ShardPictures.decode``."""
        return self._open(shard).decode(key, uid)


SAMPLE_COLUMNS = ("uid", "key", "url", "caption", "split")
"""Columns that ``good_samples`` gives."""


def good_samples(tar: Path, parquet: Path, shard: str) -> tuple[pa.Table, ShardPictures]:
    """The good rows of a shard, sorted by key, and its pictures; an absent caption is empty.

    Args:
        tar: Pictures of the shard.
        parquet: Table of the shard.
        shard: Name of the shard.

    Raises:
        DataError: If table and tar do not have the same keys; names shard and key.
    """
    all_rows = read_table(parquet, [*SAMPLE_COLUMNS, "status"])
    may_have_more = TAKEN_IN in (all_rows.schema.metadata or {})
    table = good_rows(all_rows).sort_by("key").select(SAMPLE_COLUMNS).replace_schema_metadata()
    table = table.set_column(3, "caption", pc.fill_null(table.column("caption"), ""))
    pictures = ShardPictures(tar, shard)
    extra_keys = pictures.keys() - set(table.column("key").to_pylist())
    if extra_keys and not may_have_more:
        raise DataError(f"shard {shard}: {tar} has key {min(extra_keys)}, which is not a good row of {parquet.name}")
    return table, pictures

"""Readers of img2dataset's shards: they match the pictures of a tar with the rows of its table by key and uid.

Every read of a picture gives its key and its uid, and the uid is compared with the picture's json in the tar, or both
with the checksum that the shard's table has of them. So the first read detects a tar that does not belong to the table,
the embeddings or the index.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from PIL import Image

from pipeline.data.mends import repair_hint
from pipeline.data.shard_tables import TAKEN_IN, good_rows, read_table
from pipeline.data.tar_files import FarTar, LocalTar
from pipeline.data.tar_index import Members, find_in_tar, picture_span
from pipeline.data.tar_samples import sample_of
from pipeline.errors import DataError
from pipeline.pictures.read import decode
from pipeline.workspace.files import is_remote
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

_SEARCHES = 700  # in one tar, as long as reading all headers of 10,000 pictures
_OPEN_SHARDS = 16  # the index of a tar of 10,000 pictures takes 8 MB
_RANGED_SHARDS = 64  # the pictures of one search are in as many shards, 40 by default; of each the places are kept


class ShardPictures:
    """Random access to the stored pictures of one shard; several threads may read at once.

    Args:
        tar: Pictures of the shard.
        shard: Name of the shard, for messages.
        indexed: Whether all headers are read at once; else the first pictures are searched for one by one, and the
            headers are read only if a search finds none, or there are many.
        members: The tar's index, if it is known already.

    Raises:
        DataError: If the file is not a readable tar.
    """

    def __init__(self, tar: Path | FarTar, shard: str, *, indexed: bool = True, members: Members | None = None) -> None:
        self._tar = LocalTar(tar) if isinstance(tar, Path) else tar
        self._shard = shard
        self._index = self._tar.members() if members is None and indexed else members
        self._num_searches = 0

    def __reduce__(self) -> tuple[Any, tuple[Path, str, Members]]:
        return (_open_pictures, (self._local(), self._shard, self._members()))

    def part(self, keys: Sequence[str]) -> "ShardPictures":
        """The same tar with these keys alone: small enough to send to another process."""
        members = self._members()
        return _open_pictures(self._local(), self._shard, {key: members[key] for key in keys if key in members})

    def keys(self) -> set[str]:
        """Keys of the rows that have files in the tar."""
        return set(self._members())

    def read(self, key: str, uid: str) -> bytes:
        """The stored picture file of a row.

        Raises:
            DataError: If the tar has no such picture, or has another uid for it.
        """
        data = self._tar.picture(key, uid)
        if data is not None:
            return data
        files, tar = self._files(key), self._tar.file
        picture = picture_span(files)
        if picture is None:
            raise DataError(f"{self.where(key, uid)}: no picture and json of this key in {tar}; {repair_hint(tar)}")
        try:
            sample = sample_of(key, files, self._read)
        except ValueError as error:
            raise DataError(
                f"{self.where(key, uid)}: malformed json or text in {tar} ({error}); {repair_hint(tar)}"
            ) from None
        # A tar that somebody else wrote holds no uid of ours, but what it is computed from.
        tar_uid = sample.record.get("uid")
        if uid not in (tar_uid, sample.uid):
            raise DataError(
                f"{self.where(key, uid)}: the row has uid {tar_uid or sample.uid} in {tar}; {repair_hint(tar)}"
            )
        data = self._read(picture)
        if not self._tar.is_right(key, uid, data):
            raise DataError(
                f"{self.where(key, uid)}: the picture in {tar} does not match its checksum; {repair_hint(tar)}"
            )
        return data

    def decode(self, key: str, uid: str) -> Image.Image:
        """The picture of a row, upright and RGB.

        Raises:
            DataError: As ``read``, or if the picture cannot be decoded.
        """
        return decode(self.read(key, uid), where=self.where(key, uid))

    @property
    def repair_hint(self) -> str:
        """What to do if the tar is damaged."""
        return repair_hint(self._tar.file)

    def _files(self, key: str) -> dict[str, tuple[int, int]]:
        if self._index is None and self._num_searches < _SEARCHES:
            self._num_searches += 1
            files = find_in_tar(self._tar.file, self._tar.read, self._tar.num_bytes, key)
            if picture_span(files) and "json" in files:
                return files
        return self._members().get(key, {})

    def _members(self) -> Members:
        if self._index is None:
            self._index = self._tar.members()
        return self._index

    def _read(self, span: tuple[int, int]) -> bytes:
        data = self._tar.read(span[0], span[0] + span[1])
        if len(data) < span[1]:
            tar = self._tar.file
            raise DataError(f"{tar}: truncated at byte {span[0] + len(data)}; {repair_hint(tar)}")
        return data

    def _local(self) -> Path:
        """The tar, for another process of this machine."""
        if isinstance(self._tar.file, Path):
            return self._tar.file
        raise TypeError("a tar that is read by ranges stays in its process")

    def where(self, key: str, uid: str) -> str:
        """Name of a row in messages."""
        return f"shard {self._shard}: key {key}: uid {uid}"


def _open_pictures(tar: Path, shard: str, members: Members) -> ShardPictures:
    return ShardPictures(tar, shard, members=members)


class StoredPictures:
    """Random access to the stored pictures of all shards; the last few shards stay open.

    Args:
        download: The download step's artifact.
        by_ranges: Whether of a tar in an object store only the pictures are fetched that are read, which is for some
            pictures of many shards; else the tar is fetched whole.
    """

    def __init__(self, download: Artifact, *, by_ranges: bool = False) -> None:
        self._download = download
        # A web server may know no ranges.
        in_store = is_remote(download.uri) and not download.uri.startswith(("http://", "https://"))
        self._by_ranges = by_ranges and in_store
        self._open = functools.lru_cache(_RANGED_SHARDS if self._by_ranges else _OPEN_SHARDS)(self.shard)

    def shard(self, shard: str) -> ShardPictures:
        """Open one shard.

        Raises:
            DataError: If the shard is missing or damaged.
        """
        name = f"{shard}.tar"
        tar = self._download.ranged(name) if self._by_ranges else self._download.path(name)
        tar = tar if isinstance(tar, Path) else FarTar(self._download, shard, tar)
        return ShardPictures(tar, shard, indexed=False)

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

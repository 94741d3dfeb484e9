"""Training rows from committed shards: tables from Parquet, pictures from the tars, joined by key and checked by uid.

One shard's table is read at once; its pictures are read one by one, at their offsets in the tar, when a batch asks.
Legend: N rows of a shard, D features of an embedding.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.rows import require_columns
from pipeline.errors import DataError
from pipeline.pictures import decode, square
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are made at import, out of sight of a type checker
_ROW_COLUMNS = ["uid", "key", "caption", "split"]
_PICTURES = (".jpg", ".png", ".webp")


@dataclass(frozen=True)
class ShardTable:
    """The rows of one shard that one training reads, in order of key."""

    shard: str
    uids: list[str]
    keys: list[str]
    captions: list[str]
    z_image: NDArray[np.float16] | None
    """(N, D), of length one; None where the training does not read it."""

    def __len__(self) -> int:
        return len(self.uids)


class ShardReader:
    """Reads the rows of one split.

    Args:
        download: Shards of pictures; None where the training reads no pictures.
        embed: Embeddings; None where the training reads none. With it, its rows are the training's rows.
        split: ``train`` or ``validation``.

    Raises:
        DataError: If a shard lacks a column, or an embedded row is not in the tar.
    """

    def __init__(self, download: Artifact | None, embed: Artifact | None, split: str) -> None:
        rows = embed or download
        if rows is None:
            raise ValueError("a training reads pictures, embeddings or both")
        self._rows: Artifact = rows
        self._download = download
        self._embed = embed
        self._split = split
        self.shards = sorted(rows.shard_records())
        self.shard_rows = [self._count(shard) for shard in self.shards]

    def table(self, shard: str) -> ShardTable:
        """Read the rows of a shard."""
        path = self._rows.path(f"{shard}.parquet")
        columns = [*_ROW_COLUMNS, "z_image"] if self._embed else [*_ROW_COLUMNS, "status"]
        table = self._select(_read_table(path, columns))
        table = table.sort_by("key")
        uids, keys = table["uid"].to_pylist(), table["key"].to_pylist()
        if self._embed and self._download:
            self._check_uids(shard, uids, keys)
        return ShardTable(
            shard=shard,
            uids=uids,
            keys=keys,
            captions=[caption or "" for caption in table["caption"].to_pylist()],
            z_image=_vectors(table["z_image"]) if self._embed else None,
        )

    def pictures(self, shard: str) -> TarPictures:
        """Open the pictures of a shard."""
        if self._download is None:
            raise ValueError("this training reads no pictures")
        return TarPictures(self._download.path(f"{shard}.tar"), shard)

    def captions(self) -> list[str]:
        """Every different caption of the split, sorted; reads the caption column of every shard."""
        found: set[str] = set()
        for shard in self.shards:
            table = self._select(_read_table(self._rows.path(f"{shard}.parquet"), self._filter_columns("caption")))
            found.update(caption or "" for caption in table["caption"].to_pylist())
        return sorted(found)

    def _filter_columns(self, *more: str) -> list[str]:
        return ["split", *([] if self._embed else ["status"]), *more]

    def _count(self, shard: str) -> int:
        return self._select(_read_table(self._rows.path(f"{shard}.parquet"), self._filter_columns())).num_rows

    def _select(self, table: pa.Table) -> pa.Table:
        keep = pc.equal(table["split"], self._split)
        if not self._embed:
            keep = pc.and_(keep, pc.equal(table["status"], "success"))
        return table.filter(keep)

    def _check_uids(self, shard: str, uids: list[str], keys: list[str]) -> None:
        assert self._download is not None
        path = self._download.path(f"{shard}.parquet")
        stored = _read_table(path, ["uid", "key", "status"])
        ok = stored.filter(pc.equal(stored["status"], "success"))
        uid_of = dict(zip(ok["key"].to_pylist(), ok["uid"].to_pylist(), strict=True))
        for row, (uid, key) in enumerate(zip(uids, keys, strict=True)):
            if uid_of.get(key) != uid:
                raise DataError(
                    f"shard {shard}: row {row}: uid {uid} of the embeddings is not at key {key} of the download "
                    f"({uid_of.get(key, 'no such key')}); remove the embed artifact and run again"
                )


class TarPictures:
    """Pictures of one tar by key, read at their offsets.

    Args:
        path: The tar.
        shard: Its name, for messages.

    Raises:
        DataError: If it is not a readable tar.
    """

    def __init__(self, path: Path, shard: str) -> None:
        self._shard = shard
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = Path(member.name)
                    if name.suffix in _PICTURES:
                        self._places[name.stem] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"shard {shard}: {path} is not a readable tar: {error}; run the download again") from error
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, key: str, uid: str) -> bytes:
        """The encoded picture of a key.

        Raises:
            DataError: If the tar has no such picture.
        """
        if key not in self._places:
            raise DataError(f"shard {self._shard}: key {key}: uid {uid} is not in the tar; run the download again")
        offset, size = self._places[key]
        return os.pread(self._file, size, offset)

    def decode(self, key: str, uid: str, image_px: int) -> NDArray[np.uint8]:
        """The centre square of a picture, scaled to (image_px, image_px, 3).

        Raises:
            DataError: If the picture is missing or cannot be decoded.
        """
        where = f"shard {self._shard}: key {key}: uid {uid}"
        return square(decode(self.read(key, uid), where=where), image_px)


def _read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: is not readable Parquet: {error}; remove its artifact and run again") from error
    require_columns(names, list(columns), where=str(path))
    return pq.read_table(path, columns=list(columns))


def _vectors(column: pa.ChunkedArray) -> NDArray[np.float16]:
    array = column.combine_chunks()
    width = array.type.list_size
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)

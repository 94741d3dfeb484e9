"""Reads training rows from committed shards: tables from Parquet, and pictures from tars, matched by key and uid.

A shard's texts are read as a whole; its pictures and its embeddings one by one, when a batch needs them.
Legend: N rows of a shard, D features of an embedding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from pipeline.data.selection import Selection
from pipeline.data.shard_tables import read_table
from pipeline.data.shards import ShardPictures
from pipeline.data.token_states import EmptyCaption, StoredStates, read_empty, states_file
from pipeline.data.vectors import StoredColumn
from pipeline.errors import DataError
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them
_ROW_COLUMNS = ["uid", "key", "caption", "split"]
_FILE_ROW = "row in the file"

NUM_SAMPLED_CAPTIONS = 20_000
"""Captions whose words stand for the corpus: at 20 words each, at most 400,000 pairs of words, some 60 MB."""
_MAX_SAMPLED_SHARDS = 64
_THREADS = 8


@dataclass(frozen=True)
class ShardTable:
    """The rows of one shard that one training reads, in order of key."""

    shard: str
    columns: pa.Table
    """uid, key, caption, which is empty if absent: as Arrow keeps them, because Python's strings take four times the
    memory."""
    vectors: StoredColumn | None = None
    """z_image of every row of the file; None if the training does not read it."""
    file_rows: NDArray[np.int64] | None = None
    """(N,) place of each row in the file."""
    states: StoredStates | None = None
    """The captions of the shard as the embed step encoded them; None if the training does not read that."""
    rows_of_states: NDArray[np.int64] | None = None
    """(N,) place of each row among them."""

    def __len__(self) -> int:
        return self.columns.num_rows

    def take(self, name: str, rows: NDArray[np.int64]) -> pa.Array:
        """The texts of a column in some rows."""
        column = self.columns[name]
        texts = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        return texts.take(pa.array(rows))

    def z_image(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """The image embeddings of some rows, (len(rows), D), of length one."""
        assert self.vectors is not None
        assert self.file_rows is not None
        return self.vectors.read(self.file_rows[rows])

    def state_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of some rows in ``states``."""
        assert self.rows_of_states is not None
        return self.rows_of_states[rows]


class ShardReader:
    """Reads the rows of one split.

    Args:
        download: Shards of pictures; None if the training reads no pictures.
        embed: Embeddings; None if the training reads none. If given, its rows are the training's rows.
        split: ``train`` or ``validation``.
        selection: Rows to read; None: all. The embeddings that a filter writes need none.
        states: The embed step with token states, whose shards hold every row of ``embed``; None: they are not read.

    Raises:
        DataError: If a shard is damaged or lacks a column.
    """

    def __init__(
        self,
        download: Artifact | None,
        embed: Artifact | None,
        split: str,
        selection: Selection | None = None,
        states: Artifact | None = None,
    ) -> None:
        rows = embed or download
        if rows is None:
            raise ValueError("a training reads pictures, embeddings or both")
        self._rows: Artifact = rows
        self._download = download
        self._embed = embed
        self._split = split
        self._selection = selection
        self._states = states
        records = rows.shard_records()
        self.shards = sorted(records)
        self.shard_lists = [records[shard].list_number for shard in self.shards]
        with ThreadPoolExecutor(_THREADS) as threads:  # an object store answers many requests at a time
            self.shard_rows = list(threads.map(self._count, [records[shard] for shard in self.shards]))

    def table(self, shard: str) -> ShardTable:
        """Read the rows of a shard."""
        path = self._rows.path(f"{shard}.parquet")
        table = read_table(path, _ROW_COLUMNS if self._embed else [*_ROW_COLUMNS, "status"], use_threads=False)
        table = table.append_column(_FILE_ROW, pa.array(np.arange(table.num_rows)))
        table = _by_key(self._select(table, shard).combine_chunks())
        captions = pc.fill_null(table["caption"].cast(pa.string()), "")
        columns = pa.table({"uid": table["uid"], "key": table["key"], "caption": captions})
        vectors = StoredColumn(path, "z_image") if self._embed else None
        states = None if self._states is None else StoredStates(self._states.path(states_file(shard)))
        rows_of_states = None if states is None else states.find(columns["uid"])
        return ShardTable(shard, columns, vectors, table[_FILE_ROW].to_numpy(), states, rows_of_states)

    def pictures(self, shard: str) -> ShardPictures:
        """Open the pictures of a shard."""
        if self._download is None:
            raise ValueError("this training reads no pictures")
        return ShardPictures(self._download.path(f"{shard}.tar"), shard)

    def empty_caption(self) -> EmptyCaption:
        """The sizes of the CLIP that encoded the stored captions, and the empty one.

        Raises:
            DataError: If there is no shard, or the first one's captions are missing or damaged.
        """
        if self._states is None or not self.shards:
            raise DataError(f"{self._rows.uri}: no shard with token states")
        return read_empty(self._states.ranged(states_file(self.shards[0])))

    def captions(self) -> list[str]:
        """The distinct captions of the split, sorted; reads the caption column of every shard."""
        captions: set[str] = set()
        for shard in self.shards:
            file = self._rows.ranged(f"{shard}.parquet")
            table = self._select(read_table(file, self._filter_columns("caption")), shard)
            captions.update(caption or "" for caption in table["caption"].to_pylist())
        return sorted(captions)

    def _filter_columns(self, *more: str) -> list[str]:
        return ["split", *([] if self._embed else ["status"]), *(["uid"] if self._selection else []), *more]

    def _count(self, record: ShardRecord) -> int:
        """Rows of a shard: from its record or that of its labels, or from its table if that does not say it."""
        selected = self._selection
        counted = selected.num_rows(record.shard, self._split) if selected else record.rows_of(self._split)
        if counted is not None:
            return counted
        table = read_table(self._rows.ranged(f"{record.shard}.parquet"), self._filter_columns())
        return self._select(table, record.shard).num_rows

    def _select(self, table: pa.Table, shard: str) -> pa.Table:
        keep = pc.equal(table["split"], self._split)
        if not self._embed:
            keep = pc.and_(keep, pc.equal(table["status"], "success"))
        table = table.filter(keep)
        return table if self._selection is None else self._selection.of(table, shard)


def require_rows_of(download: Artifact, imported: Artifact, *, where: str) -> None:
    """Refuse imported embeddings of other rows than those of a download whose pictures a training reads beside them.

    The first shard that has rows is compared.

    Args:
        download: The pictures.
        imported: The embeddings, or those of them that a filter left.
        where: Name of the training, for the message.

    Raises:
        DataError: Names the first row that has no picture.
    """
    shard = next((name for name, record in imported.shard_records().items() if record.counts["ok"]), None)
    if shard is None:
        return
    file = f"{shard}.parquet"
    uids = read_table(imported.ranged(file), ["uid"])["uid"]
    of_pictures = read_table(download.ranged(file), ["uid"])["uid"] if download.exists(file) else uids[:0]
    missing = uids.filter(pc.invert(pc.is_in(uids, value_set=of_pictures.combine_chunks())))
    if len(missing):
        raise DataError(
            f"{where}: {imported.uri}: shard {shard}: uid {missing[0]} is no row of the download, whose pictures this "
            "training reads: the embeddings of embed.import_from are of other pairs. Train it by a recipe without "
            "import_from"
        )


def _by_key(table: pa.Table) -> pa.Table:
    """The rows in order of key, in which our own files have them."""
    keys = table["key"]
    is_sorted = pc.all(pc.less_equal(keys.slice(0, max(0, len(keys) - 1)), keys.slice(1))).as_py()
    return table if is_sorted else table.sort_by("key").combine_chunks()


def sample_captions(rows: Artifact, num_captions: int = NUM_SAMPLED_CAPTIONS) -> list[str]:
    """Captions of the training split, from shards at equal distances in the list; always the same ones.

    A list may be ordered by its sources, so its first shards would not stand for it, and reading all takes too long.

    Args:
        rows: An artifact with ``<shard>.parquet``: download or embed.
        num_captions: Most captions, divided evenly among the shards; empty captions are left out.

    Raises:
        DataError: If a shard is damaged.
    """
    shards = sorted(rows.shard_records())
    num_shards = min(len(shards), _MAX_SAMPLED_SHARDS)
    captions: list[str] = []
    for number in range(num_shards):
        shard = shards[number * len(shards) // num_shards]
        table = read_table(rows.ranged(f"{shard}.parquet"), ["split", "caption"])
        columns = zip(table["split"].to_pylist(), table["caption"].to_pylist(), strict=True)
        training = [caption for split, caption in columns if split == "train" and caption]
        share = min(len(training), (num_captions - len(captions)) // (num_shards - number))
        captions += [training[n * len(training) // share] for n in range(share)]
    return captions

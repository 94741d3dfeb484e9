"""The rows of a segment: their ids, their columns and their vectors, found in time and memory that do not grow with N.

A position is the place of a row in its segment: 0 .. N - 1, in the order of the embeddings. Files, all memory-mapped:

    rows.arrow   the columns of each row, Arrow IPC, in batches of BATCH_ROWS rows
    ids.npy      the id of each position
    order.npy    the positions in ascending order of id, in which an id, a hash, is found near its share of all ids
    places.npy   the number of each position's row in the embeddings
    groups.npy   where the vectors of each row group start (pipeline/data/vectors.py)
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.data.far_files import FarFiles
from pipeline.data.vectors import RowGroups, StoredVectors
from pipeline.errors import DataError
from pipeline.retrieve.embedded import EmbeddedShards, Floats, Ids
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.store import Artifact

BATCH_ROWS = 8192
_SORT_BUCKETS = 16  # the ids are sorted in parts, so that 1/16 of them is in memory
_ID_BITS = 53
_EVEN_GUESSES = 16  # then by halves, so that ids of any spread are found
_CACHED_BATCHES = 4096
_MOST_SAMPLED_BATCHES = 64


class Rows:
    """The rows of one segment.

    Args:
        artifact: The index.
        segment: The segment's folder in it.
        shards: The embeddings from which the segment was built.

    Raises:
        DataError: If a file is missing or damaged, or the files disagree about the number of rows.
    """

    def __init__(self, artifact: Artifact, segment: str, shards: EmbeddedShards) -> None:
        where = f"{artifact.uri}/{segment}"
        try:
            self.ids, self._order, self._places, groups = (
                _map_array(artifact.path(f"{segment}/{name}.npy")) for name in ("ids", "order", "places", "groups")
            )
            reader: Any = pa.ipc.open_file(pa.memory_map(str(artifact.path(f"{segment}/rows.arrow"))))
            num_batches = reader.num_record_batches
            last: int = reader.get_batch(num_batches - 1).num_rows if num_batches else 0
        except (pa.ArrowInvalid, OSError, ValueError, EOFError) as error:
            raise DataError(f"{where}: damaged ({error}); {artifact.mend()}") from error
        num_rows = max(0, num_batches - 1) * BATCH_ROWS + last
        sizes = {"ids.npy": len(self.ids), "order.npy": len(self._order), "places.npy": len(self._places)}
        for name, size in sizes.items():
            if size != num_rows:
                raise DataError(f"{where}: {size} rows in {name}, {num_rows} in rows.arrow; {artifact.mend()}")
        self.shards = shards
        self._batch = functools.lru_cache(_CACHED_BATCHES)(reader.get_batch)
        self._batch_columns = functools.lru_cache(_CACHED_BATCHES)(self._read_batch_columns)
        self._schema: Any = reader.schema
        self.column_names = tuple(str(name) for name in self._schema.names)
        self._vectors = StoredVectors(
            RowGroups(groups[:, 0].copy(), groups[:, 1].copy(), groups[:, 2:].copy()),
            shards.path,
            shards.embed_dim,
            FarFiles(shards) if shards.are_far else None,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, ids: Ids) -> Ids:
        """The position of each id, -1 if the segment has no such row; of two rows of one id, the first."""
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        ranks = np.minimum(ranks_of(np.asarray(ids, np.int64), self.ids, self._order), len(self) - 1)
        positions = np.asarray(self._order[ranks])
        return np.where(self.ids[positions] == ids, positions, -1)

    def positions_of_places(self, places: Ids) -> Ids:
        """The position of each row of the embeddings, -1 if the segment leaves it out."""
        if not len(self):
            return np.full(len(places), -1, np.int64)
        ranks = np.minimum(np.searchsorted(self._places, places), len(self) - 1)
        return np.where(self._places[ranks] == places, ranks, -1)

    def values(self, positions: Ids, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """The values of some columns of rows, in the order of ``positions``.

        For the ten rows of a search it takes a tenth of the time of ``columns``, which makes tables.
        """
        batches, offsets = (part.tolist() for part in np.divmod(positions, BATCH_ROWS))
        return [
            tuple([column[offset].as_py() for column in self._batch_columns(batch, names)])
            for batch, offset in zip(batches, offsets, strict=True)
        ]

    def columns(self, positions: Ids, names: Collection[str] | None = None) -> pa.Table:
        """The columns of rows, in the order of ``positions``: uid, key, shard, url, caption, split and others.

        Args:
            positions: The rows.
            names: The columns to read, those of them that there are; None: all.
        """
        chosen = [name for name in self.column_names if names is None or name in names]
        if not len(positions):
            return self._schema.empty_table().select(chosen)
        order = np.argsort(positions, kind="stable")
        batches, offsets = np.divmod(positions[order], BATCH_ROWS)
        numbers, starts = np.unique(batches, return_index=True)
        parts = [
            self._batch(int(number)).select(chosen).take(pa.array(rows))
            for number, rows in zip(numbers, np.split(offsets, starts[1:]), strict=True)
        ]
        table = pa.Table.from_batches(parts)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return table if len(parts) == 1 and (back == np.arange(len(back))).all() else table.take(pa.array(back))

    def batches(self, names: list[str], num_rows: int = BATCH_ROWS) -> Iterator[tuple[int, pa.Table]]:
        """All rows in order, some at a time: the position of the first row, and the columns of ``names``.

        Args:
            names: The columns; they stay on the disk, mapped.
            num_rows: About how many rows to give at once; batches are not cut.
        """
        num_batches, step = -(-len(self) // BATCH_ROWS), max(1, num_rows // BATCH_ROWS)
        for first in range(0, num_batches, step):
            batches = [self._batch(number) for number in range(first, min(first + step, num_batches))]
            yield first * BATCH_ROWS, pa.Table.from_batches(batches).select(names)

    def sample(self, split: str, count: int, rng: np.random.Generator) -> Ids:
        """Ids of at most ``count`` rows of a split, from random batches, of which only some are read."""
        num_batches = -(-len(self) // BATCH_ROWS)
        parts, num_rows = [np.empty(0, np.int64)], 0
        for number in rng.permutation(num_batches)[:_MOST_SAMPLED_BATCHES].tolist():
            if num_rows >= count:
                break
            places = np.flatnonzero(np.array(self._batch(number).column("split").to_pylist()) == split)
            parts.append(np.asarray(self.ids[number * BATCH_ROWS + places]))
            num_rows += len(places)
        ids = np.concatenate(parts)
        return rng.choice(ids, min(count, len(ids)), replace=False)

    def vectors(self, positions: Ids, column: str) -> Floats:
        """The vectors (len(positions), D) of ``z_image`` or ``z_text``, of length one, from the embeddings."""
        return self._vectors.read(np.asarray(self._places[positions]), column)

    def _read_batch_columns(self, number: int, names: tuple[str, ...]) -> list[Any]:
        batch = self._batch(number)
        return [batch.column(name) for name in names]

    def sources_of(self, positions: Ids) -> Ids:
        """The embed step's artifact that each row comes from, as its number in ``shards.sources``."""
        return self._source_of_shard[self.shards.shard_of(np.asarray(self._places[positions]))]

    @functools.cached_property
    def _source_of_shard(self) -> Ids:
        return np.array([source for source, _ in self.shards.shards], np.int64)


def write_rows(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write rows.arrow: batches of any size become batches of BATCH_ROWS rows."""
    with HashedFile(path) as file, pa.ipc.new_file(file, schema) as writer:
        waiting, num_waiting = list[pa.RecordBatch](), 0
        for batch in batches:
            waiting.append(batch)
            num_waiting += batch.num_rows
            if num_waiting >= BATCH_ROWS:
                whole = num_waiting - num_waiting % BATCH_ROWS
                table = pa.Table.from_batches(waiting, schema).combine_chunks()
                writer.write_table(table.slice(0, whole), max_chunksize=BATCH_ROWS)
                waiting = table.slice(whole).to_batches()
                num_waiting -= whole
        if num_waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema).combine_chunks())


def write_array(path: Path, parts: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: Any) -> None:
    """Write a .npy file part by part; unlike a memory-mapped one, it notices a full disk."""
    with HashedFile(path) as file:
        header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())


def sorted_positions(ids: Ids) -> Iterator[Ids]:
    """The positions in ascending order of id, and of position for equal ids; part by part."""
    width = (1 << _ID_BITS) // _SORT_BUCKETS
    for bucket in range(_SORT_BUCKETS):
        positions = np.flatnonzero((ids >= bucket * width) & (ids < (bucket + 1) * width))
        yield positions[np.argsort(ids[positions], kind="stable")]


def ranks_of(targets: Ids, ids: Ids, order: Ids) -> Ids:
    """How many ids are smaller than each of the targets, as ``np.searchsorted`` finds it in more and more steps.

    Ids are hashes: the next guess is where an even spread between the two nearest known ids puts the target. It
    takes about four rounds, of one look into the files each, whether there are a thousand rows or a billion.

    Args:
        targets: Ids to look for.
        ids: The id of each position.
        order: The positions in ascending order of id.
    """
    low, high = np.zeros(len(targets), np.int64), np.full(len(targets), len(order), np.int64)
    low_id, high_id = np.zeros(len(targets), np.int64), np.full(len(targets), 1 << _ID_BITS, np.int64)
    for number in range(_EVEN_GUESSES + _ID_BITS):
        open_ = np.flatnonzero(low < high)
        if not len(open_):
            break
        share = (targets[open_] - low_id[open_]) / np.maximum(high_id[open_] - low_id[open_], 1)
        share = np.clip(share, 0, 1) if number < _EVEN_GUESSES else np.full(len(open_), 0.5)
        first, num_open = low[open_], high[open_] - low[open_]
        guesses = first + np.minimum((share * num_open).astype(np.int64), num_open - 1)
        guess_ids = np.asarray(ids[order[guesses]])
        is_below = guess_ids < targets[open_]
        below, above = open_[is_below], open_[~is_below]
        low[below], low_id[below] = guesses[is_below] + 1, guess_ids[is_below]
        high[above], high_id[above] = guesses[~is_below], guess_ids[~is_below]
    return low


def are_among(values: Ids, ordered: Ids) -> NDArray[np.bool_]:
    """Whether each value, in an array of any shape, is among some sorted ones, which are not sorted again."""
    if not len(ordered):
        return np.zeros(values.shape, np.bool_)
    ranks = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[ranks] == values


def repeated_positions(ids: Ids, order: Ids) -> Iterator[tuple[Ids, Ids]]:
    """The later rows of each id that several rows have, and the first row of each; both positions, part by part."""
    step = 1 << 22
    for start in range(0, len(order), step):
        # One row before the part, so that no pair of neighbours is missed.
        part = np.asarray(order[max(0, start - 1) : start + step])
        repeats = np.flatnonzero(ids[part[1:]] == ids[part[:-1]]) + 1
        if len(repeats):
            firsts = np.searchsorted(ids, ids[part[repeats]], sorter=order)
            yield part[repeats], np.asarray(order[firsts])


def _map_array(path: Path) -> Ids:
    array = np.load(path, mmap_mode="r")
    return array.view(np.ndarray)

"""The rows that an index is trained on and measured with: random rows of all shards, read without their neighbours.

Legend: N rows of all shards, D features of an embedding.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.data.mends import repair_hint
from pipeline.data.vectors import VECTOR_COLUMNS, RowGroups, to_unit
from pipeline.errors import DataError
from pipeline.retrieve.embedded import EmbeddedShards, Floats, Ids
from pipeline.workspace.ranged_file import RangedFile

BLOCK_ROWS = 64
"""Rows that are chosen together from many: 100 kB of vectors of width 768, which an object store sends in little more
time than one vector."""
_LEAST_BLOCKS = 1000
_SPARSE = 1 / 4
"""Share of all rows below which a sample is read row by row, and its files are not fetched whole."""
_QUERY_SHARDS, _MOST_QUERY_SHARDS = 64, 1024  # 1,024 where validation rows are rare
_THREADS = 16  # an object store answers many requests at a time


def choose_sample(num_rows: int, count: int, rng: np.random.Generator) -> Ids:
    """A random sample of ``count`` of all rows, ascending, in which each row is with the same probability.

    Of a quarter of the rows and more, the unit is the row. Of fewer, the unit is a block of up to 64 consecutive rows:
    blocks are drawn without replacement from all blocks of all shards, at least a thousand of them, so that a list
    which is ordered by its sources is sampled from everywhere. Rows of one block are in the sample together. The number
    of rows is then ``count`` less than one block.

    Args:
        num_rows: N.
        count: Rows of the sample, at most N.
        rng: What draws it.
    """
    block_rows = min(BLOCK_ROWS, count // _LEAST_BLOCKS) if _is_sparse(count, num_rows) else 1
    if block_rows <= 1:
        return np.sort(rng.choice(num_rows, count, replace=False))
    blocks = np.sort(rng.choice(-(-num_rows // block_rows), count // block_rows, replace=False))
    rows = (blocks[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
    return rows[rows < num_rows]


def choose_queries(embedded: EmbeddedShards, count: int, rng: np.random.Generator) -> tuple[Ids, bool]:
    """Random validation rows from random shards, ascending; random rows of any split if there are fewer than two.

    Returns:
        The rows, and whether they are validation rows.
    """
    parts, num_rows = list[Ids](), 0
    for num_read, shard in enumerate(rng.permutation(len(embedded.shards)).tolist()):
        if (num_read >= _QUERY_SHARDS and num_rows >= count) or num_read == _MOST_QUERY_SHARDS:
            break
        split = np.array(embedded.read_column(shard, "split"))
        parts.append(np.flatnonzero(split == "validation") + embedded.starts[shard])
        num_rows += len(parts[-1])
    rows = np.sort(np.concatenate(parts))
    if len(rows) < 2:
        count = min(count, max(2, embedded.num_rows // 10), embedded.num_rows)
        return np.sort(rng.choice(embedded.num_rows, count, replace=False)), False
    return np.sort(rng.choice(rows, min(count, len(rows)), replace=False)), True


def read_rows(embedded: EmbeddedShards, rows: Mapping[str, Ids], *, whole: bool = False) -> dict[str, Floats]:
    """The vectors (len, D) of some rows, of length one.

    Few of many rows are read by ranges, so that an object store sends little else than these vectors.

    Args:
        embedded: The shards.
        rows: Ascending row numbers, by column (``z_image``, ``z_text``).
        whole: Fetch the files whole, because this machine will need all of them.

    Raises:
        DataError: If a shard is damaged.
    """
    by_ranges = not whole and _is_sparse(max(map(len, rows.values())), embedded.num_rows)
    vectors = {name: np.empty((len(some), embedded.embed_dim), np.float16) for name, some in rows.items()}
    shards = np.unique(embedded.shard_of(np.concatenate(list(rows.values()))))

    def read(shard: int) -> None:
        source, name = embedded.shards[shard]
        first, stop = embedded.starts[shard : shard + 2]
        file = embedded.sources[source].ranged(f"{name}.parquet") if by_ranges else embedded.path(shard)
        groups = RowGroups.of_file(file, first_row=int(first))
        places = {column: slice(*np.searchsorted(some, [first, stop])) for column, some in rows.items()}
        starts, stops = list[int](), list[int]()
        for column, place in places.items():
            for start, num_rows in _runs(groups, rows[column][place], column, 2 * embedded.embed_dim):
                starts.append(start)
                stops.append(start + 2 * embedded.embed_dim * num_rows)
        numbers = np.frombuffer(b"".join(_read_ranges(file, starts, stops)), np.float16)
        if 2 * len(numbers) != sum(stops) - sum(starts):
            raise DataError(f"index: {embedded.name(shard)}: it ends before its vectors do; {repair_hint(file)}")
        for column, place in places.items():
            part, numbers = np.split(numbers, [embedded.embed_dim * (place.stop - place.start)])
            vectors[column][place] = part.reshape(-1, embedded.embed_dim)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(read, shards.tolist()))
    return {name: to_unit(some) for name, some in vectors.items()}


def _is_sparse(count: int, num_rows: int) -> bool:
    return count < _SPARSE * num_rows


def _runs(groups: RowGroups, rows: Ids, column: str, row_bytes: int) -> list[tuple[int, int]]:
    """First byte and number of rows of each run of consecutive rows of one row group."""
    if not len(rows):
        return []
    numbers = np.searchsorted(groups.first_rows, rows, side="right") - 1
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (np.diff(rows) != 1) | (np.diff(numbers) != 0)
    firsts = np.flatnonzero(is_first)
    starts = groups.offsets[numbers, VECTOR_COLUMNS.index(column)] + (rows - groups.first_rows[numbers]) * row_bytes
    counts = np.diff(firsts, append=len(rows))
    return list(zip(starts[firsts].tolist(), counts.tolist(), strict=True))


def _read_ranges(file: Path | RangedFile, starts: list[int], stops: list[int]) -> list[bytes]:
    if isinstance(file, RangedFile):
        return file.read_ranges(starts, stops)
    with file.open("rb") as stream:
        content: list[bytes] = []
        for start, stop in zip(starts, stops, strict=True):
            stream.seek(start)
            content.append(stream.read(stop - start))
    return content

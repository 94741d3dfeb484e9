"""What the searches for duplicates read: the rows of many shards in a few files, in the order of the shards.

A search has a part for each two million rows, or for each 200,000 embeddings. If each part looked at each shard, the
requests to an object store would grow with the square of the shards; each part looks at ``MOST_BUNDLES`` files at most.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pipeline.filter.labels import map_table
from pipeline.recipe.sections import FilterConfig
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

MOST_BUNDLES = 32
LEAST_SHARDS = 32
"""Shards of a bundle, unless there are fewer: small lists have one bundle."""

_EXACT_COLUMNS = ("uid", "digest", "group")
_NEAR_COLUMNS = (*_EXACT_COLUMNS, "direct", "mirrored", "thumb")


@dataclass(frozen=True)
class Bundle:
    """Shards one after the other, whose rows lie in one file."""

    name: str
    first: int
    """Number of its first shard."""
    stop: int

    @property
    def file(self) -> str:
        """Name of its file: Arrow record batches."""
        return f"{self.name}.arrow"


def plan_bundles(num_shards: int) -> list[Bundle]:
    """Divide the shards evenly into bundles."""
    count = min(MOST_BUNDLES, -(-num_shards // LEAST_SHARDS))
    borders = [num_shards * number // count for number in range(count + 1)]
    return [Bundle(f"gathered-{number:02d}", *borders[number : number + 2]) for number in range(count)]


def gather_measures(
    measures: Artifact, shards: Sequence[str], bundle: Bundle, config: FilterConfig
) -> Iterator[pa.Table]:
    """What the search compares of the rows that stay so far, one table for each shard of a bundle.

    Args:
        measures: ``<shard>.arrow`` of every shard, as ``RowRules`` measures it.
        shards: Names of all shards, sorted.
        bundle: The bundle.
        config: The recipe's section.

    Yields:
        ``number`` of the shard, ``row`` in its table, and what ``RowRules`` measured of the pictures.
    """
    columns = _NEAR_COLUMNS if config.duplicates == "near" else _EXACT_COLUMNS
    for number in range(bundle.first, bundle.stop):
        table = map_table(measures.path(f"{shards[number]}.arrow"))
        rows = pc.indices_nonzero(pc.equal(table["reason"], ""))
        numbers = pa.repeat(pa.scalar(number, pa.int32()), len(rows))
        places = pa.table({"number": numbers, "row": rows.cast(pa.int32())})
        staying = table.select(columns).take(rows)
        yield pa.table(dict(zip([*places.column_names, *columns], [*places.columns, *staying.columns], strict=True)))


def write_batches(tables: Iterable[pa.Table], path: Path) -> None:
    """Write one record batch for each table, one after the other; there is at least one."""
    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for table in tables:
            writer = writer or pa.ipc.new_file(sink, table.schema)
            writer.write_table(table.combine_chunks())
        assert writer is not None
        writer.close()


def read_batches(gathered: Artifact, bundles: Sequence[Bundle]) -> Iterator[pa.Table]:
    """The rows of all bundles, by shard; only what is used of them is read from the disk."""
    for bundle in bundles:
        reader = pa.ipc.open_file(pa.memory_map(str(gathered.path(bundle.file))))
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])

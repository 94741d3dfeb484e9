"""Columns of rows that the index does not hold, from the tables of the steps before it, shard by shard."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pipeline.data.mends import repair_hint
from pipeline.data.pairs import cast_column
from pipeline.data.shard_tables import read_schema, read_table
from pipeline.errors import DataError
from pipeline.workspace.files import is_remote
from pipeline.workspace.store import Artifact

compute: Any = pyarrow.compute  # its functions are made when it is imported, and have no types

_CACHED_SHARDS = 256
_THREADS = 16  # an object store answers many requests at a time
_SUFFIX = ".parquet"


class StoredColumns:
    """Reads columns of rows by shard and key; the columns of the last shards stay in memory.

    Args:
        artifacts: Steps that write a table ``<shard>.parquet`` with a column ``key`` for each shard. A column that
            several of them have is read from the first.
        shard: The name of a shard, whose tables say which columns there are; the other shards have the same.
    """

    def __init__(self, artifacts: Sequence[Artifact], shard: str) -> None:
        self._artifacts = artifacts
        self._shard = shard
        self._read = functools.lru_cache(_CACHED_SHARDS)(self._read_columns)

    @functools.cached_property
    def fields(self) -> dict[str, pa.DataType]:
        """Type of every column of one value, by name."""
        return {name: kind for _, schema in reversed(self._schemas) for name, kind in schema.items()}

    @functools.cached_property
    def _schemas(self) -> list[tuple[Artifact, dict[str, pa.DataType]]]:
        schemas: list[tuple[Artifact, dict[str, pa.DataType]]] = []
        for artifact in self._artifacts:
            table = f"{self._shard}{_SUFFIX}"
            if not artifact.exists(
                table
            ):  # its files were moved away; filters by the others' columns need none of them
                continue
            schema = read_schema(artifact.ranged(table))
            columns = {field.name: field.type for field in schema if not pa.types.is_nested(field.type)}
            schemas.append((artifact, columns))
        return schemas

    def take(self, shards: Sequence[str], keys: Sequence[str], names: Sequence[str]) -> pa.Table:
        """The columns ``names`` of rows (shard, key), in their order.

        Raises:
            DataError: If a table is damaged, or has no such row; names shard and key.
        """
        order: dict[str, list[int]] = {}
        for place, shard in enumerate(shards):
            order.setdefault(shard, []).append(place)
        own_keys = [[keys[place] for place in places] for places in order.values()]
        read = functools.partial(self._rows, names=names)
        if len(order) > 1 and any(is_remote(artifact.uri) for artifact, _ in self._schemas):
            with ThreadPoolExecutor(_THREADS) as threads:
                parts = list(threads.map(read, order, own_keys))
        else:
            parts = list(map(read, order, own_keys))
        places = pa.array([place for places in order.values() for place in places], pa.int64())
        table = pa.concat_tables(parts, promote_options="permissive") if parts else self._empty(names)
        return table.take(compute.sort_indices(places))

    def _rows(self, shard: str, keys: Sequence[str], names: Sequence[str]) -> pa.Table:
        columns: dict[str, Any] = {}
        for number, (artifact, schema) in enumerate(self._schemas):
            own = tuple(name for name in names if name in schema and name not in columns)
            if not own:
                continue
            table, mend = self._read(number, shard, own)
            rows = compute.index_in(pa.array(keys, pa.string()), value_set=table.column("key"))
            if rows.null_count:
                missing = keys[rows.is_null().index(True).as_py()]
                raise DataError(f"shard {shard}: key {missing}: no such row in {artifact.uri}; {mend}")
            columns |= {name: table.column(name).take(rows) for name in own}
        return pa.table({name: columns[name] for name in names})

    def _read_columns(self, number: int, shard: str, names: tuple[str, ...]) -> tuple[pa.Table, str]:
        """Columns of a shard's table in one of the artifacts, and what to do if they are wrong."""
        file = self._schemas[number][0].ranged(f"{shard}{_SUFFIX}")
        return read_table(file, list(dict.fromkeys(["key", *names]))).combine_chunks(), repair_hint(file)

    def _empty(self, names: Sequence[str]) -> pa.Table:
        return pa.table({name: pa.array([], self.fields[name]) for name in names})


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type for a column that two sources have: that of both, the wider of two numbers, else text."""
    fields = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def as_type(column: Any, kind: pa.DataType) -> Any:
    """A column of a source in the common type of all of them."""
    return cast_column(column, kind) if pa.types.is_string(kind) else column.cast(kind, safe=False)

"""The list of pairs that the pairs step writes, in parts, and its reader.

A part is a Parquet file of ``uid``, ``url``, ``caption``, ``split`` and the other columns that the recipe names. The
index, ``pairs.json``, holds the rows of each part and the types of the columns: parts whose lists differ in the type of
a column are read with one type.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.rows import pairs_schema, require_columns
from pipeline.errors import DataError
from pipeline.workspace.store import Artifact

INDEX = "pairs.json"
ROW_GROUP_ROWS = 10_000
_TYPES = {"int64": pa.int64(), "double": pa.float64(), "string": pa.string(), "bool": pa.bool_()}


@dataclass(frozen=True)
class Part:
    """One file of the list."""

    name: str
    """Name of the part; its file is ``<name>.parquet``."""
    num_rows: int
    """Rows of the file."""
    list_number: int = 0
    """Which of the recipe's lists they are of, from 0."""


class Pairs:
    """Reads the rows of a finished list by their number; holds no rows.

    Args:
        artifact: The artifact of the pairs step.

    Raises:
        DataError: If the index is missing or malformed.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        index = artifact.read_json(INDEX)
        try:
            parts = index["parts"]
            self._parts = [Part(part["name"], int(part["rows"]), int(part.get("list", 0))) for part in parts]
            self._types = {str(name): _TYPES[kind] for name, kind in index["columns"]}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.where}: malformed ({error!r}); run the pairs step again") from None
        self._starts = [0, *accumulate(part.num_rows for part in self._parts)]

    @property
    def where(self) -> str:
        """The index, for messages."""
        return f"{self._artifact.uri}/{INDEX}"

    @property
    def parts(self) -> list[Part]:
        """The parts, in order."""
        return list(self._parts)

    def part(self, name: str) -> pa.Table:
        """All rows of one part.

        Raises:
            DataError: As ``read``.
        """
        place = [part.name for part in self._parts].index(name)
        return self.read(self._starts[place], self._starts[place + 1], self.columns)

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return self._starts[-1]

    @property
    def list_rows(self) -> list[int]:
        """Rows of each list; the rows of a list follow one another, and the lists as the recipe names them."""
        rows = [0] * (1 + max((part.list_number for part in self._parts), default=0))
        for part in self._parts:
            rows[part.list_number] += part.num_rows
        return rows

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [*pairs_schema().names, *self._types]

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows ``start`` .. ``stop`` - 1 of the list; only the row groups that contain them are read.

        Raises:
            DataError: If the list lacks a column, or a part is missing or damaged.
        """
        require_columns(self.columns, columns, where=self.where)
        empty = self._schema(columns).empty_table()
        return pa.concat_tables([empty, *self._tables(start, stop, columns)]).combine_chunks()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows, ``ROW_GROUP_ROWS`` at a time at most.

        Raises:
            DataError: As ``read``.
        """
        require_columns(self.columns, columns, where=self.where)
        yield from self._tables(0, self.num_rows, columns)

    def _schema(self, columns: Sequence[str]) -> pa.Schema:
        types = {field.name: field.type for field in pairs_schema()} | self._types
        return pa.schema([(name, types[name]) for name in columns])

    def _tables(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        schema = self._schema(columns)
        for part, first in zip(self._parts, self._starts, strict=False):
            if first >= stop or first + part.num_rows <= start:
                continue
            path = self._artifact.path(f"{part.name}.parquet")
            try:
                with pq.ParquetFile(path) as parquet:
                    group_start = first
                    for group in range(parquet.num_row_groups):
                        num_rows = parquet.metadata.row_group(group).num_rows
                        low, high = max(start, group_start), min(stop, group_start + num_rows)
                        if low < high:
                            table = parquet.read_row_group(group, columns=list(columns)).select(list(columns))
                            # Types only widen; a large integer becomes the nearest float.
                            yield table.slice(low - group_start, high - low).cast(schema, safe=False)
                        group_start += num_rows
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{path}: damaged ({error}); run the pairs step again") from error


def write_index(artifact: Artifact, parts: Sequence[Part], schemas: Sequence[pa.Schema]) -> None:
    """Write the index of a list.

    Args:
        artifact: The artifact of the pairs step.
        parts: The parts, in order.
        schemas: Their schemas.
    """
    index = {
        "parts": [
            {"name": part.name, "rows": part.num_rows} | ({"list": part.list_number} if part.list_number else {})
            for part in parts
        ],
        "columns": [[name, str(kind)] for name, kind in common_types(schemas).items()],
    }
    artifact.write_json(INDEX, index)


def common_types(schemas: Sequence[pa.Schema]) -> dict[str, pa.DataType]:
    """One type for each column that not every list has: int64, double, bool, or string where only text holds all."""
    kinds: dict[str, set[str]] = {}
    for schema in schemas:
        for name in schema.names:
            if name not in pairs_schema().names:
                kinds.setdefault(name, set()).add(str(plain_type(schema.field(name).type)))
    return {name: _common_type(kind - {"null"}) for name, kind in kinds.items()}


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type in which a list's column is stored: int64, double, bool, null, or string."""
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return kind
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else pa.string()


def cast_column(column: Any, kind: Any) -> Any:
    """A column in another type; what has no text of its own (lists, records) becomes JSON.

    Integers beyond 2^53 become the nearest float where another file of the list has floats.
    """
    try:
        return column.cast(kind, safe=not pa.types.is_floating(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values: list[Any] = column.to_pylist()
        return pa.array([one if one is None else json.dumps(one, sort_keys=True, default=str) for one in values], kind)


def _common_type(kinds: set[str]) -> Any:
    if len(kinds) == 1:
        return cast("dict[str, Any]", _TYPES)[next(iter(kinds))]
    return pa.float64() if kinds == {"int64", "double"} else pa.string()

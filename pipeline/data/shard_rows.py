"""Which rows and columns of the pairs a shard has, before anything is fetched.

The driver of a download asks for them, too: this module loads nothing that fetches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.data.pairs import Pairs
from pipeline.data.rows import numbered_names, require_columns
from pipeline.recipe.sections import DownloadConfig

_PASSED_THROUGH = ("uid", "split")


def shard_names(list_rows: Sequence[int], samples_per_shard: int) -> list[str]:
    """Names of the shards that hold the rows of some lists."""
    return numbered_names(sum(-(-rows // samples_per_shard) for rows in list_rows))


@dataclass(frozen=True)
class ShardSpan:
    """The rows of one shard in the list of pairs; they are of one list, so that a training finds the rows of each."""

    start: int
    stop: int
    list_number: int

    @classmethod
    def of(cls, shard: str, list_rows: Sequence[int], samples_per_shard: int) -> ShardSpan:
        """The rows of a shard by its name, which is its number."""
        number, start = int(shard), 0
        for list_number, rows in enumerate(list_rows):
            num_shards = -(-rows // samples_per_shard)
            if number < num_shards:
                first = start + number * samples_per_shard
                return cls(first, min(start + rows, first + samples_per_shard), list_number)
            number, start = number - num_shards, start + rows
        raise ValueError(f"no shard {shard} of {sum(list_rows)} rows")


def check_columns(config: DownloadConfig, columns: list[str], where: str) -> None:
    """Refuse columns that the pairs do not have.

    Raises:
        DataError: If the pairs do not have a column.
    """
    require_columns(
        columns, [*_PASSED_THROUGH, "url", "caption", *config.extra_columns, *_read_only(config)], where=where
    )


def read_rows(pairs: Pairs, shard: str, config: DownloadConfig) -> pa.Table:
    """Read the rows of one shard; only the row groups that contain them are read.

    Args:
        pairs: The list of pairs.
        shard: Shard name.
        config: The recipe's section.
    """
    span = ShardSpan.of(shard, pairs.list_rows, config.samples_per_shard)
    columns = [*_PASSED_THROUGH, *config.extra_columns, *sorted(_read_only(config)), "caption", "url"]
    return pairs.read(span.start, span.stop, list(dict.fromkeys(columns)))


def stored_columns(rows: pa.Table, config: DownloadConfig) -> pa.Table:
    """The columns that go into the shard, those that JSON does not have as text."""
    names = [name for name in rows.column_names if name not in _read_only(config)]
    rows = rows.select(names)
    for index, name in enumerate(names):
        kind = rows.schema.field(name).type
        if not (
            pa.types.is_string(kind)
            or pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
        ):
            texts = [None if value is None else str(value) for value in rows.column(name).to_pylist()]
            rows = rows.set_column(index, name, pa.array(texts, pa.string()))
    return rows


def _read_only(config: DownloadConfig) -> set[str]:
    """Columns of the pairs that are read and not stored."""
    return {config.blur_column, config.hash_column} - {*config.extra_columns, *_PASSED_THROUGH, "url", "caption", ""}

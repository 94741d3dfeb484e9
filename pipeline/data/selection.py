"""Which rows stay after the filter steps, for the steps that read rows after them.

``filter`` labels the good rows of the download, and ``filter_embeddings`` labels the rows that are embedded, which are
those that stayed. So the later of the two says for every row whether it stays.
"""

import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pipeline.data.shard_tables import read_table
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

LABEL_COLUMNS = ("uid", "key", "reason", "detail", "same_as", "same_as_shard")
"""Columns of ``labels/<shard>.parquet``, all of them strings: one row for each labelled one, sorted by key. ``reason``
is empty if the row stays; ``same_as`` is the uid of the row that stays in the place of a duplicate."""


class Selection:
    """The rows that stay, by shard and uid.

    Args:
        labels: Artifact of a filter step.
    """

    def __init__(self, labels: Artifact) -> None:
        self._labels = labels

    def num_rows(self, shard: str, split: str) -> int | None:
        """The rows of a shard that stay in a split, by the record of its labels.

        None if the record does not say it: an earlier release wrote it, or rows of the shard were forgotten.
        """
        record = self._records.get(shard)
        return None if record is None else record.rows_of(split)

    @functools.cached_property
    def _records(self) -> dict[str, ShardRecord]:
        return self._labels.shard_records()

    def of(self, table: pa.Table, shard: str) -> pa.Table:
        """The rows of a shard's table that stay.

        Args:
            table: Any rows of the shard, with a column ``uid``.
            shard: Name of the shard.

        Raises:
            DataError: If the labels of the shard are missing or damaged.
        """
        labels = read_table(self._labels.path(label_file(shard)), ["uid", "reason"])
        staying = labels.filter(pc.equal(labels["reason"], ""))["uid"]
        return table.filter(pc.is_in(table["uid"], value_set=staying.combine_chunks()))


def label_file(shard: str) -> str:
    """Name of the labels of a shard in the artifact of a filter step."""
    return f"labels/{shard}.parquet"


def selection_of(inputs: Mapping[str, Artifact]) -> Selection | None:
    """The selection among the inputs of a step, or None if the recipe filters nothing."""
    labels = inputs.get("filter_embeddings") or inputs.get("filter")
    return None if labels is None else Selection(labels)


def embeddings_of(inputs: Mapping[str, Artifact]) -> Artifact:
    """The embeddings of the rows that stay: ``filter_embeddings`` writes them again in the layout of ``embed``."""
    return inputs.get("filter_embeddings") or inputs["embed"]

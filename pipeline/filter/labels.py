"""The labels of a filter step: why each row is left out, and the files between its passes.

A filter step makes several passes over its shards. Each pass commits its files shard by shard, so that a killed step
continues, and a pass holds one shard at a time, or one part of the search for duplicates.
Legend: N rows of a shard, M rows that were found again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.selection import LABEL_COLUMNS
from pipeline.errors import DataError
from pipeline.workspace.hashing import HashedFile

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
_LABELS = pa.schema([(name, pa.string()) for name in LABEL_COLUMNS])
_DUPLICATES = pa.schema(
    [
        ("number", pa.int32()),
        ("row", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("same_as", pa.string()),
        ("same_as_number", pa.int32()),
        ("same_as_row", pa.int32()),
    ]
)
_GROUP_ROWS = 1 << 14


class Labels:
    """Why the rows of one shard are left out; the first rule that a row breaks gives its reason.

    Args:
        num_rows: N.
    """

    def __init__(self, num_rows: int) -> None:
        self.reasons = ["" for _ in range(num_rows)]
        self.details = ["" for _ in range(num_rows)]

    def stays(self) -> Bools:
        """The rows that break no rule so far, (N,)."""
        return np.array([not reason for reason in self.reasons], np.bool_)

    def leave_out(self, breaks: Iterable[bool], reason: str, detail: Callable[[int], str]) -> None:
        """Give a reason to those rows of ``breaks`` (N,) that have none yet.

        Args:
            breaks: Whether each row breaks the rule.
            reason: Name of the rule.
            detail: What is wrong with a row, by its number, for people.
        """
        for row, is_broken in enumerate(breaks):
            if is_broken and not self.reasons[row]:
                self.reasons[row], self.details[row] = reason, detail(row)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Numbers of rows: ``in`` = ``ok`` + each reason."""
    counts = Counter(reasons)
    num_staying = counts.pop("", 0)
    return {"in": num_staying + counts.total(), "ok": num_staying} | dict(sorted(counts.items()))


def count_splits(measures: pa.Table, stays: Bools) -> dict[str, int]:
    """Rows that stay by split, for the shard's record; empty if an earlier release measured the shard without it.

    Args:
        measures: The shard's rows.
        stays: The rows that stay, (N,).
    """
    if "split" not in measures.column_names:
        return {}
    return dict(sorted(Counter(measures["split"].filter(pa.array(stays)).to_pylist()).items()))


def describe(counts: dict[str, int]) -> str:
    """One line for people: how many rows are left out, and for what reasons, the most frequent first."""
    reasons = Counter({name: count for name, count in counts.items() if name not in {"in", "ok"}})
    if not reasons.total():
        return ""
    return f"{reasons.total():,} left out: " + ", ".join(f"{count:,} {name}" for name, count in reasons.most_common())


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table that a later pass reads by memory map."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def map_table(path: Path) -> pa.Table:
    """Open a table of ``write_table``; only what is used of it is read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def table_of(content: bytes) -> pa.Table:
    """The table of a file of ``write_table`` that was read whole."""
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()


def duplicates_table(rows: pa.Table, again: Rows, first: Rows, reason: str, details: Sequence[str] = ()) -> pa.Table:
    """What a search found among some rows; in columns, because a part may find a million of them.

    Args:
        rows: ``number`` of the shard, ``row`` in it, and ``uid`` of the rows that were searched.
        again: Positions in ``rows`` of those that were found again, (M,).
        first: Positions of the first row of each, (M,).
        reason: Why they are left out.
        details: More about each, (M,); by default nothing.
    """
    places = {name: rows[name].take(pa.array(first)) for name in ("number", "row", "uid")}
    columns = [
        rows["number"].take(pa.array(again)),
        rows["row"].take(pa.array(again)),
        pa.repeat(pa.scalar(reason), len(again)),
        pa.array(details, pa.string()) if details else pa.repeat(pa.scalar(""), len(again)),
        *(places[name] for name in ("uid", "number", "row")),
    ]
    return pa.table(columns, names=_DUPLICATES.names).cast(_DUPLICATES)


def sorted_duplicates(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of ``duplicates_table`` as one, sorted by shard and row."""
    joined = pa.concat_tables([_DUPLICATES.empty_table(), *tables])
    return joined.sort_by([("number", "ascending"), ("row", "ascending")])


def write_duplicates(table: pa.Table, path: Path) -> None:
    """Write ``sorted_duplicates``, or the findings of a bundle, so that the rows of one shard can be read alone."""
    pq.write_table(table, path, row_group_size=_GROUP_ROWS)


def duplicates_of_shard(findings: Path, number: int) -> list[dict[str, Any]]:
    """Why rows of one shard are left out, from the findings of its bundle."""
    return pq.read_table(findings, filters=[("number", "=", number)]).to_pylist()


def write_labels(
    measures: pa.Table, duplicates: Iterable[dict[str, Any]], path: Path, *, where: str
) -> tuple[dict[str, int], Bools]:
    """Write ``labels/<shard>.parquet``.

    Args:
        measures: Columns ``uid``, ``key``, ``reason`` and ``detail`` of the shard's rows, sorted by key.
        duplicates: Rows to leave out beside those that have a reason, see ``duplicates_of_shard``.
        path: File to write.
        where: Step and shard, for messages.

    Returns:
        Numbers of rows by reason, and the rows that stay, (N,).

    Raises:
        DataError: If a duplicate is no row of the shard.
    """
    columns = {name: measures[name].to_pylist() for name in ("uid", "key", "reason", "detail")}
    columns |= {name: ["" for _ in columns["uid"]] for name in ("same_as", "same_as_shard")}
    for entry in duplicates:
        row = entry["row"]
        if row >= len(columns["uid"]):
            raise DataError(f"{where}: row {row} is a duplicate but there are {len(columns['uid'])} rows")
        if not columns["reason"][row]:
            for name in ("reason", "detail", "same_as", "same_as_shard"):
                columns[name][row] = entry[name]
    with HashedFile(path) as stream:
        pq.write_table(pa.table(columns, schema=_LABELS), stream)
    return count_reasons(columns["reason"]), np.array([not reason for reason in columns["reason"]], np.bool_)

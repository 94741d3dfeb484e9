"""Rows of forgotten pairs: they keep their place in a table, and hold nothing."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from pipeline.data.shard_writer import FAILED_TO_DOWNLOAD
from pipeline.workspace.forgotten import CAUSE, Forgotten

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

COLUMNS_THAT_STAY = frozenset({"key", "split"})
"""Columns of an empty row that keep their value."""
BLANK = {"uid": "", "url": "", "caption": "", "status": FAILED_TO_DOWNLOAD, "error_message": CAUSE}
"""What an empty row has in the columns that are never null; its other columns are null."""


def blank_rows(table: pa.Table, forgotten: Forgotten) -> pa.Table:
    """A list of pairs, or the table of a shard, with the rows of forgotten pairs empty.

    Args:
        table: Columns ``uid``, ``url`` and any others.
        forgotten: What is forgotten.
    """
    is_forgotten = are_forgotten(table, forgotten)
    if not is_forgotten.any():
        return table
    mask = pa.array(is_forgotten)
    for place, field in enumerate(table.schema):
        if field.name not in COLUMNS_THAT_STAY:
            value = pa.scalar(BLANK.get(field.name), field.type)
            table = table.set_column(place, field, pc.if_else(mask, value, table.column(place)))
    return table


def are_forgotten(table: pa.Table, forgotten: Forgotten) -> NDArray[np.bool_]:
    """Whether the pair of each row of a table with ``uid`` and ``url`` was forgotten: (rows,)."""
    if not forgotten.entries:
        return np.zeros(table.num_rows, np.bool_)
    uids, urls = (table.column(name).to_pylist() for name in ("uid", "url"))
    return np.array(forgotten.has_rows(uids, urls), np.bool_)


def are_blank(table: pa.Table) -> NDArray[np.bool_]:
    """Whether each row of a table is empty: (rows,)."""
    return np.asarray(pc.equal(table.column("uid"), "").to_numpy())


def num_blank(table: pa.Table) -> int:
    """Number of empty rows."""
    return pc.sum(pc.equal(table.column("uid"), "")).as_py() or 0

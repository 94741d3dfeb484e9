"""The parts of a segment: consecutive shards, each part made by one process from one pass over its shards.

Legend: Q queries, D features.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.rows import row_id
from pipeline.data.vectors import RowGroups, check_places, to_unit
from pipeline.retrieve import kinds
from pipeline.retrieve.embedded import EmbeddedShards, Floats, Ids
from pipeline.retrieve.rows import are_among, write_array, write_rows
from pipeline.retrieve.segment import MODALITIES, Modality
from pipeline.retrieve.takedown import Takedown
from pipeline.retrieve.tune import NUM_NEAREST
from pipeline.workspace.store import LIVE, Artifact

_MIN_PART_ROWS, _MAX_PARTS = 65_536, 256


def shards_of_parts(segment: str, embedded: EmbeddedShards) -> dict[str, range]:
    """The shards of each part, by its name, in order."""
    starts = embedded.starts
    rows = max(_MIN_PART_ROWS, -(-int(starts[-1]) // _MAX_PARTS))
    shards, first = dict[str, range](), 0
    for last in range(1, len(starts)):
        if starts[last] - starts[first] >= rows or last == len(starts) - 1:
            shards[f"{LIVE}{segment}/part-{len(shards):06d}"] = range(first, last)
            first = last
    return shards


@dataclass(frozen=True)
class PartPlan:
    """What the first stage chose, for every part."""

    chosen: list[kinds.Kind]
    """The kinds to try."""
    coders: dict[tuple[Modality, str], Any]
    """The trained index of each kind with lists, without rows."""
    queries: Floats
    """(Q, D)"""
    query_rows: Ids
    """(Q,) rows of all shards that the queries are."""
    deleted: Ids
    """Sorted ids of rows to leave out."""
    takedown: Takedown
    """Rows that no index of the workspace may have."""
    on_gpu: bool
    """Whether rows are assigned to lists on a GPU."""


class PartWriter:
    """Collects what a segment needs of some shards: codes of each kind, rows, ids, the queries' exact neighbours.

    Args:
        plan: What the first stage chose.
        embedded: The shards.
    """

    def __init__(self, plan: PartPlan, embedded: EmbeddedShards) -> None:
        self._plan = plan
        self._embedded = embedded
        listed: list[kinds.Kind] = [kind for kind in plan.chosen if kinds.is_listed(kind)]
        self._assign = {
            modality: kinds.assigner(plan.coders[modality, listed[0]], on_gpu=plan.on_gpu)
            for modality in (MODALITIES if listed else ())
        }
        self.counts = Counter[str]({"in": 0, "ok": 0})
        self._tables, self._ids, self._places = list[pa.Table](), list[Ids](), list[Ids]()
        self._groups = list[NDArray[np.int64]]()
        self._codes: dict[tuple[Modality, str], list[NDArray[Any]]] = {}
        shape = len(plan.queries), NUM_NEAREST
        none = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        self._nearest: dict[Modality, tuple[Floats, Ids]] = dict.fromkeys(MODALITIES, none)

    def add(self, shard: int) -> None:
        """Take the rows of one shard."""
        start, path = int(self._embedded.starts[shard]), self._embedded.path(shard)
        vectors = self._embedded.read(shard, path)
        groups = RowGroups.of_file(path, file=shard, first_row=start)
        check_places(groups, vectors, path)
        self._groups.append(np.column_stack([groups.first_rows, groups.files, groups.offsets]))
        ids = np.array([row_id(uid) for uid in vectors.table.column("uid").to_pylist()], np.int64)
        rows = np.flatnonzero(~are_among(ids, self._plan.deleted) & ~self._plan.takedown.has(vectors.table))
        self.counts.update({"in": len(ids), "ok": len(rows)})
        if len(rows) < len(ids):
            self.counts["deleted"] += len(ids) - len(rows)
        self._places.append(start + rows)
        self._ids.append(ids[rows])
        name = pa.array([self._embedded.shards[shard][1]] * len(ids), pa.string())
        self._tables.append(vectors.table.append_column("shard", name).take(pa.array(rows)))
        for modality in MODALITIES:
            self._code(modality, start + rows, to_unit(getattr(vectors, f"z_{modality}")[rows]))

    def _code(self, modality: Modality, places: Ids, rows: Floats) -> None:
        lists = self._assign[modality](rows) if self._assign else np.zeros(len(rows), np.int64)
        self._codes.setdefault((modality, "lists"), []).append(lists)
        for kind in self._plan.chosen:
            key = modality, code_name(kind)
            if kinds.is_listed(kind):
                self._codes.setdefault(key, []).append(kinds.encode(self._plan.coders[modality, kind], rows, lists))
            elif kind == "flat" or "flat" not in self._plan.chosen:
                self._codes.setdefault(key, []).append(rows)
        if not len(rows):
            return
        scores, numbers = kinds.nearest(self._plan.queries, rows, min(NUM_NEAREST + 1, len(rows)))
        nearest = places[numbers]
        scores = np.where(nearest == self._plan.query_rows[:, None], -np.inf, scores)
        self._nearest[modality] = nearer(self._nearest[modality], (scores, nearest))

    def write(self, output: Artifact, name: str) -> None:
        """Write everything, with the codes sorted by list.

        Args:
            output: The index.
            name: Name of the part.
        """
        tables = [table for table in self._tables if table.num_rows] or self._tables[:1]
        schema = tables[0].schema
        with output.write(f"{name}.rows.arrow") as path:
            write_rows(path, (batch for table in tables for batch in table.to_batches()), schema)
        _write(output, f"{name}.ids", np.concatenate(self._ids))
        _write(output, f"{name}.places", np.concatenate(self._places))
        _write(output, f"{name}.groups", np.concatenate(self._groups))
        for modality in MODALITIES:
            _write(output, f"{name}.{modality}.nearest", self._nearest[modality][0])
            _write(output, f"{name}.{modality}.nearest_places", self._nearest[modality][1])
            lists = np.concatenate(self._codes[modality, "lists"])
            order = np.argsort(lists, kind="stable")
            if self._assign:
                num_lists = int(next(iter(self._plan.coders.values())).nlist)
                _write(output, f"{name}.{modality}.sizes", np.bincount(lists, minlength=num_lists))
                _write(output, f"{name}.{modality}.positions", order)
            for kind in self._plan.chosen:
                parts = self._codes.pop((modality, code_name(kind)), None)
                if parts is not None:
                    values = np.concatenate(parts)
                    values = values[order] if kinds.is_listed(kind) else values
                    _write(output, f"{name}.{modality}.{code_name(kind)}", values)


def nearer(one: tuple[Floats, Ids], other: tuple[Floats, Ids]) -> tuple[Floats, Ids]:
    """The ``NUM_NEAREST`` rows of largest similarity among two sets, falling."""
    scores, rows = np.concatenate([one[0], other[0]], axis=1), np.concatenate([one[1], other[1]], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :NUM_NEAREST]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def code_name(kind: kinds.Kind) -> str:
    """The kinds that hold the vectors themselves share them."""
    return kind if kinds.is_listed(kind) else "vectors"


def _write(output: Artifact, name: str, values: NDArray[Any]) -> None:
    with output.write(f"{name}.npy") as path:
        write_array(path, [values], values.shape, values.dtype)

"""The download step of shards that a person has already: they are taken in as they are, nothing is downloaded."""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.errors import DataError
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob, map_shards, total_counts
from pipeline.workspace.forgotten import CAUSE, Forgotten
from pipeline.workspace.manifest import ShardRecord


def take_in_shards(context: StepContext) -> StepResult:
    """Record every shard of the source with a table of its rows; the tars stay where they are.

    Raises:
        DataError: If too few pictures can be decoded.
    """
    from pipeline.data.pairs import Pairs
    from pipeline.data.sources import tars_of

    pairs, resources = Pairs(context.inputs["pairs"]), context.recipe.download.resources
    tars = tars_of(context.recipe.pairs, pairs.parts)
    shards = [part.name for part in pairs.parts if part.num_rows and part.name in tars]
    records = map_shards(context, ShardJob(TakeInWorker, shards, pairs.num_rows, resources))
    counts = total_counts(records)
    causes = sum((Counter(record.causes) for record in records), Counter[str]())
    require_pictures(counts, causes, resources.min_success_prob)
    metrics = {"success": counts["ok"] / max(1, counts["in"]), "failures": dict(causes)}
    return StepResult(counts=counts, metrics=metrics, num_workers=resources.num_workers)


def require_pictures(counts: Mapping[str, int], causes: Counter[str], min_success_prob: float) -> None:
    """Refuse tars of which too few pictures can be decoded; forgotten pairs do not count.

    Raises:
        DataError: Names the causes.
    """
    num_rows = counts["in"] - causes[CAUSE]
    if not num_rows or counts["ok"] >= max(1, min_success_prob * num_rows):
        return
    named = "; ".join(f"{count} x {cause}" for cause, count in causes.most_common() if cause != CAUSE)
    raise DataError(
        f"download: only {counts['ok']} of {num_rows} pictures of the tars can be decoded "
        f"(download.resources.min_success_prob is {min_success_prob}): {named}. Bring whole tars, and run again"
    )


class TakeInWorker:
    """Takes in one shard after another; a picture that takes its decoder down is a failed row."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.data.decoders import Measures
        from pipeline.data.pairs import Pairs
        from pipeline.data.sources import tars_of

        self._output = context.output
        self._forgotten = Forgotten.read(context.root)
        self._pairs = Pairs(context.inputs["pairs"])
        self._tars = tars_of(context.recipe.pairs, self._pairs.parts)
        self._lists = {part.name: part.list_number for part in self._pairs.parts}
        self._stack = contextlib.ExitStack()  # left open: a worker's process ends, and its decoders with it
        self._measures = self._stack.enter_context(Measures(context.recipe.download))

    def __call__(self, shard: str) -> ShardRecord:
        """Take in one shard and commit it."""
        from pipeline.data.shard_tables import split_counts
        from pipeline.data.tars import take_in

        start, rows = time.monotonic(), self._pairs.part(shard)
        taken_in = take_in(self._tars[shard].uri, rows, shard, self._output, self._measures)
        files = dict(taken_in.files)
        if self._forgotten.entries and not self._output.is_link(f"{shard}.tar"):
            files |= self._leave_out_forgotten(shard)
        wall_s = round(time.monotonic() - start, 3)
        splits = split_counts(self._output.path(f"{shard}.parquet"))
        record = ShardRecord(
            shard=shard,
            counts=taken_in.counts,
            files=files,
            causes=taken_in.causes,
            splits=splits,
            list_number=self._lists[shard],
            wall_s=wall_s,
        )
        self._output.commit_shard(record)
        return record

    def close(self) -> None:
        """End its decoders, where it is not the process that ends."""
        self._stack.close()

    def _leave_out_forgotten(self, shard: str) -> dict[str, dict[str, Any]]:
        """Take forgotten pairs out of the copy of a tar; returns size and SHA-256 of what is written anew, by name."""
        import pyarrow.parquet as pq

        from pipeline.data.tar_copies import leave_out_forgotten
        from pipeline.workspace.hashing import HashedFile

        names = [f"{shard}.tar", f"{shard}.parquet"]
        table = leave_out_forgotten(self._output, shard, pq.read_table(self._output.path(names[1])), self._forgotten)
        with self._output.write(names[1]) as path, HashedFile(path) as stream:
            pq.write_table(table, stream)
        return {name: self._output.describe(name) for name in names}

"""The step ``filter`` on Ray, and what it shares with ``filter_embeddings``.

Every pass is a pool of workers that commits shard by shard under ``live/``.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline.data.arrays import save_array
from pipeline.data.selection import label_file
from pipeline.errors import StepError
from pipeline.filter.duplicates import Part, find_duplicates, search_parts
from pipeline.filter.examples import write_examples
from pipeline.filter.gathered import Bundle, gather_measures, plan_bundles, write_batches
from pipeline.filter.labels import (
    count_reasons,
    count_splits,
    describe,
    duplicates_of_shard,
    map_table,
    write_duplicates,
    write_labels,
    write_table,
)
from pipeline.filter.left_out import find_left_out, findings_of_bundle, starts_of
from pipeline.recipe.sections import FilterConfig
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.data import commit_shard
from pipeline.runtime.pool import ShardJob, ShardWorker, map_shards, total_counts
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import LIVE, Artifact

MEASURES, GATHERED, RESULTS = (f"{LIVE}{name}" for name in ("measures", "gathered", "results"))
"""Folders of the passes inside the artifact: what each row says about itself, what a search reads, what it finds."""
LEFT_OUT, FINDINGS = (f"{LIVE}{name}" for name in ("left_out", "findings"))
"""What was found, put together: which rows are left out, and why, by bundle of shards."""
ALL = "all"
"""Name of the only file of a pass."""
ONE_PART = {"in": 1, "ok": 1}
"""Counts of a pass over parts, not rows."""
Place = tuple[str, int]
"""File with the findings of a shard, and the shard's number in it."""


def part_of(output: Artifact, folder: str) -> Artifact:
    """The folder of one pass."""
    return Artifact(f"{output.uri}/{folder}")


class Passes:
    """The passes of one step, one after the other.

    Args:
        context: The step.
        shards: Names of the shards.
        num_rows: Rows of all shards.
    """

    def __init__(self, context: StepContext, shards: Sequence[str], num_rows: int) -> None:
        self._context = context
        self._shards = shards
        self._num_rows = num_rows
        self._section: Any = getattr(context.recipe, context.step.name)

    def run(
        self, worker: Callable[..., Callable[[str], ShardRecord]], folder: str, title: str, names: Sequence[str] = ()
    ) -> list[ShardRecord]:
        """Make the shards of one pass, or of ``names``, that are not committed yet; ``worker`` takes the step."""
        output = part_of(self._context.output, folder) if folder else self._context.output
        counts = Counter[str]()

        def add(records: list[ShardRecord]) -> None:
            for record in records:
                counts.update(record.counts)

        job = ShardJob(
            cast("type[ShardWorker]", worker),
            names or self._shards,
            len(names) or self._num_rows,
            self._section.resources,
            unit="parts" if names else "rows",
            output=output,
            on_records=add,
            note=lambda: "; ".join(filter(None, [title, describe(counts)])),
        )
        return map_shards(self._context, job)

    def put_together(self, parts: Sequence[str], sizes: Sequence[int]) -> dict[str, Place]:
        """Put together what a search found, in two passes; returns where each shard's findings are.

        Args:
            parts: Names of the search's parts, in the order in which they count.
            sizes: Rows of each shard.
        """
        bundles = {bundle.name: bundle for bundle in plan_bundles(len(self._shards))}
        worker = partial(LeftOutWorker, parts=parts, sizes=sizes)
        self.run(worker, LEFT_OUT, "putting together what was found", [ALL])
        worker = partial(FindingsWorker, parts=parts, sizes=sizes, shards=self._shards, bundles=bundles)
        self.run(worker, FINDINGS, "putting together what was found", list(bundles))
        return {
            self._shards[number]: (f"{bundle.name}.parquet", number)
            for bundle in bundles.values()
            for number in range(bundle.first, bundle.stop)
        }

    def finish(self, records: list[ShardRecord]) -> StepResult:
        """Write the examples; the result of the step.

        Raises:
            StepError: If no row stays.
        """
        name, counts = self._context.step.name, total_counts(records)
        if counts.get("in") and not counts["ok"]:
            raise StepError(f"{name}: no row stays: {describe(counts)}; loosen [{name}] and run again")
        progress = Progress(self._context.output)
        progress.update(self._num_rows, self._num_rows, "rows", describe(counts), force=True)
        inputs, num_examples = self._context.inputs, self._section.num_examples
        if "download" in inputs:
            write_examples(self._context.output, inputs["download"], records, num_examples)
        else:  # imported embeddings, whose pictures are not here
            write_examples(self._context.output, inputs["embed"], records, num_examples, with_pictures=False)
        return StepResult(counts=counts, num_workers=self._section.resources.num_workers)


def run_filter(context: StepContext) -> StepResult:
    """Label the rows of the download by their captions, sizes, columns and pictures.

    Raises:
        ConfigError: If a rule cannot be applied.
        StepError: If no row stays.
    """
    download = context.inputs["download"].shard_records()
    passes = Passes(context, list(download), sum(record.counts["ok"] for record in download.values()))
    measures = passes.run(MeasureWorker, MEASURES, "measuring")
    num_staying, shards = total_counts(measures).get("ok", 0), list(download)
    parts = {part.name: part for part in search_parts(_section(context), num_staying)} if num_staying else {}
    places: dict[str, Place] = {}
    if parts:
        bundles = {bundle.name: bundle for bundle in plan_bundles(len(shards))}
        passes.run(partial(GatherWorker, shards=shards, bundles=bundles), GATHERED, "gathering", list(bundles))
        worker = partial(DuplicateWorker, bundles=list(bundles.values()), parts=parts)
        passes.run(worker, RESULTS, "searching duplicates", list(parts))
        places = passes.put_together(list(parts), [record.counts["in"] for record in measures])
    return passes.finish(passes.run(partial(LabelWorker, places=places), "", "labelling"))


def _section(context: StepContext) -> FilterConfig:
    section = context.recipe.filter
    assert section is not None
    return section


class PassWorker:
    """What the workers of all passes need."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.output = context.output

    def part(self, folder: str) -> Artifact:
        """The folder of one pass."""
        return part_of(self.output, folder)

    def commit_duplicates(self, folder: str, name: str, table: pa.Table, start: float) -> ShardRecord:
        """Write and commit what one part of a pass found."""
        output = self.part(folder)
        with output.write(f"{name}.parquet") as path:
            write_duplicates(table, path)
        return commit_shard(output, name, ONE_PART, [], start)

    def duplicates(self, place: Place | None) -> list[dict[str, Any]]:
        """What the search found of a shard; None: it found nothing."""
        return duplicates_of_shard(self.part(FINDINGS).path(place[0]), place[1]) if place else []


class MeasureWorker(PassWorker):
    """The first pass of ``filter``: what each row says about itself."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        from pipeline.filter.rules import RowRules

        self._rules = RowRules(_section(context))
        self._download = context.inputs["download"]

    def __call__(self, shard: str) -> ShardRecord:
        """Measure one shard of the download."""
        start, output = time.monotonic(), self.part(MEASURES)
        parquet = self._download.path(f"{shard}.parquet")
        table = self._rules(lambda: self._download.path(f"{shard}.tar"), parquet, shard)
        with output.write(f"{shard}.arrow") as path:
            write_table(table, path)
        return commit_shard(output, shard, count_reasons(table["reason"].to_pylist()), [], start)


class GatherWorker(PassWorker):
    """The second pass of ``filter``: what the search compares, of many shards in one file.

    Args:
        context: The step.
        shards: Names of all shards.
        bundles: The bundles, by name.
    """

    def __init__(self, context: StepContext, shards: Sequence[str], bundles: Mapping[str, Bundle]) -> None:
        super().__init__(context)
        self._shards = shards
        self._bundles = bundles

    def __call__(self, shard: str) -> ShardRecord:
        """Gather one bundle."""
        start, output, bundle = time.monotonic(), self.part(GATHERED), self._bundles[shard]
        with output.write(bundle.file) as path:
            tables = gather_measures(self.part(MEASURES), self._shards, bundle, _section(self.context))
            write_batches(tables, path)
        return commit_shard(output, shard, ONE_PART, [], start)


class DuplicateWorker(PassWorker):
    """The third pass of ``filter``: pictures that occur again.

    Args:
        context: The step.
        bundles: All bundles of gathered rows.
        parts: The parts of the search, by name.
    """

    def __init__(self, context: StepContext, bundles: Sequence[Bundle], parts: Mapping[str, Part]) -> None:
        super().__init__(context)
        self._bundles = bundles
        self._parts = parts

    def __call__(self, shard: str) -> ShardRecord:
        """Search one part."""
        start, section = time.monotonic(), _section(self.context)
        table = find_duplicates(self.part(GATHERED), self._bundles, self._parts[shard], section)
        return self.commit_duplicates(RESULTS, shard, table, start)


class LeftOutWorker(PassWorker):
    """Finds the rows that are left out, from what all parts of a search found.

    Args:
        context: The step.
        parts: Names of the parts.
        sizes: Rows of each shard.
    """

    def __init__(self, context: StepContext, parts: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__(context)
        self._parts = parts
        self._starts = starts_of(sizes)

    def __call__(self, shard: str) -> ShardRecord:
        """Find them all."""
        start, output = time.monotonic(), self.part(LEFT_OUT)
        is_out = find_left_out(self.part(RESULTS), self._parts, self._starts)
        with output.write(f"{shard}.npy") as path:
            save_array(path, is_out)
        return commit_shard(output, shard, ONE_PART, [], start)


class FindingsWorker(PassWorker):
    """Brings together what was found of many shards: one finding for each row that is left out.

    Args:
        context: The step.
        parts: Names of the search's parts, in the order in which they count.
        sizes: Rows of each shard.
        shards: Names of all shards.
        bundles: The bundles, by name.
    """

    def __init__(
        self,
        context: StepContext,
        parts: Sequence[str],
        sizes: Sequence[int],
        shards: Sequence[str],
        bundles: Mapping[str, Bundle],
    ) -> None:
        super().__init__(context)
        self._parts = parts
        self._starts = starts_of(sizes)
        self._shards = shards
        self._bundles = bundles
        self._is_out = np.load(self.part(LEFT_OUT).path(f"{ALL}.npy"), mmap_mode="r").view(np.ndarray)

    def __call__(self, shard: str) -> ShardRecord:
        """Bring one bundle together."""
        start, bundle = time.monotonic(), self._bundles[shard]
        table = findings_of_bundle(self.part(RESULTS), self._parts, bundle, self._shards, self._starts, self._is_out)
        return self.commit_duplicates(FINDINGS, shard, table, start)


class LabelWorker(PassWorker):
    """The last pass of ``filter``: the labels.

    Args:
        context: The step.
        places: Where the findings of each shard are; empty if there was no search.
    """

    def __init__(self, context: StepContext, places: Mapping[str, Place]) -> None:
        super().__init__(context)
        self._places = places

    def __call__(self, shard: str) -> ShardRecord:
        """Label the rows of one shard."""
        start, name = time.monotonic(), label_file(shard)
        measures = map_table(self.part(MEASURES).path(f"{shard}.arrow"))
        with self.output.write(name) as path:
            duplicates = self.duplicates(self._places.get(shard))
            counts, stays = write_labels(measures, duplicates, path, where=f"filter: shard {shard}")
        return commit_shard(self.output, shard, counts, [name], start, count_splits(measures, stays))

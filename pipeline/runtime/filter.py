"""The filter steps on Ray: every pass is a pool of workers that commits shard by shard under ``live/``."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.data.selection import label_file
from pipeline.data.shards import read_names, read_schema, read_table
from pipeline.errors import StepError
from pipeline.filter.duplicates import Part, find_duplicates, search_parts
from pipeline.filter.examples import write_examples
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
from pipeline.recipe.sections import FilterConfig, FilterEmbeddingsConfig
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.data import commit_shard
from pipeline.runtime.pool import ShardJob, ShardWorker, map_shards, total_counts
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import LIVE, Artifact

if TYPE_CHECKING:
    from pipeline.filter.semantic import Group

MEASURES, DUPLICATES, CENTROIDS, CLUSTERS = (
    f"{LIVE}{name}" for name in ("measures", "duplicates", "centroids", "clusters")
)
"""Folders of the passes inside the artifact: what each row says about itself, the duplicates, the clusters and
their rows."""
_LEAST_SCORE = f"{LIVE}least_score.json"
_ALL = "all"
_ONE_PART = {"in": 1, "ok": 1}
"""Counts of a pass over parts, not rows."""


def part_of(output: Artifact, folder: str) -> Artifact:
    """The folder of one pass."""
    return Artifact(f"{output.uri}/{folder}")


class _Passes:
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
        job = ShardJob(
            cast("type[ShardWorker]", worker),
            names or self._shards,
            len(names) or self._num_rows,
            self._section.resources,
            unit="parts" if names else "rows",
            output=output,
            note=lambda records: "; ".join(filter(None, [title, describe(total_counts(records))])),
        )
        return map_shards(self._context, job)

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
        write_examples(self._context.output, self._context.inputs["download"], records, self._section.num_examples)
        return StepResult(counts=counts, num_workers=self._section.resources.num_workers)


def run_filter(context: StepContext) -> StepResult:
    """Label the rows of the download by their captions, sizes, columns and pictures.

    Raises:
        ConfigError: If a rule cannot be applied.
        StepError: If no row stays.
    """
    download = context.inputs["download"].shard_records()
    passes = _Passes(context, list(download), sum(record.counts["ok"] for record in download.values()))
    measures = passes.run(MeasureWorker, MEASURES, "measuring")
    parts = {part.name: part for part in search_parts(_section(context), total_counts(measures).get("ok", 0))}
    if parts:
        worker = partial(DuplicateWorker, shards=list(download), parts=parts)
        passes.run(worker, DUPLICATES, "searching duplicates", list(parts))
    return passes.finish(passes.run(LabelWorker, "", "labelling"))


def run_filter_embeddings(context: StepContext) -> StepResult:
    """Label the embedded rows by their embeddings, and write the embeddings of those that stay.

    Raises:
        ConfigError: If the weights of a head cannot be used.
        StepError: If no row stays.
    """
    from pipeline.filter.scores import least_score_of_share
    from pipeline.filter.semantic import plan_groups

    config, output, embed = _embedding_section(context), context.output, context.inputs["embed"].shard_records()
    shards = list(embed)
    passes = _Passes(context, shards, sum(record.counts["ok"] for record in embed.values()))
    records = passes.run(ScoreWorker, MEASURES, "scoring")
    metrics: dict[str, float] = {}
    if config.clip_score_share < 1 and total_counts(records).get("ok"):
        measures = part_of(output, MEASURES)
        files = (measures.path(f"{shard}.arrow") for shard in shards)
        metrics["least_clip_score"] = least_score_of_share(files, config.clip_score_share)
        output.write_json(_LEAST_SCORE, metrics)
    if config.max_similarity < 1 and total_counts(records).get("ok"):
        passes.run(CentroidWorker, CENTROIDS, "clustering", [_ALL])
        passes.run(ClusterWorker, CLUSTERS, "clustering")
        metrics["num_clusters"] = len(_centroids(output))
        planned = plan_groups(part_of(output, CLUSTERS), shards, int(metrics["num_clusters"]))
        groups = {group.name: group for group in planned}
        worker = partial(SemanticWorker, shards=shards, groups=groups)
        passes.run(worker, DUPLICATES, "searching semantic duplicates", list(groups))
    result = passes.finish(passes.run(KeepWorker, "", "labelling"))
    return StepResult(counts=result.counts, metrics=metrics, num_workers=result.num_workers)


def _section(context: StepContext) -> FilterConfig:
    section = context.recipe.filter
    assert section is not None
    return section


def _embedding_section(context: StepContext) -> FilterEmbeddingsConfig:
    section = context.recipe.filter_embeddings
    assert section is not None
    return section


def _centroids(output: Artifact) -> NDArray[np.float32]:
    with part_of(output, CENTROIDS).path(f"{_ALL}.npy").open("rb") as file:
        return np.load(file)


class _PassWorker:
    """What the workers of all passes need."""

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._output = context.output
        self._download = context.inputs["download"]

    def _part(self, folder: str) -> Artifact:
        return part_of(self._output, folder)

    @cached_property
    def _duplicate_files(self) -> list[Any]:
        folder = self._part(DUPLICATES)
        names = [name for name in folder.names() if name.endswith(".parquet")]
        return [folder.path(name) for name in names]  # "exact" sorts before "near": the first reason counts


class MeasureWorker(_PassWorker):
    """The first pass of ``filter``: what each row says about itself."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        from pipeline.filter.rules import RowRules

        self._rules = RowRules(_section(context))

    def __call__(self, shard: str) -> ShardRecord:
        """Measure one shard of the download."""
        start, output = time.monotonic(), self._part(MEASURES)
        tar, parquet = (self._download.path(f"{shard}.{suffix}") for suffix in ("tar", "parquet"))
        table = self._rules(tar, parquet, shard)
        with output.write(f"{shard}.arrow") as path:
            write_table(table, path)
        return commit_shard(output, shard, count_reasons(table["reason"].to_pylist()), [], start)


class DuplicateWorker(_PassWorker):
    """The second pass of ``filter``: pictures that occur again.

    Args:
        context: The step.
        shards: Names of all shards.
        parts: The parts of the search, by name.
    """

    def __init__(self, context: StepContext, shards: Sequence[str], parts: Mapping[str, Part]) -> None:
        super().__init__(context)
        self._shards = shards
        self._parts = parts

    def __call__(self, shard: str) -> ShardRecord:
        """Search one part."""
        start, output = time.monotonic(), self._part(DUPLICATES)
        table = find_duplicates(self._part(MEASURES), self._shards, self._parts[shard], _section(self._context))
        with output.write(f"{shard}.parquet") as path:
            write_duplicates(table, path)
        return commit_shard(output, shard, _ONE_PART, [], start)


class LabelWorker(_PassWorker):
    """The last pass of ``filter``: the labels."""

    def __call__(self, shard: str) -> ShardRecord:
        """Label the rows of one shard."""
        start, name = time.monotonic(), label_file(shard)
        measures = map_table(self._part(MEASURES).path(f"{shard}.arrow"))
        with self._output.write(name) as path:
            duplicates = duplicates_of_shard(self._duplicate_files, shard)
            counts, stays = write_labels(measures, duplicates, path, where=f"filter: shard {shard}")
        return commit_shard(self._output, shard, counts, [name], start, count_splits(measures, stays))


class _EmbeddingWorker(_PassWorker):
    """What the workers of ``filter_embeddings`` need."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        import torch

        self._section = _embedding_section(context)
        self._embed = context.inputs["embed"]
        torch.set_num_threads(max(1, int(self._section.resources.cpus_per_worker)))

    def _measures(self, shard: str) -> Any:
        """The measures of a shard, after the share of the CLIP score is decided."""
        from pipeline.filter.scores import apply_share

        table = map_table(self._part(MEASURES).path(f"{shard}.arrow"))
        if self._section.clip_score_share == 1:
            return table
        return apply_share(table, self._output.read_json(_LEAST_SCORE)["least_clip_score"])


class ScoreWorker(_EmbeddingWorker):
    """The first pass of ``filter_embeddings``: CLIP score and heads of each row."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        from pipeline.filter.scores import ScoreRules

        shards = list(self._embed.shard_records())
        schema = read_schema(self._embed.ranged(f"{shards[0]}.parquet"))
        self._rules = ScoreRules(self._section, int(schema.field("z_image").type.list_size))

    def __call__(self, shard: str) -> ShardRecord:
        """Measure one shard of the embeddings."""
        start, output = time.monotonic(), self._part(MEASURES)
        table = self._rules(self._embed.path(f"{shard}.parquet"))
        with output.write(f"{shard}.arrow") as path:
            write_table(table, path)
        return commit_shard(output, shard, count_reasons(table["reason"].to_pylist()), [], start)


class CentroidWorker(_EmbeddingWorker):
    """Trains the clusters of the embeddings."""

    def __call__(self, shard: str) -> ShardRecord:
        """Train all clusters."""
        from pipeline.filter.semantic import train_centroids

        start, output, measures = time.monotonic(), self._part(CENTROIDS), self._part(MEASURES)
        num_rows = {name: record.counts["ok"] for name, record in measures.shard_records().items()}
        shards = [name for name, count in num_rows.items() if count]
        seed = self._context.recipe.seed
        centroids = train_centroids(self._embed, measures, shards, sum(num_rows.values()), seed)
        with output.write(f"{shard}.npy") as path, path.open("wb") as file:
            np.save(file, centroids)
        return commit_shard(output, shard, _ONE_PART, [], start)


class ClusterWorker(_EmbeddingWorker):
    """Finds the cluster of each row."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        self._centroids = _centroids(self._output)

    def __call__(self, shard: str) -> ShardRecord:
        """Find the clusters of one shard."""
        from pipeline.filter.semantic import assign, caption_groups

        start, output = time.monotonic(), self._part(CLUSTERS)
        embeddings = read_table(self._embed.path(f"{shard}.parquet"), ["caption", "z_image"])
        groups = caption_groups(embeddings["caption"], differ=self._section.same_caption_only)
        table = assign(embeddings, self._measures(shard), self._centroids, groups, self._section.resources.accelerator)
        with output.write(f"{shard}.arrow") as path:
            write_table(table, path)
        return commit_shard(output, shard, {"in": embeddings.num_rows, "ok": embeddings.num_rows}, [], start)


class SemanticWorker(_EmbeddingWorker):
    """Compares the rows of clusters.

    Args:
        context: The step.
        shards: Names of all shards.
        groups: The groups of clusters, by name.
    """

    def __init__(self, context: StepContext, shards: Sequence[str], groups: "Mapping[str, Group]") -> None:
        super().__init__(context)
        self._shards = shards
        self._groups = groups

    def __call__(self, shard: str) -> ShardRecord:
        """Compare the rows of one group of clusters."""
        from pipeline.filter.semantic import find_semantic_duplicates

        start, output = time.monotonic(), self._part(DUPLICATES)
        limit, device = self._section.max_similarity, self._section.resources.accelerator
        table = find_semantic_duplicates(self._part(CLUSTERS), self._shards, self._groups[shard], limit, device)
        with output.write(f"{shard}.parquet") as path:
            write_duplicates(table, path)
        return commit_shard(output, shard, _ONE_PART, [], start)


class KeepWorker(_EmbeddingWorker):
    """The last pass of ``filter_embeddings``: the labels, and the embeddings of the rows that stay."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        self._lists = {name: record.list_number for name, record in self._embed.shard_records().items()}

    def __call__(self, shard: str) -> ShardRecord:
        """Label the rows of one shard and write those that stay."""
        from pipeline.data.shards import split_counts
        from pipeline.data.vectors import write_embeddings

        start, names = time.monotonic(), [label_file(shard), f"{shard}.parquet"]
        with self._output.write(names[0]) as path:
            duplicates = duplicates_of_shard(self._duplicate_files, shard)
            where = f"filter_embeddings: shard {shard}"
            counts, stays = write_labels(self._measures(shard), duplicates, path, where=where)
        path = self._embed.path(names[1])
        table = read_table(path, read_names(path))
        with self._output.write(names[1]) as path:
            write_embeddings([table.filter(stays)], path, table.schema)
            splits = split_counts(path)
        return commit_shard(self._output, shard, counts, names, start, splits, self._lists[shard])

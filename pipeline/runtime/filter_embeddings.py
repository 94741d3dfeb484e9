"""The step ``filter_embeddings`` on Ray: CLIP scores, heads, and pictures that CLIP cannot tell apart."""

import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrays import save_array
from pipeline.data.selection import label_file
from pipeline.data.shard_tables import read_names, read_schema, read_table
from pipeline.filter.gathered import Bundle, plan_bundles
from pipeline.filter.labels import (
    count_reasons,
    map_table,
    table_of,
    write_labels,
    write_table,
)
from pipeline.recipe.sections import FilterEmbeddingsConfig
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.data import commit_shard
from pipeline.runtime.filter import ALL, GATHERED, MEASURES, ONE_PART, RESULTS, Passes, PassWorker, Place, part_of
from pipeline.runtime.pool import total_counts
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import LIVE, Artifact

if TYPE_CHECKING:
    from pipeline.filter.semantic import Group

CENTROIDS, CLUSTERS = (f"{LIVE}{name}" for name in ("centroids", "clustered"))
"""Folders of two passes inside the artifact: the clusters, and the rows of each shard by cluster."""
_LEAST_SCORE = f"{LIVE}least_score.json"
_READ_AT_ONCE = 64
"""Shards whose measures are in memory at once, some 60 bytes a row."""


def run_filter_embeddings(context: StepContext) -> StepResult:
    """Label the embedded rows by their embeddings, and write the embeddings of those that stay.

    Raises:
        ConfigError: If the weights of a head cannot be used.
        StepError: If no row stays.
    """
    from pipeline.filter.scores import least_score_of_share
    from pipeline.filter.semantic import plan_groups

    config, output, embed = _section(context), context.output, context.inputs["embed"].shard_records()
    shards = list(embed)
    passes = Passes(context, shards, sum(record.counts["ok"] for record in embed.values()))
    records = passes.run(ScoreWorker, MEASURES, "scoring")
    metrics: dict[str, float] = {}
    places: dict[str, Place] = {}
    if config.clip_score_share < 1 and total_counts(records).get("ok"):
        metrics["least_clip_score"] = least_score_of_share(_measures(output, shards), config.clip_score_share)
        output.write_json(_LEAST_SCORE, metrics)
    if config.max_similarity < 1 and total_counts(records).get("ok"):
        passes.run(CentroidWorker, CENTROIDS, "clustering", [ALL])
        passes.run(ClusterWorker, CLUSTERS, "clustering")
        metrics["num_clusters"] = len(_centroids(output))
        planned = plan_groups(part_of(output, CLUSTERS), shards, int(metrics["num_clusters"]))
        groups = {group.name: group for group in planned}
        bundles = {bundle.name: bundle for bundle in plan_bundles(len(shards))}
        gather = partial(GatherClustersWorker, shards=shards, bundles=bundles, groups=planned)
        passes.run(gather, GATHERED, "gathering", list(bundles))
        worker = partial(SemanticWorker, bundles=list(bundles.values()), groups=groups)
        passes.run(worker, RESULTS, "searching semantic duplicates", list(groups))
        places = passes.put_together(list(groups), [record.counts["in"] for record in records])
    result = passes.finish(passes.run(partial(KeepWorker, places=places), "", "labelling"))
    return StepResult(counts=result.counts, metrics=metrics, num_workers=result.num_workers)


def _measures(output: Artifact, shards: Sequence[str]) -> Generator[pa.Table]:
    """The measures of all shards, read by this process alone: in an object store many at a time, a request each."""
    measures, progress = part_of(output, MEASURES), Progress(output)
    for start in range(0, len(shards), _READ_AT_ONCE):
        progress.update(start, len(shards), "shards", "comparing the CLIP scores")
        names = [f"{shard}.arrow" for shard in shards[start : start + _READ_AT_ONCE]]
        yield from map(table_of, measures.read_many(names))


def _section(context: StepContext) -> FilterEmbeddingsConfig:
    section = context.recipe.filter_embeddings
    assert section is not None
    return section


def _centroids(output: Artifact) -> NDArray[np.float32]:
    with part_of(output, CENTROIDS).path(f"{ALL}.npy").open("rb") as file:
        return np.load(file)


class _EmbeddingWorker(PassWorker):
    """What the workers of ``filter_embeddings`` need."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        from pipeline.networks.cores import use_cores

        self._section = _section(context)
        self._embed = context.inputs["embed"]
        use_cores(self._section.resources.cpus_per_worker)

    def _measures(self, shard: str) -> Any:
        """The measures of a shard, after the share of the CLIP score is decided."""
        from pipeline.filter.scores import apply_share

        table = map_table(self.part(MEASURES).path(f"{shard}.arrow"))
        if self._section.clip_score_share == 1:
            return table
        return apply_share(table, self.output.read_json(_LEAST_SCORE)["least_clip_score"])


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
        start, output = time.monotonic(), self.part(MEASURES)
        table = self._rules(self._embed.path(f"{shard}.parquet"))
        with output.write(f"{shard}.arrow") as path:
            write_table(table, path)
        return commit_shard(output, shard, count_reasons(table["reason"].to_pylist()), [], start)


class CentroidWorker(_EmbeddingWorker):
    """Trains the clusters of the embeddings."""

    def __call__(self, shard: str) -> ShardRecord:
        """Train all clusters."""
        from pipeline.filter.semantic import train_centroids

        start, output, measures = time.monotonic(), self.part(CENTROIDS), self.part(MEASURES)
        num_rows = {name: record.counts["ok"] for name, record in measures.shard_records().items()}
        shards = [name for name, count in num_rows.items() if count]
        seed = self.context.recipe.seed
        centroids = train_centroids(self._embed, measures, shards, sum(num_rows.values()), seed)
        with output.write(f"{shard}.npy") as path:
            save_array(path, centroids)
        return commit_shard(output, shard, ONE_PART, [], start)


class ClusterWorker(_EmbeddingWorker):
    """Finds the cluster of each row."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        self._centroids = _centroids(self.output)

    def __call__(self, shard: str) -> ShardRecord:
        """Find the clusters of one shard."""
        from pipeline.filter.semantic import assign, caption_groups, write_sizes

        start, output = time.monotonic(), self.part(CLUSTERS)
        embeddings = read_table(self._embed.path(f"{shard}.parquet"), ["caption", "z_image"])
        groups = caption_groups(embeddings["caption"], differ=self._section.same_caption_only)
        table = assign(embeddings, self._measures(shard), self._centroids, groups, self._section.resources.accelerator)
        write_sizes(table, output, shard)
        with output.write(f"{shard}.arrow") as path:
            write_table(table, path)
        return commit_shard(output, shard, {"in": embeddings.num_rows, "ok": embeddings.num_rows}, [], start)


class GatherClustersWorker(PassWorker):
    """Brings the rows of each group of clusters together, of many shards in one file.

    Args:
        context: The step.
        shards: Names of all shards.
        bundles: The bundles, by name.
        groups: All groups of clusters.
    """

    def __init__(
        self, context: StepContext, shards: Sequence[str], bundles: Mapping[str, Bundle], groups: "Sequence[Group]"
    ) -> None:
        super().__init__(context)
        self._shards = shards
        self._bundles = bundles
        self._groups = groups

    def __call__(self, shard: str) -> ShardRecord:
        """Gather one bundle."""
        from pipeline.filter.semantic import write_bundle

        start, output, bundle = time.monotonic(), self.part(GATHERED), self._bundles[shard]
        with output.write(bundle.file) as path:
            write_bundle(self.part(CLUSTERS), self._shards, bundle, self._groups, path)
        return commit_shard(output, shard, ONE_PART, [], start)


class SemanticWorker(_EmbeddingWorker):
    """Compares the rows of clusters.

    Args:
        context: The step.
        bundles: All bundles of gathered rows.
        groups: The groups of clusters, by name.
    """

    def __init__(self, context: StepContext, bundles: Sequence[Bundle], groups: "Mapping[str, Group]") -> None:
        super().__init__(context)
        self._bundles = bundles
        self._groups = groups

    def __call__(self, shard: str) -> ShardRecord:
        """Compare the rows of one group of clusters."""
        from pipeline.filter.semantic import find_semantic_duplicates

        start = time.monotonic()
        limit, device = self._section.max_similarity, self._section.resources.accelerator
        group = self._groups[shard]
        table = find_semantic_duplicates(self.part(GATHERED), self._bundles, group, limit, device)
        return self.commit_duplicates(RESULTS, shard, table, start)


class KeepWorker(_EmbeddingWorker):
    """The last pass of ``filter_embeddings``: the labels, and the embeddings of the rows that stay.

    Args:
        context: The step.
        places: Where the findings of each shard are; empty if there was no search.
    """

    def __init__(self, context: StepContext, places: Mapping[str, Place]) -> None:
        super().__init__(context)
        self._places = places
        self._lists = {name: record.list_number for name, record in self._embed.shard_records().items()}

    def __call__(self, shard: str) -> ShardRecord:
        """Label the rows of one shard and write those that stay."""
        from pipeline.data.shard_tables import split_counts
        from pipeline.data.vectors import write_embeddings

        start, names = time.monotonic(), [label_file(shard), f"{shard}.parquet"]
        with self.output.write(names[0]) as path:
            duplicates = self.duplicates(self._places.get(shard))
            where = f"filter_embeddings: shard {shard}"
            counts, stays = write_labels(self._measures(shard), duplicates, path, where=where)
        path = self._embed.path(names[1])
        table = read_table(path, read_names(path))
        with self.output.write(names[1]) as path:
            write_embeddings([table.filter(stays)], path, table.schema)
            splits = split_counts(path)
        return commit_shard(self.output, shard, counts, names, start, splits, self._lists[shard])

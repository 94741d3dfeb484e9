"""The steps that train nothing, without pairs, download, index and the filters: embed, evaluate."""

import time
from pathlib import Path

from pipeline.data.selection import selection_of
from pipeline.data.shards import REPAIR_HINT
from pipeline.errors import DataError
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob, map_shards, total_counts
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import Artifact


def run_embed(context: StepContext) -> StepResult:
    """Embed every shard of the download with the frozen CLIP."""
    config, inputs = context.recipe.embed, context.inputs
    shards = (inputs.get("filter") or inputs["download"]).shard_records()
    num_rows = sum(record.counts["ok"] for record in shards.values())
    records = map_shards(context, ShardJob(EmbedWorker, list(shards), num_rows, config.resources))
    return StepResult(counts=total_counts(records), num_workers=config.resources.num_workers)


def run_evaluate(context: StepContext) -> StepResult:
    """Sample and measure the parts that are not committed yet, then combine all parts.

    Raises:
        DataError: If an input is damaged.
        StepError: If a worker was lost more than max_retries times.
    """
    from pipeline.evaluate.evaluate import finish, plan_work, summarise

    resources = context.recipe.evaluate.resources
    work = plan_work(context.recipe, context.inputs)
    job = ShardJob(EvaluateWorker, [part.name for part in work.parts], work.num_items, resources)
    records = map_shards(context, job)
    progress = Progress(context.output)
    progress.update(work.num_items, work.num_items, "rows", "combining numbers and pictures", force=True)
    metrics = finish(context.recipe, context.inputs, context.output, work)
    progress.update(work.num_items, work.num_items, "rows", force=True)
    return StepResult(counts=total_counts(records), metrics=summarise(metrics), num_workers=resources.num_workers)


class EmbedWorker:
    """Makes shards of the embed step."""

    def __init__(self, context: StepContext) -> None:
        import torch

        from pipeline.data.embed import Embedder

        config, clip = context.recipe.embed, context.inputs["clip"]
        torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
        self._embedder = Embedder(
            _clip_folder(clip), config.batch_size, config.resources.accelerator, selection_of(context.inputs)
        )
        self._download = context.inputs["download"]
        self._records = self._download.shard_records()
        self._output = context.output

    def __call__(self, shard: str) -> ShardRecord:
        """Embed one shard and commit it."""
        start, name, paths = time.monotonic(), f"{shard}.parquet", []
        for source in (f"{shard}.tar", name):
            paths.append(self._download.path(source))
            if self._download.describe(source) != self._records[shard].files[source]:
                where = f"embed: shard {shard}: {self._download.uri}/{source}"
                raise DataError(f"{where} does not match its checksum; {REPAIR_HINT}")
        with self._output.write(name) as target:
            counts = self._embedder(paths[0], paths[1], shard, target)
        return commit_shard(self._output, shard, dict(counts), [name], start)


class EvaluateWorker:
    """Samples and measures parts of the evaluate step."""

    def __init__(self, context: StepContext) -> None:
        import torch

        from pipeline.evaluate.evaluate import make_runner, plan_work

        recipe = context.recipe
        torch.set_num_threads(max(1, int(recipe.evaluate.resources.cpus_per_worker)))
        work = plan_work(recipe, context.inputs)
        self._parts = {part.name: part for part in work.parts}
        self._runner = make_runner(recipe, context.inputs, context.output, work)

    def __call__(self, shard: str) -> ShardRecord:
        """Sample and measure one part and commit it."""
        return self._runner.run(self._parts[shard])


def commit_shard(output: Artifact, shard: str, counts: dict[str, int], names: list[str], start: float) -> ShardRecord:
    """Commit a shard whose files ``names`` are published; ``start`` is when its work began, by ``time.monotonic``."""
    files = {name: output.describe(name) for name in names}
    wall_s = round(time.monotonic() - start, 3)
    record = ShardRecord(shard=shard, counts=counts, files=files, wall_s=wall_s)
    output.commit_shard(record)
    return record


def _clip_folder(clip: Artifact) -> Path:
    from pipeline.clip import CONFIG_FILE, WEIGHTS_FILE

    clip.path(WEIGHTS_FILE)
    return clip.path(CONFIG_FILE).parent

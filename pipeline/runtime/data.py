"""The steps that train nothing, without pairs, download, index and the filters: embed, evaluate."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.mends import repair_hint
from pipeline.data.selection import selection_of
from pipeline.data.shard_tables import split_counts
from pipeline.errors import DataError
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob, map_shards, total_counts
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.evaluate.work import Work

_NUM_CAUSES = 20
_EMBEDDED_AT_ONCE = 2  # by one worker: while one shard is read or written, the other has the network


def run_embed(context: StepContext) -> StepResult:
    """Embed every shard of the download with the frozen CLIP, or take over embeddings that others made."""
    config = context.recipe.embed
    if config.import_from:
        from pipeline.data.npy_folder import find_parts

        parts = find_parts(Path(config.import_from))
        sizes, worker = {part.name: part.num_rows for part in parts}, EmbeddingsImporter
    else:
        shards = (context.inputs.get("filter") or context.inputs["download"]).shard_records()
        sizes, worker = {name: record.counts["ok"] for name, record in shards.items()}, EmbedWorker
    job = ShardJob(worker, list(sizes), sum(sizes.values()), config.resources, num_at_once=_EMBEDDED_AT_ONCE)
    records = map_shards(context, job)
    causes = sum((Counter(record.causes) for record in records), Counter[str]())
    metrics: dict[str, object] = {
        "arithmetic": f"{config.precision}, TF32 {'on' if config.has_tf32 else 'off'}",
        "failures": dict(causes.most_common(_NUM_CAUSES)),
    }
    return StepResult(counts=total_counts(records), metrics=metrics, num_workers=config.resources.num_workers)


def run_evaluate(context: StepContext) -> StepResult:
    """Sample and measure the parts that are not committed yet, then combine all parts.

    Raises:
        DataError: If an input is damaged.
        StepError: If a worker was lost more than max_retries times.
    """
    from pipeline.evaluate.evaluate import finish, plan_work, summarise

    resources = context.recipe.evaluate.resources
    progress = Progress(context.output)
    progress.update(0, 1, "", "choosing rows", force=True)
    work = plan_work(
        context.recipe,
        context.inputs,
        lambda done, total: progress.update(0, 1, "", f"choosing rows: {done} of {total} shards"),
    )
    context = EvaluateContext(**vars(context), work=work)
    job = ShardJob(EvaluateWorker, [part.name for part in work.parts], work.num_items, resources)
    records = map_shards(context, job)
    progress, num_items = Progress(context.output), work.num_items

    def combine(done: int = 0, total: int = 0) -> None:
        training = f": training rows of {done} of {total} shards" if total else ""
        progress.update(num_items, num_items, "rows", f"combining numbers and pictures{training}", force=True)

    combine()
    metrics = finish(context.recipe, context.inputs, context.output, work, combine)
    progress.update(num_items, num_items, "rows", force=True)
    return StepResult(counts=total_counts(records), metrics=summarise(metrics), num_workers=resources.num_workers)


class EmbedWorker:
    """Makes shards of the embed step, several at a time."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.data.chunks import ProcessDecoders
        from pipeline.data.embed import Embedder
        from pipeline.networks.arithmetic import Arithmetic
        from pipeline.networks.clip import clip_folder
        from pipeline.networks.cores import use_cores

        config, folder = context.recipe.embed, clip_folder(context.inputs["clip"])
        use_cores(config.resources.cpus_per_worker)
        Arithmetic(config.precision).set_up()
        num_processes = int(config.resources.cpus_per_worker) - 1 if config.resources.accelerator == "cuda" else 0
        decoders = ProcessDecoders(folder, num_processes) if num_processes > 0 else None
        self._embedder = Embedder(folder, config, decoders, selection_of(context.inputs))
        self._download = context.inputs["download"]
        self._records = self._download.shard_records()
        self._output = context.output

    def __call__(self, shard: str) -> ShardRecord:
        """Embed one shard and commit it."""
        start, paths = time.monotonic(), list[Path]()
        for source in (f"{shard}.tar", f"{shard}.parquet"):
            path = self._download.matching(source, self._records[shard].files[source])
            if path is None:
                uri = f"{self._download.uri}/{source}"
                raise DataError(f"embed: shard {shard}: {uri} does not match its checksum; {repair_hint(uri)}")
            paths.append(path)
        result, names = self._embedder.write(paths[0], paths[1], shard, self._output)
        list_number, counts = self._records[shard].list_number, dict(result.counts)
        return _commit_embeddings(
            self._output, shard, names, counts, result.failures, result.splits, start, list_number
        )


class EmbeddingsImporter:
    """Takes over the parts of a folder of embeddings as shards of the embed step."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.data.npy_folder import find_parts

        self._config = context.recipe.embed
        self._parts = {part.name: part for part in find_parts(Path(self._config.import_from))}
        self._forgotten = Forgotten.read(context.root)
        self._output = context.output

    def __call__(self, shard: str) -> ShardRecord:
        """Convert one part and commit it."""
        from pipeline.data.npy_folder import import_part

        start = time.monotonic()
        with self._output.write(f"{shard}.parquet") as path:
            part, share = self._parts[shard], self._config.import_validation_prob
            counts, failures = import_part(part, share, path, self._forgotten)
            splits = split_counts(path)
        return _commit_embeddings(self._output, shard, [f"{shard}.parquet"], dict(counts), failures, splits, start)


@dataclass(frozen=True, kw_only=True)
class EvaluateContext(StepContext):
    """An evaluation, with its work: to choose the rows, all shards are looked at."""

    work: "Work"


class EvaluateWorker:
    """Samples and measures parts of the evaluate step."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.evaluate.evaluate import make_runner
        from pipeline.networks.cores import use_cores

        assert isinstance(context, EvaluateContext)
        recipe = context.recipe
        use_cores(recipe.evaluate.resources.cpus_per_worker)
        self._parts = {part.name: part for part in context.work.parts}
        self._runner = make_runner(recipe, context.inputs, context.output, context.work)

    def __call__(self, shard: str) -> ShardRecord:
        """Sample and measure one part and commit it."""
        return self._runner.run(self._parts[shard])


def commit_shard(
    output: Artifact,
    shard: str,
    counts: dict[str, int],
    names: list[str],
    start: float,
    splits: dict[str, int] | None = None,
    list_number: int = 0,
    causes: dict[str, int] | None = None,
) -> ShardRecord:
    """Commit a shard whose files ``names`` are published; ``start`` is when its work began, by ``time.monotonic``."""
    record = ShardRecord(
        shard=shard,
        counts=counts,
        files={name: output.describe(name) for name in names},
        causes=causes or {},
        splits=splits or {},
        list_number=list_number,
        wall_s=round(time.monotonic() - start, 3),
    )
    output.commit_shard(record)
    return record


def _commit_embeddings(
    output: Artifact,
    shard: str,
    names: list[str],
    counts: dict[str, int],
    failures: list[dict[str, str]],
    splits: dict[str, int],
    start: float,
    list_number: int = 0,
) -> ShardRecord:
    if failures:
        names = [*names, f"{shard}_failures.jsonl"]  # a reader of a folder of embeddings takes all its Parquet files
        output.write_bytes(names[-1], "".join(f"{json.dumps(failure)}\n" for failure in failures).encode())
    causes = dict(Counter(failure["reason"] for failure in failures))
    return commit_shard(output, shard, counts, names, start, splits, list_number, causes)

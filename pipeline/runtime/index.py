"""The index step, and the changes of a finished index that build a segment: append and compact.

The parts of a segment are built side by side by a pool of workers. One worker builds an index of one part alone.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator
from typing import cast

from pipeline.data.selection import embeddings_of
from pipeline.errors import StepError
from pipeline.recipe.plan import Step, artifact_of, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.build import IndexSummary, SegmentBuild
from pipeline.retrieve.changes import Check, publish_segment, segment_of_all, segment_of_more
from pipeline.retrieve.kinds import has_gpu
from pipeline.retrieve.recall import missed_target
from pipeline.retrieve.versions import BASE_SEGMENT, Version
from pipeline.runtime.calls import call_again
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.placement import cluster_has_roles, worker_options
from pipeline.runtime.pool import ShardJob, ShardWorker, map_shards
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import PROGRESS, Progress
from pipeline.workspace.store import Artifact, Workspace


def run_index(context: StepContext) -> StepResult:
    """Build the neighbour index.

    Raises:
        DataError: If there are no embeddings, or a shard is damaged.
        StepError: If a GPU is requested and FAISS sees none, or a worker was lost too often.
    """
    summary = _build(context, _segment_build(context, (embeddings_of(context.inputs),)))
    Version(0, (BASE_SEGMENT,), "").write(context.output)
    missed = missed_target(summary.metrics)
    warnings = (f"index: {missed}",) if missed else ()
    return StepResult(summary.counts, summary.metrics, summary.num_workers, summary.files, warnings)


def append(recipe: Recipe, step: Step, embed: Artifact, check: Check, more: Recipe | None = None) -> IndexSummary:
    """Add the rows of more embeddings to an index, as a new segment. Rows that it has already are not added again.

    Args:
        recipe: The recipe of the index.
        step: Its index step, finished.
        embed: Embeddings by the same CLIP.
        check: Called before the commit.
        more: The recipe of the embeddings; imported ones need it, because it alone says by which CLIP they are.

    Raises:
        DataError: If the embeddings are of another CLIP, or damaged.
        StepError: See ``run_index``.
    """
    context = StepContext(recipe, step, Workspace(recipe.workspace).root)
    clips = _clip_of(recipe), None if more is None else _clip_of(more)
    return _change(context, segment_of_more(_segment_build(context, (embed,)), *clips), check, replaces=False)


def compact(recipe: Recipe, step: Step, check: Check) -> IndexSummary:
    """Build one segment from the embeddings of all segments, without the deleted rows; see ``append``.

    Raises:
        DataError: If embeddings are damaged or gone.
        StepError: See ``run_index``.
    """
    context = StepContext(recipe, step, Workspace(recipe.workspace).root)
    return _change(context, segment_of_all(_segment_build(context, ())), check, replaces=True)


class PartWorker:
    """Builds parts of a segment."""

    def __init__(self, context: StepContext, build: SegmentBuild) -> None:
        del context
        self._build = build

    def __call__(self, shard: str) -> ShardRecord:
        """Build one part and commit it."""
        record = self._build.add_part(shard)
        self._build.output.commit_shard(record)
        return record


def _clip_of(recipe: Recipe) -> Artifact:
    """The CLIP that a recipe names, finished or not."""
    [step] = [step for step in make_plan(recipe, until="clip") if step.name == "clip"]
    return artifact_of(Workspace(recipe.workspace), step)


def _segment_build(context: StepContext, sources: tuple[Artifact, ...]) -> SegmentBuild:
    config = context.recipe.index
    num_threads = max(1, int(config.resources.cpus_per_worker))
    on_gpu = config.resources.accelerator == "cuda"
    return SegmentBuild(sources, context.output, config, context.recipe.seed, num_threads=num_threads, on_gpu=on_gpu)


def _change(context: StepContext, build: SegmentBuild, check: Check, *, replaces: bool) -> IndexSummary:
    try:
        summary = _build(context, build)
    finally:
        context.output.remove(PROGRESS)
    publish_segment(build, summary, replaces=replaces, check=check)
    return summary


@dataclasses.dataclass(frozen=True)
class _Built(IndexSummary):
    num_workers: int = 1


def _build(context: StepContext, build: SegmentBuild) -> _Built:
    """All stages, on Ray."""
    needs, parts = context.recipe.index.resources, build.parts()
    options = worker_options(context.step.name, needs, has_roles=cluster_has_roles())
    options |= {"num_gpus": 1 if build.on_gpu else 0, "name": context.step.name}
    run = functools.partial(call_again, options=options, max_retries=needs.max_retries)
    if len(parts) == 1:
        return _Built(**vars(run(_build_alone, build)))
    run(_prepare, build)
    worker = cast("type[ShardWorker]", functools.partial(PartWorker, build=build))
    map_shards(context, ShardJob(worker, parts, build.num_rows(), needs))
    summary: IndexSummary = run(_finish, build)
    return _Built(summary.counts, summary.metrics, summary.files, needs.num_workers)


def _build_alone(build: SegmentBuild) -> IndexSummary:
    with _progress(build, "building and tuning"):
        _require_gpu(build)
        build.prepare()
        for name in build.parts():
            if name not in build.output.shard_records():
                build.output.commit_shard(build.add_part(name))
        return build.finish()


def _prepare(build: SegmentBuild) -> None:
    with _progress(build, "training on a sample of the rows"):
        _require_gpu(build)
        build.prepare()


def _finish(build: SegmentBuild) -> IndexSummary:
    with _progress(build, "putting the parts together, tuning"):
        return build.finish()


@contextlib.contextmanager
def _progress(build: SegmentBuild, message: str) -> Generator[None]:
    """Count the time of a stage; its rows are counted by the parts."""
    progress, num_rows = Progress(build.output), build.num_rows()
    progress.update(0, num_rows, "rows", message, force=True)
    yield
    progress.update(num_rows, num_rows, "rows", force=True)


def _require_gpu(build: SegmentBuild) -> None:
    if build.on_gpu and not has_gpu():
        raise StepError(
            "index: index.resources.accelerator is cuda, but this FAISS sees no GPU: it is the build for CPUs "
            "(install unclip[gpu] in place of unclip[cpu]), or the machine has none; or set it to cpu"
        )

"""The steps of a recipe in this process: the code of their workers and of their commits, without Ray; and what they ask
of an object store.
"""

import contextlib
import importlib
import shutil
from collections.abc import Collection, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.data.selection import embeddings_of
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.sections import FilterConfig
from pipeline.recipe.steps import STEP_ROWS
from pipeline.retrieve.build import build_index
from pipeline.runtime import data, download, step_task
from pipeline.runtime import filter as filters
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob
from pipeline.runtime.train import _run_worker
from pipeline.shapes.server import serve_pictures
from pipeline.workspace.manifest import ShardRecord
from tests.ports import free_port
from tests.s3_server import Request, S3Server
from tests.scaling_page import by_the_clock
from tests.tiny.recipe import tiny_tables, training

COUNTED_STEPS = ("pairs", "download", "filter", "clip", "embed", "index", "prior", "decoder")
"""Steps whose requests docs/scaling.md counts by hand."""


class _NoTracking:
    def finished(self, _context: StepContext, _result: StepResult) -> str:
        return ""


def _map_here(context: StepContext, job: ShardJob) -> list[ShardRecord]:
    """Make the shards in this process, as one worker does."""
    records, worker = (job.output or context.output).shard_records(live=False), None
    for name in job.shards:
        if name not in records:
            worker = worker or job.worker(context)
            records[name] = worker(name)
    if isinstance(worker, download.DownloadWorker):
        worker.close()  # its decoders: this process does not end
    job.on_records(list(records.values()))
    return [records[name] for name in job.shards]


@contextlib.contextmanager
def steps_here() -> Generator[None]:
    """Let ``run_step`` run data steps in this process, one shard after the other."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, download, filters):
            patch.setattr(module, "map_shards", _map_here)
        patch.setattr(download, "served_pictures", serve_pictures)
        yield


def run_step(context: StepContext) -> None:
    """Run and commit one step, inside ``steps_here``."""
    step_task.forget_if_inputs_changed(context)
    step = context.step.name
    if step == "index":
        config = context.recipe.index
        summary = build_index(embeddings_of(context.inputs), context.output, config, seed=context.recipe.seed)
        result = StepResult(counts=summary.counts, metrics=summary.metrics)
    elif STEP_ROWS[step].trains:
        result = StepResult(metrics=_run_worker(context).metrics)
    else:
        module, _, name = STEP_ROWS[step].runner.partition(":")
        result = getattr(importlib.import_module(module), name)(context)
    step_task.commit_step(context, result, cast("Any", _NoTracking()))


def counted_recipe(workspace: str, num_shards: int, shard_rows: int) -> Recipe:
    """A tiny recipe of so many shards: one worker a step, no validation rows, trainings of an epoch."""
    train = training(num_shards * shard_rows // 8, batch_size=8, save_every_steps=1000, log_every_steps=1000)
    scenes = {"num_pairs": num_shards * shard_rows, "image_px": 32, "port": free_port(), "num_faulty": 0}
    tables = tiny_tables(
        Path("replaced"),
        pairs={"validation_prob": 0.0, "drawn": scenes},
        download={"samples_per_shard": shard_rows, "resources": {"max_per_host": 0, "max_rate_per_host": 0.0}},
        index={"num_recall_queries": 8},
        **dict.fromkeys(("clip", "prior", "decoder"), train),
    )
    return parse_recipe(tables | {"workspace": workspace})


def with_filter(recipe: Recipe) -> Recipe:
    """The recipe with the filter that is counted; what an example costs depends on the size of its shard."""
    return replace(recipe, filter=FilterConfig(duplicates="exact", num_examples=0))


def count_all_steps(
    recipe: Recipe, server: S3Server, cache: Path, steps: Collection[str] = COUNTED_STEPS
) -> dict[str, list[Request]]:
    """Run the steps that the page counts, or ``steps`` and what they need; the requests of each.

    The filter comes last, from a recipe of its own, because the other steps are counted without its selection.
    """
    needed = {*steps, "pairs", "download", *(("clip",) if "embed" in steps else ())} - {"filter"}
    counted = _count_requests(recipe, server, cache, needed)
    return counted | (_count_requests(with_filter(recipe), server, cache, {"filter"}) if "filter" in steps else {})


def _count_requests(recipe: Recipe, server: S3Server, cache: Path, steps: Collection[str]) -> dict[str, list[Request]]:
    """Run steps; the requests of each, on a machine that has none of the store's files, but those made by the clock."""
    requests: dict[str, list[Request]] = {}
    for step in make_plan(recipe):
        if step.name in steps:
            shutil.rmtree(cache, ignore_errors=True)
            server.counted()
            run_step(StepContext(recipe, step, recipe.workspace))
            requests[step.name] = [one for one in server.counted() if not by_the_clock(one)]
    return requests

"""What the steps of a recipe ask of an object store, counted by a server, and by hand in docs/scaling.md; and its faults.

The steps run in this process, with the code of their workers and of their commits, but without Ray.
"""

import importlib
import shutil
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.data.selection import embeddings_of
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.steps import STEP_ROWS
from pipeline.retrieve.build import build_index
from pipeline.runtime import data, download, run
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob
from pipeline.runtime.train import _run_worker
from pipeline.shapes.server import serve_pictures
from pipeline.workspace.manifest import ShardRecord
from tests.ports import free_port
from tests.s3_server import Request, S3Server, faulty
from tests.scaling_page import by_the_clock, counted_by_hand
from tests.tiny.recipe import tiny_tables, training
from tests.workspace.conftest import use

pytestmark = pytest.mark.slow

_STEPS = ("pairs", "download", "clip", "embed", "index", "prior", "decoder")
_ROWS = 24
"""Rows of a shard: every shard holds a query of the index."""
_FEW, _MORE = 2, 4
"""Shards."""
_TIMED = (".done.json", "_stats.json", "metrics.jsonl", "segment.json", "index.json")
"""Ends of the names of files that hold times."""
_BESIDES_BYTES = 4000
"""What a training may fetch for a shard beside its files: 0.02 % of a shard of 20 MB."""


class _NoTracking:
    def finished(self, _context: StepContext, _result: StepResult) -> str:
        return ""


def _map_here(context: StepContext, job: ShardJob) -> list[ShardRecord]:
    """Make the shards in this process, as one worker does."""
    records, worker = (job.output or context.output).shard_records(), None
    for name in job.shards:
        if name not in records:
            worker = worker or job.worker(context)
            records[name] = worker(name)
    job.on_record(list(records.values()))
    return [records[name] for name in job.shards]


def _run_step(context: StepContext) -> None:
    run._forget_if_inputs_changed(context)
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
    run._commit(context, result, cast("Any", _NoTracking()))


def _recipe(workspace: str, num_shards: int) -> Recipe:
    """One worker a step, no validation rows, an epoch."""
    train = training(num_shards * _ROWS // 8, batch_size=8, save_every_steps=1000, log_every_steps=1000)
    scenes = {"num_pairs": num_shards * _ROWS, "image_px": 32, "port": free_port(), "num_faulty": 0}
    tables = tiny_tables(
        Path("replaced"),
        pairs={"validation_prob": 0.0, "drawn": scenes},
        download={"samples_per_shard": _ROWS, "resources": {"max_per_host": 0, "max_rate_per_host": 0.0}},
        index={"num_recall_queries": 8},
        **dict.fromkeys(("clip", "prior", "decoder"), train),
    )
    return parse_recipe(tables | {"workspace": workspace})


def _count(recipe: Recipe, server: S3Server, cache: Path) -> dict[str, list[Request]]:
    """The requests of each step, each on a machine that has none of the store's files."""
    requests: dict[str, list[Request]] = {}
    for step in make_plan(recipe):
        if step.name in _STEPS:
            shutil.rmtree(cache, ignore_errors=True)
            server.counted()
            _run_step(StepContext(recipe, step, recipe.workspace))
            requests[step.name] = [one for one in server.counted() if not by_the_clock(one)]
    return requests


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, download):
            patch.setattr(module, "map_shards", _map_here)
        patch.setattr(download, "served_pictures", serve_pictures)
        yield


@pytest.fixture(scope="module")
def counted(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Generator[list[dict[str, list[Request]]]]:
    """The requests of recipes with few and with more shards, by step."""
    cache = tmp_path_factory.mktemp("machine") / "cache"
    s3_server.make_bucket("counted")
    with pytest.MonkeyPatch.context() as patch:
        use(s3_server.environment | {"UNCLIP_CACHE": str(cache)}, patch)
        yield [_count(_recipe(f"s3://counted/{number}", number), s3_server, cache) for number in (_FEW, _MORE)]


def test_a_shard_costs_the_requests_that_the_page_counts_by_hand(counted: list[dict[str, list[Request]]]) -> None:
    page, (few, more) = counted_by_hand(), counted
    assert page.keys() == set(_STEPS)
    for step in _STEPS:
        kinds = [Counter(one.kind for one in requests[step]) for requests in (few, more)]
        assert kinds[1].keys() <= page[step].keys()
        slopes = {kind: (kinds[1][kind] - kinds[0][kind]) / (_MORE - _FEW) for kind in page[step]}
        assert slopes == {kind: of_shard for kind, (of_shard, _) in page[step].items()}, step
        assert all(kinds[0][kind] - of_shard * _FEW <= rest for kind, (of_shard, rest) in page[step].items()), step


def test_a_training_fetches_its_data_once(counted: list[dict[str, list[Request]]]) -> None:
    for step, files in {"clip": 2, "prior": 1, "decoder": 2}.items():
        of_data = [[one for one in requests[step] if one.name.endswith((".tar", ".parquet"))] for requests in counted]
        names = [one.name for one in of_data[1] if "GET" in one.kind]
        assert len(names) == len(set(names)) == files * _MORE, step
        # Besides come its records: what more shards add to all bytes, without what they add to the data.
        all_bytes, data_bytes = (
            [sum(one.num_bytes for one in requests) for requests in both]
            for both in ([requests[step] for requests in counted], of_data)
        )
        besides = (all_bytes[1] - all_bytes[0]) - (data_bytes[1] - data_bytes[0])
        assert 0 < besides / (_MORE - _FEW) <= _BESIDES_BYTES, step


def _checksums(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Of the files of each step, without those that hold times."""
    checksums: dict[str, dict[str, str]] = {}
    for step in make_plan(recipe):
        if step.name in _STEPS:
            context = StepContext(recipe, step, recipe.workspace)
            _run_step(context)
            manifest = context.output.manifest()
            assert manifest is not None
            files = manifest.files.items()
            checksums[step.name] = {name: facts["sha256"] for name, facts in files if not name.endswith(_TIMED)}
    return checksums


def test_steps_on_a_store_that_fails_have_the_bytes_of_steps_here(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, cut_in = free_port(), ("download", "embed", "prior")
    s3_server.make_bucket("faulty")
    here = _recipe(str(tmp_path / "w"), _FEW)
    there = replace(here, workspace="s3://faulty/w")
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "UNCLIP_CACHE": str(tmp_path / "cache")}
    use(s3_server.environment | environment, monkeypatch)
    with faulty(s3_server, port, cut_in) as cuts:
        assert _checksums(there) == _checksums(here)
    assert sorted(cuts) == sorted(cut_in)

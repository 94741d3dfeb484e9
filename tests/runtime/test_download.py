"""The download step on a real Ray: rows that take workers down, limits of the cluster, too few rows."""

import asyncio
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime import download
from pipeline.runtime.context import StepContext
from pipeline.runtime.download import run_download
from pipeline.runtime.download_workers import DownloadWorker, _split_name
from pipeline.runtime.host_limits import find_limits, shared_limits
from pipeline.workspace import disk, objects
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact
from tests.data.hostile import HostileServer
from tests.runtime.downloads import context_of, die_of_killers, messages_of, tables_of

pytestmark = [pytest.mark.ray]


class _Fragile(DownloadWorker):
    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        die_of_killers(self)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(600)
def test_a_row_that_takes_workers_down_is_found_and_labelled(
    hostile: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "DownloadWorker", _Fragile)
    urls = [f"{hostile.url}/ok?seed={i}" for i in range(6)]
    urls[4] = f"{hostile.url}/ok?killer"
    context = context_of(tables_of(tmp_path, urls, samples_per_shard=4))  # of the second shard half is empty
    result = run_download(context)
    assert result.counts == {"in": 6, "ok": 5, "failed_to_download": 0, "failed_to_resize": 1}
    assert result.metrics["failures"] == {"killer": 1}
    assert messages_of(context.output) == [None] * 4
    assert messages_of(context.output, "00001") == ["killer: its worker was lost twice", None]
    with tarfile.open(context.output.path("00001.tar")) as tar:
        assert [name for name in tar.getnames() if name.endswith("jpg")] == ["000011.jpg"]
    split = context.output.find_json(_split_name("00001"))
    assert split is None  # else a shard that is made again would be joined from its old parts


@pytest.mark.usefixtures("local_ray")
def test_the_limits_of_hosts_outlive_their_process(tmp_path: Path) -> None:
    context = context_of(tables_of(tmp_path, ["http://a.example/a.jpg"], resources={"max_per_host": 1}))

    async def use() -> None:
        limits = find_limits(context)
        assert limits is not None
        assert await limits.start("a")
        actor = limits._actor  # type: ignore[attr-defined]
        ray.kill(actor, no_restart=False)
        assert await limits.start("a", await limits.reserve("a", 1))  # it knows of no lease any more
        ray.kill(actor)
        with pytest.raises(StepError, match="max_per_host"):
            await limits.reserve("a", 1)

    with shared_limits(context):
        asyncio.run(asyncio.wait_for(use(), 60))


@pytest.mark.usefixtures("local_ray")
def test_without_limits_workers_share_the_pauses_that_hosts_ask_for(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, ["http://a.example/a.jpg"], deadline_s=600, resources={"num_workers": 2})
    context = context_of(tables)
    config = context.recipe.download
    config = replace(config, resources=replace(config.resources, num_workers=1))
    alone = replace(context, recipe=replace(context.recipe, download=config))

    async def use() -> None:
        limits, others = find_limits(context), find_limits(context)
        assert limits is not None
        assert others is not None
        await limits.pause("a", 600)
        while await others.start("a"):
            await asyncio.sleep(0.1)
        assert await others.start("b")

    with shared_limits(context):
        asyncio.run(asyncio.wait_for(use(), 60))
    with shared_limits(alone):
        assert find_limits(alone) is None


@pytest.mark.usefixtures("local_ray")
def test_all_workers_together_keep_the_limits_of_a_host(hostile: HostileServer, tmp_path: Path) -> None:
    urls = [f"{hostile.url}/wait?n={i}" for i in range(12)]
    resources = {"num_workers": 2, "max_per_host": 1}
    context = context_of(tables_of(tmp_path, urls, samples_per_shard=3, resources=resources))
    assert run_download(context).counts["ok"] == 12
    assert hostile.most["127.0.0.1"] == 1
    state = read_progress(context.output)
    assert state is not None
    assert (state.done, state.message) == (12, "")


def test_a_worker_may_be_silent_for_as_long_as_it_waits_for_storage() -> None:
    assert max(objects._PATIENCE_S, disk._PATIENCE_S) <= download._SILENCE_S


def test_totals_of_shards_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, shards = Artifact(str(tmp_path)), [f"{number:05d}" for number in range(7)]
    for shard in shards:
        output.write_json(f"{shard}_stats.json", {"one_pixel": 1, "repeated": {"d": {"urls": 2, "url": f"u{shard}"}}})
    monkeypatch.setattr(download, "_STATS_AT_ONCE", 3)
    read, sizes = Artifact.read_jsons, list[int]()

    def read_few(artifact: Artifact, names: Sequence[str]) -> list[Any]:
        sizes.append(len(names))
        return read(artifact, names)

    monkeypatch.setattr(Artifact, "read_jsons", read_few)
    repeated = [{"digest": "d", "urls": 14, "url": "u00000"}]
    assert download._oddities(output, shards) == {"one_pixel": 7, "repeated": repeated}
    assert sizes == [3, 3, 1]


@pytest.mark.usefixtures("local_ray")
def test_a_download_that_was_stopped_for_too_few_rows_goes_on_with_a_lower_share(
    hostile: HostileServer, tmp_path: Path
) -> None:
    paths = ["ok?seed=1", "ok?seed=2", *(f"missing?n={number}" for number in range(6))]
    urls = [f"{hostile.url}/{path}" for path in paths]
    tables = tables_of(tmp_path, urls, samples_per_shard=2, resources={"min_success_prob": 0.5})
    high = context_of(tables)
    tables["download"]["resources"]["min_success_prob"] = 0.2
    low = replace(high, recipe=parse_recipe(tables))
    assert make_plan(low.recipe, until="download")[-1] == high.step
    with pytest.raises(StepError, match=r"only 2 of 8 rows .*min_success_prob is 0\.5.*lower share"):
        run_download(high)
    with pytest.raises(StepError, match="only 2 of 8 rows"):
        run_download(high)
    requests = [hostile.requests[f"127.0.0.1/{path}"] for path in paths]
    assert requests == [1] * 2 + [2] * 6  # shards below the share are made again, the others not
    assert run_download(low).counts["ok"] == 2
    assert [hostile.requests[f"127.0.0.1/{path}"] for path in paths] == requests

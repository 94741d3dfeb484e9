"""The download step on a real Ray: rows that take workers down, other tries of failed rows, limits of the cluster."""

import asyncio
import json
import os
import signal
import tarfile
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import tomli_w

from pipeline.data import shard_again
from pipeline.data.retries import ask_retry, staged_in, waiting_retries
from pipeline.data.splits import Split
from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan, manifest_of
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime import download
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.download import run_download
from pipeline.runtime.download_workers import DownloadWorker, RetryWorker, _split_name, write_split
from pipeline.runtime.host_limits import find_limits, shared_limits
from pipeline.runtime.pairs import run_pairs
from pipeline.workspace import disk, objects
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import MANIFEST, Artifact
from tests.data.hostile import HostileServer
from tests.tiny.command import ROOT, unclip, unclip_json
from tests.tiny.recipe import tiny_tables, training

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def address(ray_head: Any) -> Generator[str]:
    """A cluster for the commands of this file: each would start its own."""
    with ray_head(environment={"PYTHONPATH": str(ROOT)}) as head, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield head.address


@pytest.fixture
def server() -> Generator[HostileServer]:
    """A server that fails as its paths say."""
    with HostileServer() as running:
        yield running


def _tables(folder: Path, urls: Sequence[str], **settings: Any) -> dict[str, Any]:
    (folder / "list.csv").write_text(
        "\n".join(["url,caption", *(f'"{url}",caption {i}' for i, url in enumerate(urls))])
    )
    resources = {"num_workers": 1, "cpus_per_worker": 0.5, "min_success_prob": 0.0} | settings.pop("resources", {})
    fixed = {
        "image_px": 64,
        "retries": 0,
        "deadline_s": 20.0,
        "allowed_networks": ["127.0.0.1/32"],
    }
    return {
        "workspace": str(folder / "workspace"),
        "pairs": {"source": "list", "path": str(folder / "list.csv")},
        "download": fixed | settings | {"resources": resources},
    }


def _context(tables: dict[str, Any]) -> StepContext:
    """The context of the download; the pairs are made."""
    recipe = parse_recipe(tables)
    contexts = {step.name: StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe, until="download")}
    _commit(contexts["pairs"], run_pairs(contexts["pairs"]))
    return contexts["download"]


def _commit(context: StepContext, result: StepResult) -> None:
    context.output.commit(manifest_of(context.step, context.output, result.counts))


def _retry(context: StepContext, failed_class: str) -> StepResult:
    """Run the download as a run does that is to try failed rows again."""
    ask_retry(context.output, failed_class)
    return run_download(replace(context, retry_failed=failed_class))


def _messages(output: Artifact, shard: str = "00000") -> list[str | None]:
    return pq.read_table(output.path(f"{shard}.parquet")).column("error_message").to_pylist()


def _die_of_killers(worker: Any) -> None:
    """Let the worker's process die as soon as it fetches a URL with ``killer`` in it."""
    fetch = worker._downloader._fetch_one

    async def fetch_or_die(request: Any) -> Any:
        if "killer" in request.url:
            os.kill(os.getpid(), signal.SIGKILL)
        return await fetch(request)

    worker._downloader._fetch_one = fetch_or_die


class _Fragile(DownloadWorker):
    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        _die_of_killers(self)


class _FragileRetry(RetryWorker):
    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        _die_of_killers(self)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(600)
def test_a_row_that_takes_workers_down_is_found_and_labelled(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "DownloadWorker", _Fragile)
    urls = [f"{server.url}/ok?seed={i}" for i in range(7)]
    urls[4] = f"{server.url}/ok?killer"
    context = _context(_tables(tmp_path, urls, samples_per_shard=4))
    result = run_download(context)
    assert result.counts == {"in": 7, "ok": 6, "failed_to_download": 0, "failed_to_resize": 1}
    assert result.metrics["failures"] == {"killer": 1}
    assert _messages(context.output) == [None] * 4
    assert _messages(context.output, "00001") == ["killer: its worker was lost twice", None, None]
    with tarfile.open(context.output.path("00001.tar")) as tar:
        assert [name for name in tar.getnames() if name.endswith("jpg")] == ["000011.jpg", "000012.jpg"]
    split = context.output.find_json(_split_name("00001"))
    assert split is None  # else a shard that is made again would be joined from its old parts


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(600)
def test_another_try_finds_the_row_that_takes_workers_down(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = "status?code=503&times=1"
    paths = ["ok?seed=1", f"{busy}&n=1", f"{busy}&killer", f"{busy}&n=3", "missing", "ok?seed=2"]
    urls = [f"{server.url}/{path}" for path in paths]
    context = _context(_tables(tmp_path, urls, samples_per_shard=6))
    assert run_download(context).counts["ok"] == 2
    monkeypatch.setattr(download, "RetryWorker", _FragileRetry)
    monkeypatch.setattr(download, "_MOST_LOSSES", 10)
    result = _retry(context, "all")
    assert result.counts == {"in": 6, "ok": 4, "failed_to_download": 2, "failed_to_resize": 0}
    messages = [None, None, "http-503: Busy", None, "http-404: Not Found", None]
    assert _messages(context.output) == messages


@pytest.mark.usefixtures("local_ray")
def test_a_retry_in_parts_goes_on_from_the_parts_that_are_done(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = "status?code=503&times=1"
    urls = [*(f"{server.url}/{busy}&n={row}" for row in range(4)), f"{server.url}/ok"]
    context = replace(_context(_tables(tmp_path, urls, samples_per_shard=5)), retry_failed="http")
    output, staged = context.output, staged_in(context.output, "http")
    assert run_download(replace(context, retry_failed="")).counts["ok"] == 1
    write_split(staged, "00000", Split([(0, 2), (2, 3)], killers=[3]))
    retry, tried = shard_again.retry_shard, list[range | None]()

    def retry_and_stop(*arguments: Any, only: range | None = None) -> Any:
        tried.append(only)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return retry(*arguments, only=only)

    monkeypatch.setattr(shard_again, "retry_shard", retry_and_stop)
    worker = RetryWorker(context)
    with pytest.raises(KeyboardInterrupt):
        worker("00000")
    record = worker("00000")
    assert tried == [range(2), range(2, 3), range(2, 3)]
    worker.close()
    assert record.counts == {"in": 5, "ok": 4, "failed_to_download": 1, "failed_to_resize": 0}
    assert record.causes == {"http-503": 1}
    assert not [name for name in staged.names() if "split" in name or "parts" in name]
    assert _messages(staged) == [None, None, None, "http-503: Busy", None]
    assert _messages(output) == [*["http-503: Busy"] * 4, None]
    assert [server.requests[f"127.0.0.1/{busy}&n={row}"] for row in range(4)] == [2, 2, 2, 1]


@pytest.mark.usefixtures("local_ray")
def test_the_limits_of_hosts_outlive_their_process(tmp_path: Path) -> None:
    context = _context(_tables(tmp_path, ["http://a.example/a.jpg"], resources={"max_per_host": 1}))

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
    tables = _tables(tmp_path, ["http://a.example/a.jpg"], deadline_s=600, resources={"num_workers": 2})
    context = _context(tables)
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
def test_all_workers_together_keep_the_limits_of_a_host(server: HostileServer, tmp_path: Path) -> None:
    urls = [f"{server.url}/wait?n={i}" for i in range(12)]
    resources = {"num_workers": 2, "max_per_host": 1}
    context = _context(_tables(tmp_path, urls, samples_per_shard=3, resources=resources))
    assert run_download(context).counts["ok"] == 12
    assert server.most["127.0.0.1"] == 1
    state = read_progress(context.output)
    assert state is not None
    assert (state.done, state.message) == (12, "")


def test_a_worker_may_be_silent_for_as_long_as_it_waits_for_storage() -> None:
    assert max(objects._PATIENCE_S, disk._PATIENCE_S) <= download._SILENCE_S


class _StopsOnce(RetryWorker):
    """Ends the step at the second shard, once."""

    def __call__(self, shard: str) -> ShardRecord:
        if shard == "00001" and not self._context.output.exists("live/stopped.json"):
            self._context.output.write_json("live/stopped.json", True)
            raise StepError("stopped")
        return super().__call__(shard)


@pytest.mark.usefixtures("local_ray")
def test_a_retry_that_is_stopped_while_it_fetches_is_finished_by_the_next_run(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RetryWorker", _StopsOnce)
    busy = "status?code=503"
    paths = ["missing", f"{busy}&n=0", f"{busy}&times=1&n=1", "ok", f"{busy}&times=1&n=2", f"{busy}&times=1&n=3"]
    context = _context(_tables(tmp_path, [f"{server.url}/{path}" for path in paths], samples_per_shard=2))
    assert run_download(context).counts["ok"] == 1
    with pytest.raises(StepError, match="stopped"):
        _retry(context, "http-503")
    result = run_download(context)
    assert result.counts == {"in": 6, "ok": 4, "failed_to_download": 2, "failed_to_resize": 0}
    requests = [server.requests[f"127.0.0.1/{path}"] for path in paths]
    assert requests == [1, 2, 2, 1, 2, 2]  # what was tried before the stop is not tried once more
    assert waiting_retries(context.output) == []
    run_download(replace(context, retry_failed="http-503"))  # as Ray does if it loses the finished task
    assert [server.requests[f"127.0.0.1/{path}"] for path in paths] == requests


@pytest.mark.usefixtures("local_ray")
def test_a_retry_that_is_stopped_anywhere_is_finished_by_the_next_run(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ["ok?seed=1", "status?code=503&times=1", "ok?seed=2", "status?code=500&times=1", "missing", "ok?seed=3"]
    context = _context(_tables(tmp_path, [f"{server.url}/{path}" for path in paths], samples_per_shard=2))
    assert run_download(context).counts["ok"] == 3
    output = context.output
    kept = output.describe("00002.tar")
    move = Artifact.move
    moved: list[str] = []

    def move_and_stop(source: Artifact, name: str, target: Artifact) -> None:
        move(source, name, target)
        moved.append(name)
        if len(moved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "move", move_and_stop)
    with pytest.raises(KeyboardInterrupt):
        _retry(context, "http")
    monkeypatch.setattr(Artifact, "move", move)
    result = run_download(context)
    assert result.counts == {"in": 6, "ok": 5, "failed_to_download": 1, "failed_to_resize": 0}
    assert _messages(output, "00002") == ["http-404: Not Found", None]
    assert output.describe("00002.tar") == kept
    for shard, record in output.shard_records().items():
        assert {name: output.describe(name) for name in record.files} == record.files, shard


class _CountedName(str):
    """A name of a shard that counts how often it is looked up."""

    num_hashes = 0

    def __hash__(self) -> int:
        _CountedName.num_hashes += 1
        return super().__hash__()


def test_the_shards_of_another_try_are_chosen_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(download, "map_shards", lambda _context, job: jobs.append(job))
    context = _context(_tables(tmp_path, ["http://a.example/a.jpg"]))
    counts = {"in": 2, "ok": 1, "failed_to_download": 1, "failed_to_resize": 0}
    causes = [{"http-404": 1} if number % 2 else {"timeout": 1} for number in range(1000)]
    records = [
        ShardRecord(shard=_CountedName(number), counts=counts, files={}, causes=one)
        for number, one in enumerate(causes)
    ]
    download._try_again(replace(context, retry_failed="http"), records, "http")
    [job] = jobs
    assert (job.shards, job.num_rows) == ([str(number) for number in range(1, 1000, 2)], 1000)
    assert _CountedName.num_hashes <= 2 * len(records)


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
    server: HostileServer, tmp_path: Path
) -> None:
    paths = ["ok?seed=1", "ok?seed=2", *(f"missing?n={number}" for number in range(6))]
    urls = [f"{server.url}/{path}" for path in paths]
    tables = _tables(tmp_path, urls, samples_per_shard=2, resources={"min_success_prob": 0.5})
    high = _context(tables)
    tables["download"]["resources"]["min_success_prob"] = 0.2
    low = replace(high, recipe=parse_recipe(tables))
    assert make_plan(low.recipe, until="download")[-1] == high.step
    with pytest.raises(StepError, match=r"only 2 of 8 rows .*min_success_prob is 0\.5.*lower share"):
        run_download(high)
    with pytest.raises(StepError, match="only 2 of 8 rows"):
        run_download(high)
    requests = [server.requests[f"127.0.0.1/{path}"] for path in paths]
    assert requests == [1] * 2 + [2] * 6  # shards below the share are made again, the others not
    assert run_download(low).counts["ok"] == 2
    assert [server.requests[f"127.0.0.1/{path}"] for path in paths] == requests


def test_the_command_tries_failed_rows_again(server: HostileServer, tmp_path: Path, address: str) -> None:
    paths = ["ok?seed=1", "status?code=503&times=1", "status?code=500&times=1", "status?code=502&times=1"]
    tables = _tables(tmp_path, [f"{server.url}/{path}" for path in paths])
    recipe = tmp_path / "recipe.json.toml"
    lines = [f'workspace = "{tables["workspace"]}"', 'tracking.uri = "off"']
    for section in ("pairs", "download"):
        lines += [
            f"[{section}]",
            *(f"{name} = {json.dumps(value)}" for name, value in tables[section].items() if name != "resources"),
        ]
    recipe.write_text("\n".join(lines) + "\n")
    command = ("run", str(recipe), "--until", "download", "--address", address)
    assert unclip(*command).returncode == 0
    done = unclip(*command, "--retry-failed", "http-503")
    assert done.returncode == 0, done.stdout
    row = next(row for row in unclip_json("status", str(recipe)) if row["step"] == "download")
    assert row["state"] == "done"
    assert row["counts"]["ok"] == 2
    output = Artifact(row["artifact"])
    ask_retry(output, "http-500")
    output.remove(MANIFEST)  # as a run leaves it that is stopped before the first shard
    done = unclip(*command)
    assert "goes on to try failed rows again (http-500)" in done.stdout
    row = next(row for row in unclip_json("status", str(recipe)) if row["step"] == "download")
    assert row["counts"]["ok"] == 3
    done = unclip("run", "--retry-failed", *command[1:])
    assert "ran 1 step" in done.stdout, done.stdout
    row = next(row for row in unclip_json("status", str(recipe)) if row["step"] == "download")
    assert row["counts"]["ok"] == 4
    assert output.exists(MANIFEST)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_embed_and_index_follow_the_rows_that_a_retry_brings(
    server: HostileServer, tmp_path: Path, address: str
) -> None:
    paths = [*(f"ok?seed={row}" for row in range(9)), "status?code=503&times=1", "missing"]
    made = _tables(tmp_path, [f"{server.url}/{path}" for path in paths])
    one_worker = {"resources": {"num_workers": 1}}
    tables = tiny_tables(
        tmp_path / "workspace",
        pairs=made["pairs"],
        download=made["download"],
        clip=training(2, batch_size=4),
        embed={"batch_size": 8, **one_worker},
        index={"num_recall_queries": 4},
        tracking={"uri": "off"},
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(tomli_w.dumps(tables).encode())

    def rows() -> dict[str, Any]:
        return {row["step"]: row for row in unclip_json("status", str(recipe))}

    done = unclip("run", str(recipe), "--until", "index", "--address", address)
    assert done.returncode == 0, done.stdout
    assert rows()["index"]["counts"] == {"in": 9, "ok": 9}
    done = unclip("run", str(recipe), "--until", "download", "--retry-failed", "http-503", "--address", address)
    assert done.returncode == 0, done.stdout
    after = rows()
    assert after["download"]["counts"]["ok"] == 10
    assert [after[step]["state"] for step in ("clip", "embed", "index")] == ["todo", "todo", "done"]
    assert "download was made anew, with other content" in after["embed"]["reasons"]
    assert after["index"]["reasons"] == ["runs again if embed, which is out of date, comes out different"]
    done = unclip("run", str(recipe), "--until", "index", "--address", address)
    assert done.returncode == 0, done.stdout
    assert rows()["index"]["counts"] == {"in": 10, "ok": 10}

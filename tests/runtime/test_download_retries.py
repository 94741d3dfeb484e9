"""Other tries of the rows of a download that failed, on a real Ray."""

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pipeline.data import shard_again
from pipeline.data.retries import ask_retry, staged_in, waiting_retries
from pipeline.data.splits import Split
from pipeline.errors import StepError
from pipeline.runtime import download
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.download import run_download
from pipeline.runtime.download_workers import RetryWorker, write_split
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import MANIFEST, Artifact
from tests.data.hostile import HostileServer
from tests.runtime.downloads import context_of, die_of_killers, messages_of, tables_of
from tests.tiny.command import ROOT, unclip, unclip_json
from tests.tiny.recipe import tiny_tables, training

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def address(ray_head: Any) -> Generator[str]:
    """A cluster for the commands of this file: each would start its own."""
    with ray_head(environment={"PYTHONPATH": str(ROOT)}) as head, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield head.address


def _retry(context: StepContext, failed_class: str) -> StepResult:
    """Run the download as a run does that is to try failed rows again."""
    ask_retry(context.output, failed_class)
    return run_download(replace(context, retry_failed=failed_class))


class _FragileRetry(RetryWorker):
    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        die_of_killers(self)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(600)
def test_another_try_finds_the_row_that_takes_workers_down(
    hostile: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = "status?code=503&times=1"
    paths = ["ok?seed=1", f"{busy}&n=1", f"{busy}&killer", f"{busy}&n=3", "missing", "ok?seed=2"]
    urls = [f"{hostile.url}/{path}" for path in paths]
    context = context_of(tables_of(tmp_path, urls, samples_per_shard=6))
    assert run_download(context).counts["ok"] == 2
    monkeypatch.setattr(download, "RetryWorker", _FragileRetry)
    monkeypatch.setattr(download, "_MOST_LOSSES", 10)
    result = _retry(context, "all")
    assert result.counts == {"in": 6, "ok": 4, "failed_to_download": 2, "failed_to_resize": 0}
    messages = [None, None, "http-503: Busy", None, "http-404: Not Found", None]
    assert messages_of(context.output) == messages


@pytest.mark.usefixtures("local_ray")
def test_a_retry_in_parts_goes_on_from_the_parts_that_are_done(
    hostile: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = "status?code=503&times=1"
    urls = [*(f"{hostile.url}/{busy}&n={row}" for row in range(4)), f"{hostile.url}/ok"]
    context = replace(context_of(tables_of(tmp_path, urls, samples_per_shard=5)), retry_failed="http")
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
    assert messages_of(staged) == [None, None, None, "http-503: Busy", None]
    assert messages_of(output) == [*["http-503: Busy"] * 4, None]
    assert [hostile.requests[f"127.0.0.1/{busy}&n={row}"] for row in range(4)] == [2, 2, 2, 1]


class _StopsOnce(RetryWorker):
    """Ends the step at the second shard, once."""

    def __call__(self, shard: str) -> ShardRecord:
        if shard == "00001" and not self._context.output.exists("live/stopped.json"):
            self._context.output.write_json("live/stopped.json", True)
            raise StepError("stopped")
        return super().__call__(shard)


@pytest.mark.usefixtures("local_ray")
def test_a_retry_that_is_stopped_while_it_fetches_is_finished_by_the_next_run(
    hostile: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RetryWorker", _StopsOnce)
    busy = "status?code=503"
    paths = ["missing", f"{busy}&n=0", f"{busy}&times=1&n=1", "ok", f"{busy}&times=1&n=2", f"{busy}&times=1&n=3"]
    context = context_of(tables_of(tmp_path, [f"{hostile.url}/{path}" for path in paths], samples_per_shard=2))
    assert run_download(context).counts["ok"] == 1
    with pytest.raises(StepError, match="stopped"):
        _retry(context, "http-503")
    result = run_download(context)
    assert result.counts == {"in": 6, "ok": 4, "failed_to_download": 2, "failed_to_resize": 0}
    requests = [hostile.requests[f"127.0.0.1/{path}"] for path in paths]
    assert requests == [1, 2, 2, 1, 2, 2]  # what was tried before the stop is not tried once more
    assert waiting_retries(context.output) == []
    run_download(replace(context, retry_failed="http-503"))  # as Ray does if it loses the finished task
    assert [hostile.requests[f"127.0.0.1/{path}"] for path in paths] == requests


@pytest.mark.usefixtures("local_ray")
def test_a_retry_that_is_stopped_anywhere_is_finished_by_the_next_run(
    hostile: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ["ok?seed=1", "status?code=503&times=1", "ok?seed=2", "status?code=500&times=1", "missing", "ok?seed=3"]
    context = context_of(tables_of(tmp_path, [f"{hostile.url}/{path}" for path in paths], samples_per_shard=2))
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
    assert messages_of(output, "00002") == ["http-404: Not Found", None]
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
    context = context_of(tables_of(tmp_path, ["http://a.example/a.jpg"]))
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


def test_the_command_tries_failed_rows_again(hostile: HostileServer, tmp_path: Path, address: str) -> None:
    paths = ["ok?seed=1", "status?code=503&times=1", "status?code=500&times=1", "status?code=502&times=1"]
    tables = tables_of(tmp_path, [f"{hostile.url}/{path}" for path in paths])
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
    hostile: HostileServer, tmp_path: Path, address: str
) -> None:
    paths = [*(f"ok?seed={row}" for row in range(9)), "status?code=503&times=1", "missing"]
    made = tables_of(tmp_path, [f"{hostile.url}/{path}" for path in paths])
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

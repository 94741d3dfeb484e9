"""Pairs leave a workspace in which work is killed, removed or under way."""

import dataclasses
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tomli_w

from pipeline.data.retries import adopt, staged_in
from pipeline.data.shards import ShardPictures
from pipeline.errors import StepError
from pipeline.forget import rewrite
from pipeline.forget.forget import finish
from pipeline.recipe.plan import make_plan, manifest_of
from pipeline.recipe.tables import to_dict
from pipeline.retrieve import NeighbourIndex
from pipeline.runtime.step_task import forget_if_inputs_changed
from pipeline.workspace import local_files
from pipeline.workspace.forgotten import FORGOTTEN, Forgotten, Pending, Rewrite
from pipeline.workspace.lock import in_use, locked_workspace
from pipeline.workspace.store import INPUTS, MANIFEST, Artifact, Workspace
from tests.filter.planted import make_context
from tests.forget.made import (
    BY_UID,
    BY_URL,
    Made,
    commit,
    copy_of,
    forget_names,
    texts_of,
    unlocked,
    without_none,
)
from tests.tiny.command import unclip_here
from tests.tiny.shards import Sample, write_shard


def test_a_kill_between_a_table_and_its_tar_leaves_no_picture(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_names(made, made.uids[BY_UID])
    publish = local_files._publish  # pyright: ignore[reportPrivateUsage]

    def stop_at_tar(temporary: Path, target: Path) -> None:
        if target.suffix == ".tar":
            raise StepError("killed")
        publish(temporary, target)

    monkeypatch.setattr(local_files, "_publish", stop_at_tar)
    with pytest.raises(StepError, match="killed"):
        made.finish()
    monkeypatch.setattr(local_files, "_publish", publish)
    assert made.pictures[BY_UID].decode("latin-1") in texts_of(made.workspace)
    made.finish()
    assert made.pictures[BY_UID].decode("latin-1") not in texts_of(made.workspace)


def test_what_a_retry_gained_stays_after_a_kill_while_it_was_put_in_place(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, gained, move = made.artifact("download"), "http://a/clean-2", Artifact.move
    own = ("uid", "url", "caption", "split", "key", "status", "error_message")
    samples = [
        Sample(
            row["url"],
            row["caption"],
            made.pictures[row["url"]],
            columns={name: value for name, value in row.items() if name not in own} | {"error_message": ""},
        )
        for row in pq.read_table(download.path("00000.parquet")).to_pylist()
    ]
    assert {BY_URL, gained} <= {sample.url for sample in samples}
    failed = {"error_message": "timeout"}
    old = [
        dataclasses.replace(one, picture=None, columns=one.columns | failed) if one.url == gained else one
        for one in samples
    ]
    for artifact, rows in ((download, old), (staged_in(download, "timeout"), samples)):
        write_shard(artifact, "00000", rows, "png")
        files = {name: artifact.describe(name) for name in ("00000.parquet", "00000.tar")}
        artifact.commit_shard(dataclasses.replace(artifact.shard_record("00000"), files=files))
    download.remove(MANIFEST)

    def move_table(source: Artifact, name: str, target: Artifact) -> None:
        if not name.endswith(".parquet"):
            raise StepError("killed")
        move(source, name, target)

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "move", move_table)
        with pytest.raises(StepError, match="killed"):
            adopt(download)
    forget_names(made, BY_URL)
    made.finish()
    rows = {row["url"]: row for row in pq.read_table(download.path("00000.parquet")).to_pylist()}
    pictures = ShardPictures(download.path("00000.tar"), "00000")
    assert pictures.read(rows[gained]["key"], rows[gained]["uid"]) == made.pictures[gained]
    assert BY_URL not in rows
    assert [name for name in download.names() if "retry" in name] == []


def test_what_was_removed_before_it_was_rewritten_stops_nothing(made: Made) -> None:
    unfinished = made.workspace.artifact("index", "unfinished")
    unfinished.write_bytes("live/segment_00000/rows", made.uids[BY_URL].encode())
    forget_names(made, BY_URL)
    for name in ("pairs", "embed", "filter_embeddings", "index"):
        made.artifact(name).destroy()
    made.artifact("filter").remove("manifest.json")  # a removal that was killed
    assert made.finish() is not None
    assert Pending.read(made.workspace.root) is None
    assert (made.artifact("filter").names(), unfinished.names()) == ([], [])
    assert made.uids[BY_URL] not in texts_of(made.workspace)


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_it_is_done_again_with_the_same_bytes(
    first: Made, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int
) -> None:
    other = copy_of(made, tmp_path / "calm")
    names = [BY_URL, made.uids[BY_UID]]
    monkeypatch.setattr("pipeline.workspace.forgotten.secrets.token_hex", lambda _: "salt")

    def work(one: Made) -> None:
        if Pending.read(one.workspace.root) is None:
            forget_names(one, *names)
        one.finish()

    start = time.monotonic()
    work(other)
    took_s, rng, num_killed = time.monotonic() - start, random.Random(0), 0
    while num_killed < num_kills:
        process = os.fork()
        if not process:
            try:
                work(made)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, took_s))
        os.kill(process, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:  # it was done before: from the beginning
            shutil.rmtree(made.workspace.root)
            made = copy_of(first, Path(made.workspace.root))
            continue
        num_killed += 1
        pending = Pending.read(made.workspace.root)
        if pending is not None and pending.has_begun and pending.indexes:
            with pytest.raises(StepError, match="finish with: unclip forget --compact"):
                NeighbourIndex.open(made.artifact("index"))
    for name in made.inputs("evaluate"):
        made.artifact(name).clear_temporaries()
    work(made)
    for name in ("pairs", "download", "filter", "embed", "filter_embeddings"):
        assert _files(made, name) == _files(other, name)
    assert NeighbourIndex.open(made.artifact("index")).num_rows == 26


def _pending(workspace: Workspace, shards: str, rewrite_one: Callable[[str], None], patch: pytest.MonkeyPatch) -> None:
    """Some shards of a download under way, which a function stands for."""
    Pending((Rewrite("download", "key", tuple(shards)),)).write(workspace.root)
    patch.setitem(rewrite._REWRITERS, "download", lambda _artifact, shard, _forgotten: rewrite_one(shard))


def test_a_takedown_that_was_stopped_goes_on_with_the_shards_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, rewritten, said, stops = Workspace(str(tmp_path)), list[str](), list[str](), ["c"]

    def rewrite_one(shard: str) -> None:
        if shard in stops:
            stops.remove(shard)
            raise StepError("stopped")
        rewritten.append(shard)

    _pending(workspace, "abcde", rewrite_one, monkeypatch)
    monkeypatch.setattr(rewrite, "_NOTE_EVERY_S", 0.0)
    with pytest.raises(StepError, match="stopped"):
        finish(workspace, pytest.fail, unlocked, said.append)
    words = "forgotten rows leave download: "
    assert said == [f"{words}{done} of 5 shards are rewritten" for done in (1, 2)]
    rewritten.clear()
    assert finish(workspace, pytest.fail, unlocked, said.append) is not None
    assert sorted(rewritten) == ["c", "d", "e"]
    assert said[-1] == f"{words}3 of 3 shards are rewritten"
    assert Pending.read(workspace.root) is None


def test_a_takedown_rewrites_several_shards_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, both = Workspace(str(tmp_path)), threading.Barrier(2, timeout=20)

    def rewrite_one(_shard: str) -> None:
        both.wait()

    _pending(workspace, "ab", rewrite_one, monkeypatch)
    assert finish(workspace, pytest.fail, unlocked) is not None


def _files(made: Made, step: str) -> dict[str, object]:
    artifact = made.artifact(step)
    names = [name for name in artifact.names() if not name.endswith(("_stats.json", "done.json", "manifest.json"))]
    return {name: artifact.describe(name) for name in names}


def test_a_second_user_waits_and_both_are_forgotten(made: Made, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(without_none(to_dict(made.recipe))))
    with locked_workspace(made.workspace, print):
        done = unclip_here("forget", BY_URL, "--recipe", str(recipe), "--delete")
    assert (done.returncode, done.stdout) == (4, "")
    assert "another run is using this workspace" in done.stderr
    assert not (Path(made.workspace.root) / FORGOTTEN).exists()
    for name in (BY_URL, made.uids[BY_UID]):
        assert unclip_here("forget", name, "--recipe", str(recipe), "--delete").returncode == 0
    assert len(Forgotten.read(made.workspace.root).entries) == 2
    made.finish()
    contents = texts_of(made.workspace)
    assert made.uids[BY_URL] not in contents
    assert made.uids[BY_UID] not in contents


def test_what_is_read_is_not_rewritten(made: Made) -> None:
    forget_names(made, BY_URL)
    with in_use(made.workspace, [f"index/{made.artifact('index').key}"]), pytest.raises(StepError, match="in use by"):
        made.finish()
    assert made.uids[BY_URL] in texts_of(made.workspace)
    assert made.finish() is not None


def test_a_training_under_way_goes_on_and_says_so_when_it_is_done(made: Made) -> None:
    [step] = [step for step in make_plan(made.recipe) if step.name == "prior"]
    context = make_context(Path(made.recipe.workspace), "prior", made.recipe)
    output = context.output
    output.clear()
    forget_if_inputs_changed(context)
    output.write_bytes("live/checkpoint", b"weights")
    forget_names(made, BY_URL)
    made.finish()
    forget_if_inputs_changed(context)
    assert output.exists("live/checkpoint")
    output.commit(dataclasses.replace(manifest_of(step, output), input_contents=output.read_json(INPUTS)))
    manifest = output.manifest()
    assert manifest is not None
    assert Forgotten.read(made.workspace.root).trained_on(manifest) == 1
    commit(context)  # made anew
    manifest = output.manifest()
    assert manifest is not None
    assert Forgotten.read(made.workspace.root).trained_on(manifest) == 0

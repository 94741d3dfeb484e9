"""An object store that fails: faults that pass change no byte, and what does not pass is one sentence."""

import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.training_rows import ShardReader
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.recipe.plan import artifact_of, finished_artifacts, make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.status import plan_status
from pipeline.sampling.sample import sample_recipe
from pipeline.workspace import objects
from pipeline.workspace.files import open_file
from pipeline.workspace.manifest import content_of
from pipeline.workspace.store import Artifact, Workspace
from tests.s3_server import S3Server, proxy
from tests.tiny.recipe import merge
from tests.tiny.shards import drawn_sample
from tests.tiny.workspace import NUM_PICTURES, evaluated_tables, finish_workspace
from tests.workspace.conftest import use

_CONTENT = bytes(range(256)) * 1000


@pytest.mark.parametrize("kind", ["500", "throttled", "reset", "half", "slow"])
def test_a_fault_that_passes_changes_no_byte(
    kind: str, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    s3_server.fail(kind, "PUT", "00000.tar", times=2, seconds=0.2)
    with artifact.write("00000.tar") as path:
        path.write_bytes(_CONTENT)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "other"))
    s3_server.fail(kind, "GET", "00000.tar", times=2, seconds=0.2)
    assert artifact.path("00000.tar").read_bytes() == _CONTENT
    s3_server.fail(kind, "GET", "00000.tar", times=2, seconds=0.2)
    with open_file(f"{artifact.uri}/00000.tar") as stream:
        stream.seek(1000)
        assert stream.read(5000) == _CONTENT[1000:6000]
    s3_server.fail(kind, "HEAD", "00000.tar", times=2, seconds=0.2)
    assert artifact.exists("00000.tar")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])  # a copy; a file that is removed, alone or with others
def test_a_move_whose_answer_is_lost_has_moved_the_file(method: str, bucket: str, s3_server: S3Server) -> None:
    source, target = Artifact(f"{bucket}/step/key/live/aside"), Artifact(f"{bucket}/step/key")
    target.write_bytes("00000.tar", b"old")
    source.write_bytes("00000.tar", b"new")
    s3_server.fail("lost", method, bucket.removeprefix("s3://"), times=6)  # more often than the driver asks again
    source.move("00000.tar", target)
    assert target.read_bytes("00000.tar") == b"new"
    assert target.names() == ["00000.tar"]
    with pytest.raises(FileNotFoundError):
        source.move("00000.tar", target)


def test_a_clock_that_the_store_refuses_is_told_unless_it_is_set_right(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, now_s = Artifact(f"{bucket}/step/key"), time.time
    artifact.write_bytes("00000.tar", _CONTENT)
    monkeypatch.setattr(time, "time", lambda: now_s() + 86_400)
    for method in ("HEAD", "GET"):  # the answer to a HEAD has no body that says why
        s3_server.fail("skewed", method, "00000.tar", times=2)
        assert artifact.exists("00000.tar")
        with open_file(f"{artifact.uri}/00000.tar") as stream:
            assert stream.read() == _CONTENT
    monkeypatch.setattr(objects, "_PATIENCE_S", 0.0)
    s3_server.fail("skewed", "HEAD", "00000.tar")
    with pytest.raises(StepError, match=r"this machine's clock is wrong \(.*\); set it, then run again"):
        artifact.exists("00000.tar")
    monkeypatch.setattr(time, "time", now_s)
    s3_server.fail("skewed", "HEAD", "00000.tar")
    with pytest.raises(ConfigError, match="no access"):  # by a clock that is right, it is something else
        artifact.exists("00000.tar")


def test_a_server_that_is_killed_and_comes_back_changes_no_byte(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    use(s3_server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}, monkeypatch)
    artifact = Artifact(f"{bucket}/step/key")
    with proxy(port, s3_server):
        artifact.write_bytes("first", b"1")
    back = threading.Event()

    def come_back() -> None:
        time.sleep(1)
        with proxy(port, s3_server):
            back.wait(60)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        with artifact.write("00000.tar") as path:
            path.write_bytes(_CONTENT)
        assert artifact.names() == ["00000.tar", "first"]
        assert artifact.path("00000.tar").read_bytes() == _CONTENT
    finally:
        back.set()
        thread.join()


def test_of_many_files_only_one_that_failed_is_asked_for_again(bucket: str, s3_server: S3Server) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    names = [f"{number}.json" for number in range(20)]
    for number, name in enumerate(names):
        artifact.write_json(name, number)
    s3_server.requests()
    s3_server.fail("500", "GET", "/7.json")
    assert artifact.read_jsons(names) == list(range(20))
    assert Counter(request.name.rpartition("/")[2].partition("!")[0] for request in s3_server.counted()) == {
        name: 2 if name == "7.json" else 1 for name in names
    }
    with pytest.raises(DataError, match="no file gone"):
        artifact.read_jsons([*names, "gone.json"])
    s3_server.requests()
    s3_server.fail("500", "GET", "/7.json")
    assert artifact.find_jsons(["gone.json", *names]) == [None, *range(20)]
    assert len(s3_server.counted()) == 22


def test_a_missing_bucket_is_one_sentence(bucket: str) -> None:
    with pytest.raises(ConfigError, match="there is no bucket no-such-bucket; create it"):
        Workspace("s3://no-such-bucket/prefix").check()
    with pytest.raises(ConfigError, match="there is no bucket"):
        Artifact("s3://no-such-bucket/step/key").write_bytes("file", b"")
    Workspace(f"{bucket}/prefix").check()


def test_missing_credentials_are_one_sentence(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    environment = {name: str(tmp_path / "none") for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
    use(environment, monkeypatch)
    with pytest.raises(ConfigError, match=r"no access \(Unable to locate credentials\); set AWS_ACCESS_KEY_ID"):
        Workspace(f"{bucket}/prefix").check()


def test_an_endpoint_that_does_not_answer_is_one_sentence(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(s3_server.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, monkeypatch)
    monkeypatch.setattr(objects, "_FIRST_PATIENCE_S", 0.0)
    with pytest.raises(ConfigError, match=r"no answer .*; is AWS_ENDPOINT_URL right"):
        Workspace(f"{bucket}/prefix").check()


def test_a_recipe_in_a_store_has_the_bytes_of_one_here_whatever_fails(
    bucket: str, s3_server: S3Server, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(merge(evaluated_tables(tmp_path), {"workspace": f"{bucket}/prefix"}))
    s3_server.fail("reset", "PUT", "/decoder/", times=2)
    finish_workspace(
        recipe, (drawn_sample(i, seed=recipe.seed, is_validation=i % 5 == 0) for i in range(NUM_PICTURES)), "png"
    )
    here, there = Workspace(tiny.workspace), Workspace(recipe.workspace)
    steps = [step for step in make_plan(recipe) if step.name != "evaluate"]
    for step in steps:
        manifests = [artifact_of(workspace, step).manifest() for workspace in (here, there)]
        assert len({content_of(manifest) for manifest in manifests if manifest}) == 1, step.name
    assert [status.state for status in plan_status(there, steps)] == ["done"] * len(steps)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "another-machine"))
    s3_server.requests()
    s3_server.fail("half", "GET", "/decoder/", times=2)
    for one, out in ((tiny, tmp_path / "here"), (recipe, tmp_path / "there")):
        sample_recipe(one, ["a red circle"], num_images=2, seed=3, out_dir=out)
    for name in ("000-0.png", "000-1.png"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    artifacts = finished_artifacts(recipe, ("download", "embed"))
    reader = ShardReader(artifacts["download"], artifacts["embed"], "train")
    table, pictures = reader.table("00000"), reader.pictures("00000")
    keys, uids = (table.take(name, np.arange(len(table))).to_pylist() for name in ("key", "uid"))
    assert [pictures.decode(*row).size for row in zip(keys, uids, strict=True)] == [(32, 32)] * len(table)
    fetched = [path for method, path, _ in s3_server.requests() if method == "GET" and "!" not in path]
    for name in ("00000.tar", "00000.parquet", "model.safetensors"):
        assert all(fetched.count(path) == 1 for path in fetched if name in path), name

"""A workspace in an object store, on a local S3 server: nothing stale, nothing twice."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.shard_tables import read_table
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.forget import rewrite as rewriting
from pipeline.workspace import cache, objects, stored_files
from pipeline.workspace.digests import fingerprint
from pipeline.workspace.files import open_file
from pipeline.workspace.forgotten import Forgotten, Rewrite
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Artifact, Workspace
from tests.s3_server import S3Server
from tests.workspace.conftest import make_manifest

_CONTENT = bytes(range(256)) * 1000


def _fetches(server: S3Server, name: str) -> list[int]:
    return [size for method, path, size in server.requests() if method == "GET" and name in path]


def _name(uri: str) -> str:
    return uri.removeprefix("s3://")


def test_nothing_is_stale_that_another_machine_wrote(bucket: str, s3_server: S3Server) -> None:
    artifact, folder = Artifact(f"{bucket}/step/key"), f"{_name(bucket)}/step/key"
    assert artifact.names() == []
    s3_server.put(f"{folder}/metrics.jsonl", b"1\n")
    assert artifact.names() == ["metrics.jsonl"]
    assert artifact.path("metrics.jsonl").read_text() == "1\n"
    s3_server.put(f"{folder}/metrics.jsonl", b"1\n2\n")
    assert artifact.path("metrics.jsonl").read_text() == "1\n2\n"
    s3_server.put(f"{folder}/metrics.jsonl", b"3\n4\n")  # of the same size
    assert artifact.path("metrics.jsonl").read_text() == "3\n4\n"
    with open_file(f"{bucket}/step/key/metrics.jsonl") as stream:
        assert stream.read() == b"3\n4\n"
    before = fingerprint(f"{bucket}/step/key")
    assert fingerprint(f"{bucket}/step/key") == before
    s3_server.put(f"{folder}/metrics.jsonl", b"5\n6\n")
    assert fingerprint(f"{bucket}/step/key") != before


def test_a_file_is_fetched_once_for_all_readers_of_a_machine(bucket: str, s3_server: S3Server) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    s3_server.put(f"{_name(bucket)}/step/key/00000.tar", _CONTENT)
    s3_server.fail("slow", "GET", "00000.tar", seconds=0.3)
    with ThreadPoolExecutor(8) as threads:  # each opens the lock for itself, as processes do
        paths = list(threads.map(artifact.path, ["00000.tar"] * 8))
    assert [path.read_bytes() == _CONTENT for path in paths] == [True] * 8
    assert _fetches(s3_server, "00000.tar") == [len(_CONTENT)]
    assert artifact.describe("00000.tar")["bytes"] == len(_CONTENT)
    assert _fetches(s3_server, "00000.tar") == []


def test_what_this_machine_wrote_is_neither_fetched_nor_read_back(bucket: str, s3_server: S3Server) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    with artifact.write("00000.tar") as path:
        path.write_bytes(_CONTENT)
    assert artifact.describe("00000.tar") == Artifact(artifact.uri).describe("00000.tar")
    assert artifact.path("00000.tar").read_bytes() == _CONTENT
    assert _fetches(s3_server, "00000.tar") == []


def test_another_machine_commits_what_it_has_not_written_and_does_not_read(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    with artifact.write("model.safetensors") as path:
        path.write_bytes(_CONTENT)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "other"))
    other = Artifact(artifact.uri)
    other.learn(artifact.known())
    described = other.describe_files()
    assert _fetches(s3_server, "model.safetensors") == []
    assert described == Artifact(artifact.uri).describe_files()
    assert _fetches(s3_server, "model.safetensors") == [len(_CONTENT)]


def test_no_request_is_made_that_says_what_is_known(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def kinds() -> list[str]:
        return [request.kind for request in s3_server.counted()]

    artifact = Artifact(f"{bucket}/step/key")
    with artifact.write("00000.tar") as path:
        path.write_bytes(_CONTENT)
    assert kinds() == ["PUT", "HEAD"]
    described = artifact.describe("00000.tar")
    assert kinds() == []
    assert artifact.describe("00000.tar") == described  # asked for again, it is what the store has by then
    assert kinds() == ["HEAD"]
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "another-machine"))
    paths = [artifact.matching("00000.tar", described) for _ in range(2)]
    assert [path and path.read_bytes() for path in paths] == [_CONTENT] * 2
    assert kinds() == ["HEAD", "GET", "HEAD"]
    assert not artifact.exists("none.json")
    assert kinds() == ["HEAD"]
    assert artifact.find_json("none.json") is None
    assert kinds() == ["GET"]
    for number in range(3):
        artifact.write_json(f"{number}.json", number)
    assert artifact.read_jsons(["0.json", "1.json", "2.json"]) == [0, 1, 2]
    assert kinds() == ["PUT"] * 3 + ["GET"] * 3
    with pytest.raises(DataError, match=r"no file 4\.json"):
        artifact.read_jsons(["0.json", "4.json"])
    kinds()
    assert artifact.find_jsons(["0.json", "none.json", "2.json"]) == [0, None, 2]
    assert kinds() == ["GET"] * 3


def test_a_file_that_differs_from_its_record_is_not_kept(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    with artifact.write("00000.tar") as path:
        path.write_bytes(_CONTENT)
    described = artifact.describe("00000.tar")
    s3_server.put(f"{_name(bucket)}/step/key/00000.tar", bytes(len(_CONTENT)))
    for machine in ("this", "another"):
        monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / machine))
        assert artifact.matching("00000.tar", described) is None
        assert not list((tmp_path / machine).rglob("00000.tar"))
    assert artifact.path("00000.tar").read_bytes() == bytes(len(_CONTENT))
    assert artifact.matching("00000.tar", described) is None  # it is here, and another one
    here = Artifact(str(tmp_path / "step/key"))
    with here.write("00000.tar") as path:
        path.write_bytes(_CONTENT)
    assert here.matching("00000.tar", described) == here.path("00000.tar")
    assert here.matching("00000.tar", described | {"sha256": ""}) is None


def test_a_large_file_comes_in_parts_and_no_byte_twice(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PART_BYTES", 50_000)
    monkeypatch.setattr(objects, "_PARTS_AT_ONCE", 2)
    s3_server.put(f"{_name(bucket)}/step/key/00000.tar", _CONTENT)
    s3_server.counted()
    s3_server.fail("half", "GET", "00000.tar", times=2)
    assert Artifact(f"{bucket}/step/key").path("00000.tar").read_bytes() == _CONTENT
    fetched = [request.num_bytes for request in s3_server.counted() if request.kind == "ranged GET"]
    assert sorted(set(fetched)) == [0, len(_CONTENT) % 50_000, 50_000]  # 0: those that failed
    s3_server.put(f"{_name(bucket)}/step/key/00001.tar", _CONTENT)
    s3_server.counted()
    assert Artifact(f"{bucket}/step/key").path("00001.tar").read_bytes() == _CONTENT
    requests = [request for request in s3_server.counted() if request.name.endswith(".tar")]
    assert Counter(request.kind for request in requests) == {"HEAD": 1, "ranged GET": 6}
    assert sum(request.num_bytes for request in requests) == len(_CONTENT)


def test_a_fetched_file_is_compared_with_its_record(bucket: str, s3_server: S3Server) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    s3_server.put(f"{_name(bucket)}/step/key/00000.tar", _CONTENT)
    record = ShardRecord(shard="00000", counts={}, files={"00000.tar": {"bytes": 3, "sha256": "0" * 64}})
    artifact.commit_shard(record)
    assert artifact.shard_records() == {"00000": record}
    for _ in range(2):
        with pytest.raises(DataError, match=r"00000.tar: does not match its checksum; bring it back"):
            artifact.path("00000.tar")
    right = artifact.describe("00000.tar")
    artifact.commit_shard(ShardRecord(shard="00000", counts={}, files={"00000.tar": right}))
    assert artifact.path("00000.tar").read_bytes() == _CONTENT


def test_records_of_a_finished_step_are_one_file(bucket: str, s3_server: S3Server) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    records = {f"{n:05d}": ShardRecord(shard=f"{n:05d}", counts={"in": n, "ok": n}, files={}) for n in range(20)}
    for record in records.values():
        artifact.commit_shard(record)
    assert artifact.fold_records() == records
    s3_server.requests()
    assert artifact.shard_records() == records
    assert len(s3_server.requests()) > 20  # until the step is committed, each record counts for itself
    assert artifact.fold_records() == records
    s3_server.counted()
    files = artifact.describe_files(records)
    assert [request.kind for request in s3_server.counted()] == ["LIST"]  # what was folded is not read again
    assert files == Artifact(artifact.uri).describe_files()
    artifact.commit(make_manifest(files=files))
    s3_server.requests()
    assert Artifact(artifact.uri).shard_records() == records
    assert len(s3_server.requests()) <= 2
    artifact.remove("manifest.json")  # as the messages on a damaged shard say: only that one is made again
    artifact.remove("00007.done.json")
    assert artifact.shard_records().keys() == records.keys() - {"00007"}


def test_a_column_of_a_table_is_read_without_the_table(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    vectors = np.random.default_rng(0).random(200_000)
    pq.write_table(pa.table({"vector": vectors, "split": ["train"] * len(vectors)}), tmp_path / "0.parquet")
    s3_server.put(f"{_name(bucket)}/step/key/0.parquet", (tmp_path / "0.parquet").read_bytes())
    table = read_table(artifact.ranged("0.parquet"), ["split"])
    assert table.column("split").to_pylist() == ["train"] * len(vectors)
    assert sum(_fetches(s3_server, "0.parquet")) < (tmp_path / "0.parquet").stat().st_size / 4
    assert read_table(artifact.path("0.parquet"), ["vector"])["vector"].to_numpy().tolist() == vectors.tolist()
    s3_server.requests()
    read_table(artifact.ranged("0.parquet"), ["split"])  # it is here now
    assert _fetches(s3_server, "0.parquet") == []


def test_the_cache_keeps_what_was_used_last_within_its_bytes(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    for number in range(6):
        s3_server.put(f"{_name(bucket)}/step/key/{number}.tar", _CONTENT)
    monkeypatch.setenv("UNCLIP_CACHE_GB", str(3.5 * len(_CONTENT) / 1e9))
    monkeypatch.setattr(cache, "_GRACE_S", 0.0)
    for name in ("0", "1", "2", "0", "3", "0", "4"):
        assert artifact.path(f"{name}.tar").read_bytes() == _CONTENT
        time.sleep(0.01)
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.tar")) == ["0.tar", "3.tar", "4.tar"]
    s3_server.requests()
    assert artifact.path("1.tar").read_bytes() == _CONTENT
    assert _fetches(s3_server, "1.tar") == [len(_CONTENT)]
    monkeypatch.setattr(cache, "_GRACE_S", 60.0)  # whoever was given a path may not have opened it yet
    paths = [artifact.path(f"{number}.tar") for number in range(6)]
    assert all(path.exists() for path in paths)
    monkeypatch.setattr(cache, "_added_bytes", float("inf"))
    entry = next((tmp_path / "cache").rglob(".5.tar.cached"))
    use, rest = entry.read_bytes()[:21], entry.read_bytes()[21:]
    entry.write_bytes(b"9" + use[1:] + rest)  # of another start of the machine: it counts as the oldest
    assert artifact.path("0.tar").exists()
    s3_server.put(f"{_name(bucket)}/step/key/6.tar", _CONTENT)
    assert artifact.path("6.tar").exists()
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.tar")) == [f"{n}.tar" for n in (0, 1, 2, 3, 4, 6)]
    monkeypatch.setenv("UNCLIP_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="UNCLIP_CACHE_GB=much: write a number of gigabytes"):
        cache.limit_bytes(0, tmp_path)


def test_what_a_killed_writer_left_is_removed_with_the_next_file(bucket: str, tmp_path: Path) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    artifact.write_bytes("first", b"")
    with artifact.write("second") as path:
        abandoned = path.parent.parent / "abandoned"
        abandoned.mkdir()
        (abandoned / "half").write_bytes(_CONTENT)
        with artifact.write("third") as other:
            other.write_bytes(b"3")
            assert not abandoned.exists()
        path.write_bytes(b"2")
    assert artifact.names() == ["first", "second", "third"]


def test_uploads_in_parts_that_a_kill_left_are_given_up(bucket: str) -> None:
    store = ObjectStore(f"{bucket}/step/key")
    files = store._files
    names = [_name(bucket), "step/key/big.bin"]
    files.call_s3("create_multipart_upload", Bucket=names[0], Key=names[1])
    files.call_s3("create_multipart_upload", Bucket=names[0], Key="step/key2/of-another.bin")
    Artifact(f"{bucket}/step/key").clear_temporaries()
    assert [upload["Key"] for upload in files.list_multipart_uploads(names[0])] == ["step/key2/of-another.bin"]


def test_a_role_that_may_not_list_uploads_runs_all_the_same(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files, artifact, requests = ObjectStore(bucket)._files, Artifact(f"{bucket}/step/key"), list[str]()
    files.call_s3("create_multipart_upload", Bucket=_name(bucket), Key="step/key/big.bin")

    def refuse(request: str) -> None:
        requests.append(request)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(files, "abort_mpu", lambda *_: refuse("abort"))
    artifact.clear_temporaries()
    monkeypatch.setattr(files, "call_s3", lambda name, **_: refuse(name))
    artifact.clear_temporaries()
    assert requests == ["abort", "list_multipart_uploads"]


def test_a_shard_is_rewritten_again_after_a_kill_before_its_record(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact, forgotten = Artifact(f"{bucket}/pairs/key"), Forgotten("salt").add(["http://a/1"], 0.0, {}, [])
    rows = {"uid": ["u0", "u1"], "url": ["http://a/0", "http://a/1"], "caption": ["c", "c"], "split": ["train"] * 2}
    with artifact.write("00000.parquet") as path:
        pq.write_table(pa.table(rows), path)
    files = {"00000.parquet": artifact.describe("00000.parquet")}
    artifact.commit_shard(ShardRecord(shard="00000", counts={"in": 2, "ok": 2}, files=files))
    artifact.commit(make_manifest(step="pairs", files=artifact.describe_files(artifact.fold_records())))
    work = Rewrite("pairs", "key", ("00000",))

    def stop(*_: object) -> None:
        raise StepError("killed")

    commit = rewriting._commit
    monkeypatch.setattr(rewriting, "_commit", stop)
    with pytest.raises(StepError, match="killed"):
        rewriting.rewrite(artifact, work, forgotten, lambda: None, lambda _: None)
    monkeypatch.setattr(rewriting, "_commit", commit)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "of-another-machine"))
    rewriting.rewrite(artifact, work, forgotten, lambda: None, lambda _: None)
    assert pq.read_table(artifact.path("00000.parquet")).column("url").to_pylist() == ["http://a/0", ""]
    assert artifact.shard_records()["00000"].files == {"00000.parquet": artifact.describe("00000.parquet")}
    artifact.verify("00000.parquet")


def test_files_are_removed_many_with_one_request(bucket: str, s3_server: S3Server) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    for number in range(5):
        artifact.write_bytes(f"{number}", b"")
    Artifact(f"{bucket}/step/key2").write_bytes("of-another", b"")
    s3_server.requests()
    artifact.clear()
    changes = [method for method, _, _ in s3_server.requests() if method in {"DELETE", "POST"}]
    assert len(changes) <= 2  # the commit, and the rest
    assert (artifact.names(), Artifact(f"{bucket}/step/key2").names()) == ([], ["of-another"])


def test_two_commits_of_one_artifact_are_one(bucket: str) -> None:
    artifact = Artifact(f"{bucket}/step/key")
    artifact.commit(make_manifest(created=1.0))
    artifact.commit(make_manifest(created=1.0))  # the same one, whose answer was lost
    with pytest.raises(StepError, match="another run has committed this step"):
        artifact.commit(make_manifest(created=2.0))
    manifest = artifact.manifest()
    assert manifest is not None
    assert manifest.created == 1.0


def test_an_artifact_in_a_store_is_sized_and_destroyed(bucket: str) -> None:
    workspace = Workspace(f"{bucket}/prefix")
    artifact = workspace.artifact("prior", "key")
    artifact.write_bytes("live/checkpoint", b"12345")
    assert artifact.sizes() == {"live/checkpoint": 5}
    first = artifact.stamps("live/")
    assert list(first) == ["live/checkpoint"]
    assert artifact.stamps("live/") == first
    artifact.write_bytes("live/checkpoint", b"54321")
    assert artifact.stamps("live/") != first
    assert workspace.keys("prior") == ["key"]
    artifact.destroy()
    assert workspace.keys("prior") == []


def test_an_upload_that_is_gone_at_once_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact("memory://gone/step/key")
    monkeypatch.setattr(ObjectStore, "put_file", lambda *_: None)
    with pytest.raises(StepError, match=r"x: is gone since its upload"), artifact.write("x") as path:
        path.write_bytes(_CONTENT)


def test_a_file_that_the_cache_lost_is_not_one_that_the_store_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise FileNotFoundError("/tmp/cache/x")

    artifact = Artifact("memory://lost/step/key")
    artifact.write_bytes("x", _CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(stored_files, "cached_path", lose)
        with pytest.raises(FileNotFoundError, match="/tmp/cache/x"):
            artifact.path("x")
    monkeypatch.setattr(ObjectStore, "get_file", lose)
    with pytest.raises(DataError, match="no file x"):
        artifact.path("x")

"""Atomic files, commits, checksums, full disks."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import faiss
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pipeline.data.rows import make_uid, split_of
from pipeline.errors import DataError, StepError
from pipeline.workspace import lock
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.lock import in_use, used_artifacts
from pipeline.workspace.manifest import Manifest, ShardRecord, add_counts, check_counts
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.storage import fail_calls


def _manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {"step": "s", "key": "k", "step_version": 1, "section": {}, "inputs": {}}
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def test_write_publishes_only_on_success(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    with artifact.write("sub/a.bin") as path:
        path.write_bytes(b"abc")
        assert artifact.names() == []
    assert artifact.path("sub/a.bin").read_bytes() == b"abc"
    with pytest.raises(TypeError), artifact.write("b.bin") as path:
        path.write_bytes("half")  # pyright: ignore[reportArgumentType]
    assert artifact.names() == ["sub/a.bin"]
    assert [entry.name for entry in (tmp_path / "step/key").rglob("*") if entry.is_file()] == ["a.bin"]


def test_write_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("a.bin", b"old")
    code = (
        "import time; from pipeline.workspace.store import Artifact\n"
        f"with Artifact({artifact.uri!r}).write('a.bin') as path:\n"
        "    path.write_bytes(b'new'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert artifact.path("a.bin").read_bytes() == b"old"
    assert artifact.names() == ["a.bin"]
    assert len(list((tmp_path / "step/key").iterdir())) == 2
    artifact.clear_temporaries()
    assert len(list((tmp_path / "step/key").iterdir())) == 1


def _write_half(artifact: Artifact) -> None:
    with artifact.write("big.bin") as path:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_write_full_disk_is_one_message_and_loses_nothing(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("kept.bin", b"kept")
    with pytest.raises(StepError, match="disk is full") as caught:
        _write_half(artifact)
    assert "big.bin" in str(caught.value)
    assert artifact.names() == ["kept.bin"]


def _save_weights(path: Path) -> None:
    """Writes beside the path, so /dev/full does not stop it: what it says on a full tmpfs."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _save_index(path: Path) -> None:
    index = faiss.IndexFlatIP(8)
    index.add(np.zeros((10_000, 8), np.float32))
    with path.open("wb", buffering=0) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _save_table(path: Path) -> None:
    pq.write_table(pa.table({"row": np.random.default_rng(0).random(10_000)}), path)


@pytest.mark.parametrize("save", [_save_weights, _save_index, _save_table])
def test_write_reports_a_full_disk_in_one_way_for_every_library(save: Callable[[Path], None], tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))

    def write() -> None:
        with artifact.write("file") as path:
            path.symlink_to("/dev/full")
            save(path)

    with pytest.raises(StepError, match=rf"^{tmp_path}/file: the disk is full"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST])
def test_translate_os_errors_names_the_place(code: int) -> None:
    with pytest.raises(StepError, match="/data/file"), translate_os_errors("/data/file"):
        raise OSError(code, "no")


def test_translate_os_errors_leaves_others_alone() -> None:
    with pytest.raises(FileNotFoundError), translate_os_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_manifest_is_the_commit_and_drops_live_files(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_json("live/progress.json", {})
    artifact.write_bytes("data.bin", b"1")
    assert artifact.manifest() is None
    artifact.commit(_manifest(files=artifact.describe_files()))
    manifest = artifact.manifest()
    assert manifest is not None
    assert list(manifest.files) == ["data.bin"]
    assert artifact.names() == ["data.bin", "manifest.json"]


def test_a_commit_removes_what_killed_writers_left(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("a.tmp-b.bin", b"a name that only looks like it")
    for name in ("sub", "live/checkpoints", ".tmp-folder"):
        folder = tmp_path / "step/key" / name
        folder.mkdir(parents=True)
        (folder / ".tmp-0123-half").write_bytes(b"half")
    artifact.commit(_manifest())
    left = [str(path.relative_to(artifact.uri)) for path in Path(artifact.uri).rglob("*") if path.is_file()]
    assert sorted(left) == ["a.tmp-b.bin", "manifest.json"]
    assert not (tmp_path / "step/key/.tmp-folder").exists()


_ENDS = ("/sub", "/sub/", "data.bin", ".json")


_LOOKS: dict[str, Callable[[Artifact], Any]] = {
    "names": Artifact.names,
    "sizes": Artifact.sizes,
    "stamps": lambda artifact: artifact.stamps("sub/"),
    "describe_files": Artifact.describe_files,
    "clear_temporaries": Artifact.clear_temporaries,
    "exists": lambda artifact: artifact.exists("data.bin"),
    "path": lambda artifact: artifact.path("data.bin"),
}


@pytest.mark.parametrize("name", _LOOKS)
def test_storage_that_does_not_answer_is_not_taken_for_an_empty_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, look = Artifact(f"{tmp_path}/step/key"), _LOOKS[name]
    artifact.write_bytes("data.bin", b"1")
    artifact.write_bytes("sub/deep/other.bin", b"23")
    expected, call = look(artifact), "stat" if name in {"exists", "path"} else "scandir"
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, call, times=2, ends=_ENDS)
        assert look(artifact) == expected  # it passes
        assert len(failed) == 2
    for code, words, is_passing in ((errno.EIO, "see that this storage", True), (errno.EACCES, "permission", False)):
        with monkeypatch.context() as patch:
            failed = fail_calls(patch, call, code=code, times=99, ends=_ENDS)
            with pytest.raises(StepError, match=rf"^{artifact.uri}/(sub/?|data\.bin): cannot be read: .*{words}"):
                look(artifact)
            assert (len(failed) > 1) == is_passing


_READS: dict[str, Callable[[Artifact], Any]] = {
    "find_json": lambda artifact: artifact.find_json("value.json"),
    "find_jsons": lambda artifact: artifact.find_jsons(["none.json", "value.json"]),
    "read_json": lambda artifact: artifact.read_json("value.json"),
    "read_jsons": lambda artifact: artifact.read_jsons(["value.json"]),
    "describe": lambda artifact: artifact.describe("data.bin"),
    "manifest": Artifact.manifest,
    "shard_record": lambda artifact: artifact.shard_record("00000"),
    "shard_records": Artifact.shard_records,
}


@pytest.mark.parametrize("name", _READS)
def test_a_file_that_another_machine_has_just_replaced_is_read_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, read = Artifact(f"{tmp_path}/step/key"), _READS[name]
    artifact.write_bytes("data.bin", b"1")
    artifact.write_json("value.json", {"a": 1})
    artifact.commit_shard(ShardRecord(shard="00000", counts={"in": 1, "ok": 1}, files={}))
    artifact.commit(_manifest())
    artifact = Artifact(artifact.uri)  # which has not written them
    expected = read(artifact)
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "open", ends=_ENDS)
        assert read(artifact) == expected
        assert len(failed) == 1
    with monkeypatch.context() as patch:
        fail_calls(patch, "open", times=99, ends=_ENDS)
        with pytest.raises(StepError, match=rf"^{artifact.uri}/.*: cannot be read: Stale file handle: see that"):
            read(artifact)


def test_a_small_file_is_written_whole_again_where_the_storage_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    for call in ("open", "fsync", "replace", "unlink"):
        artifact.write_bytes("old.bin", b"old")
        with monkeypatch.context() as patch:
            failed = fail_calls(patch, call, code=errno.EIO, times=2)
            artifact.write_bytes("data.bin", b"new")
            artifact.remove("old.bin")
            assert len(failed) == 2
        assert artifact.path("data.bin").read_bytes() == b"new"
        assert artifact.names() == ["data.bin"]
    with monkeypatch.context() as patch:
        fail_calls(patch, "fsync", code=errno.EIO, times=99)
        with pytest.raises(StepError, match=rf"^{artifact.uri}/data\.bin: cannot be written: Input/output error: see"):
            artifact.write_bytes("data.bin", b"newer")
    assert artifact.path("data.bin").read_bytes() == b"new"


def test_temporary_files_and_keys_are_found_where_the_storage_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(str(tmp_path))
    artifact = workspace.artifact("step", "key")
    with monkeypatch.context() as patch:
        fail_calls(patch, "unlink", code=errno.EIO)
        artifact.write_bytes("data.bin", b"1")  # what failed is only to remove the temporary file
    half = tmp_path / "step/key/.tmp-0123-half"
    half.write_bytes(b"half")
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "unlink", times=2)
        artifact.clear_temporaries()
        assert len(failed) == 2
    assert not half.exists()
    assert artifact.names() == ["data.bin"]
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "scandir", times=2)
        assert workspace.keys("step") == ["key"]
        assert len(failed) == 2
    with monkeypatch.context() as patch:
        fail_calls(patch, "scandir", times=99)
        with pytest.raises(StepError, match=rf"^{tmp_path}/step: cannot be read: Stale"):
            workspace.keys("step")
    assert workspace.keys("other") == []


def test_a_file_that_is_written_again_has_another_stamp(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    assert artifact.stamps("live/checkpoints/") == {}
    for name in ("1.bin", "live/checkpoints/1.bin", "live/checkpoints/2.bin", "live/checkpoints/.tmp-0123-3.bin"):
        artifact.write_bytes(name, b"1")
    first = artifact.stamps("live/checkpoints/")
    assert sorted(first) == ["live/checkpoints/1.bin", "live/checkpoints/2.bin"]
    assert artifact.stamps("live/checkpoints/") == first
    artifact.write_bytes("live/checkpoints/2.bin", b"22")
    second = artifact.stamps("live/checkpoints/")
    assert [name for name in first if first[name] != second[name]] == ["live/checkpoints/2.bin"]


def test_a_listing_has_links_and_hidden_files_and_follows_nothing(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    assert artifact.names() == []
    assert artifact.sizes() == {}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    for name in ("b/2.bin", "b-/1.bin", "a.bin", ".hidden"):
        artifact.write_bytes(name, b"12")
    for name, target in (("folder", elsewhere), ("broken", tmp_path / "none")):
        (Path(artifact.uri) / name).symlink_to(target)
    files, base = fsspec.url_to_fs(artifact.uri)
    names = [path[len(base) + 1 :] for path in files.find(base)]
    assert artifact.names() == sorted(names) == [".hidden", "a.bin", "b-/1.bin", "b/2.bin", "broken", "folder"]
    assert artifact.sizes() == {name: 0 if name in {"broken", "folder"} else 2 for name in names}
    assert not artifact.exists("broken")
    assert Artifact(f"{artifact.uri}/a.bin").names() == []


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_json("manifest.json", _manifest().to_dict() | {"schema_version": 99})
    with pytest.raises(DataError, match=rf"{artifact.uri}/manifest.json: a newer unclip wrote it .* use its release"):
        artifact.manifest()


def test_a_shard_may_have_any_name_beside_the_file_of_all_records(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    records = {
        name: ShardRecord(shard=name, counts={"in": 1, "ok": 1}, files={}) for name in ("00000", "all", "shards")
    }
    live = ShardRecord(shard="live/part", counts={}, files={})
    for record in (*records.values(), live):
        artifact.commit_shard(record)
    assert artifact.fold_records() == records
    assert artifact.shard_records() == records | {"live/part": live}
    artifact.commit(_manifest())
    assert artifact.shard_records() == records


def test_records_with_a_field_of_a_later_release_are_read(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    record = ShardRecord(shard="00000", counts={"in": 1, "ok": 1}, files={})
    artifact.write_json("00000.done.json", record.to_dict() | {"checked": True})
    artifact.write_json("manifest.json", _manifest().to_dict() | {"licence": "CC0"})
    assert artifact.shard_records() == {"00000": record}
    assert artifact.manifest() == _manifest()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"counts": {"in": 3, "ok": 2}}, "do not add up"),
        ({"counts": {"ok": 2}}, "do not add up"),
        ({"counts": {"in": "3", "ok": 3}}, "counts.in: Input should be a valid integer"),
        ({"inputs": ["clip"]}, "inputs: Input should be an object"),
        ({"schema_version": None}, "schema version None"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named_and_nothing_is_deleted_for_it(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_json("manifest.json", _manifest().to_dict() | changes)
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        artifact.manifest()
    assert str(caught.value).startswith(f"{artifact.uri}/manifest.json: ")
    assert f"bring it back from a copy, or move {artifact.uri} away" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"shard": "00000"}', b'{"shard": "00000", "counts": {}, "files": 3}']
)
def test_a_shard_record_that_cannot_be_read_costs_its_shard_alone(tmp_path: Path, content: bytes) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("00000.done.json", content)
    with pytest.raises(DataError, match=r"00000\.done\.json: .*its shard alone is made again"):
        artifact.shard_records()
    artifact.write_json("manifest.json", _manifest().to_dict())
    with pytest.raises(DataError, match=r"00000\.done\.json: .* move .* away"):
        artifact.shard_records()


def test_verify_names_the_file_whose_bytes_changed(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("data.bin", b"1")
    artifact.commit(_manifest(files=artifact.describe_files()))
    artifact.verify("data.bin")
    (tmp_path / "step/key/data.bin").write_bytes(b"2")
    with pytest.raises(DataError, match=r"data\.bin"):
        artifact.verify("data.bin")


def test_read_json_malformed_names_the_file(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("x.json", b"{")
    with pytest.raises(DataError, match=r"x\.json"):
        artifact.read_json("x.json")
    with pytest.raises(DataError, match="no file"):
        artifact.path("none")


def test_shard_records_are_commits_of_their_own(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("00000.bin", b"1")
    files = {"00000.bin": artifact.describe("00000.bin")}
    artifact.commit_shard(ShardRecord(shard="00000", counts={"in": 3, "ok": 2, "failed": 1}, files=files))
    assert artifact.shard_records()["00000"].counts["ok"] == 2
    assert artifact.describe_files()["00000.bin"] == files["00000.bin"]


def test_the_shards_of_a_pass_are_no_shards_of_the_step(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    of_pass = Artifact(f"{artifact.uri}/live/measures")
    of_pass.commit_shard(ShardRecord(shard="00000", counts={"in": 3, "ok": 3}, files={}))
    assert artifact.shard_records() == {}
    assert of_pass.shard_records()["00000"].counts["ok"] == 3


def test_counts_that_lose_rows_are_refused() -> None:
    with pytest.raises(DataError, match="do not add up"):
        check_counts({"in": 3, "ok": 2}, where="here")
    assert add_counts([{"in": 1, "ok": 1}, {"in": 2, "ok": 1, "bad": 1}]) == {"in": 3, "ok": 2, "bad": 1}


def test_published_files_may_be_read_by_whoever_the_umask_allows(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    with artifact.write("weights.safetensors") as path:
        save_file({"weight": np.zeros(2)}, path)
    artifact.write_bytes("plain", b"")
    (tmp_path / "by-hand").touch()
    modes = {name: (tmp_path / name).stat().st_mode for name in ("weights.safetensors", "plain", "by-hand")}
    assert len(set(modes.values())) == 1, modes


def test_the_cache_of_another_user_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    artifact = Artifact("memory://cached/step/key")
    artifact.write_bytes("file", b"mine")
    first = artifact.path("file")
    assert first.read_bytes() == b"mine"
    assert first.is_relative_to(tmp_path / f"unclip-cache-{os.getuid()}")
    assert (tmp_path / f"unclip-cache-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    (tmp_path / f"unclip-cache-{other}").mkdir()  # under this user's own id: for the other it is a stranger's
    with pytest.raises(StepError, match=rf"unclip-cache-{other} belongs to another user; .*TMPDIR"):
        artifact.path("file")


def test_artifact_works_on_an_object_store_and_survives_pickling() -> None:
    artifact = Workspace("memory://bucket/prefix").artifact("step", "key")
    artifact.write_bytes("sub/data.bin", b"123")
    artifact.commit(_manifest(created=time.time(), files=artifact.describe_files()))
    again = pickle.loads(pickle.dumps(artifact))
    assert again.path("sub/data.bin").read_bytes() == b"123"
    assert again.manifest().files["sub/data.bin"]["bytes"] == 3
    manifests, damages = Workspace("memory://bucket/prefix").manifests("step")
    assert ([manifest.created for manifest in manifests], damages) == ([again.manifest().created], [])


def test_workspace_manifests_are_the_newest_first_and_name_what_cannot_be_read(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    for key, created in (("old", 1.0), ("new", 2.0)):
        workspace.artifact("s", key).commit(_manifest(key=key, created=created))
    workspace.artifact("s", "open").write_json("live/x.json", 1)
    workspace.artifact("s", "damaged").write_bytes("manifest.json", b"{")
    manifests, damages = workspace.manifests("s")
    assert [manifest.key for manifest in manifests] == ["new", "old"]
    assert [f"{tmp_path}/s/damaged/manifest.json: not valid JSON" in damage for damage in damages] == [True]


def test_make_uid_depends_on_url_and_caption_and_split_on_url_alone() -> None:
    assert make_uid("u", "c") == make_uid("u", "c") != make_uid("u", "d")
    urls = [f"http://a/{number}.jpg" for number in range(4000)]
    share = sum(split_of(url, 0.1) == "validation" for url in urls) / len(urls)
    assert 0.08 < share < 0.12
    assert all(split_of(url, 0.0) == "train" for url in urls)


def test_write_json_is_stable_bytes(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/s/k")
    artifact.write_json("a.json", {"b": 1, "a": 2})
    assert list(json.loads(artifact.path("a.json").read_text())) == ["a", "b"]


def test_a_use_whose_file_was_removed_before_it_was_locked_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, taken, num_taken = Workspace(str(tmp_path)), lock._taken, 0

    def remove_first(opened: IO[str], where: str) -> bool:
        nonlocal num_taken
        num_taken += 1
        if num_taken == 1:
            assert used_artifacts(workspace) == {}  # gc takes it for one that a dead process left
        return taken(opened, where)

    monkeypatch.setattr(lock, "_taken", remove_first)
    with in_use(workspace, ["prior/0"]):
        assert list(used_artifacts(workspace)) == ["prior/0"]

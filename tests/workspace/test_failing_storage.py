"""Storage of another machine that does not answer for a moment, or any more: nothing is taken for missing."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StepError
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.storage import fail_calls
from tests.workspace.conftest import make_manifest

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
    artifact.commit(make_manifest())
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

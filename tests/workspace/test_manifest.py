"""Commits: manifests, records of shards, and what is said of one that cannot be read."""

import re
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.workspace.manifest import ShardRecord, add_counts, check_counts
from pipeline.workspace.store import Artifact, Workspace
from tests.workspace.conftest import make_manifest


def test_manifest_is_the_commit_and_drops_live_files(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_json("live/progress.json", {})
    artifact.write_bytes("data.bin", b"1")
    assert artifact.manifest() is None
    artifact.commit(make_manifest(files=artifact.describe_files()))
    manifest = artifact.manifest()
    assert manifest is not None
    assert list(manifest.files) == ["data.bin"]
    assert artifact.names() == ["data.bin", "manifest.json"]


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_json("manifest.json", make_manifest().to_dict() | {"schema_version": 99})
    with pytest.raises(DataError, match=rf"{artifact.uri}/manifest.json: a newer unclip wrote it .* use its release"):
        artifact.manifest()


def test_records_with_a_field_of_a_later_release_are_read(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    record = ShardRecord(shard="00000", counts={"in": 1, "ok": 1}, files={})
    artifact.write_json("00000.done.json", record.to_dict() | {"checked": True})
    artifact.write_json("manifest.json", make_manifest().to_dict() | {"licence": "CC0"})
    assert artifact.shard_records() == {"00000": record}
    assert artifact.manifest() == make_manifest()


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
    artifact.write_json("manifest.json", make_manifest().to_dict() | changes)
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        artifact.manifest()
    assert str(caught.value).startswith(f"{artifact.uri}/manifest.json: ")
    assert f"bring it back from a copy, or move {artifact.uri} away" in str(caught.value)


def test_workspace_manifests_are_the_newest_first_and_name_what_cannot_be_read(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    for key, created in (("old", 1.0), ("new", 2.0)):
        workspace.artifact("s", key).commit(make_manifest(key=key, created=created))
    workspace.artifact("s", "open").write_json("live/x.json", 1)
    workspace.artifact("s", "damaged").write_bytes("manifest.json", b"{")
    manifests, damages = workspace.manifests("s")
    assert [manifest.key for manifest in manifests] == ["new", "old"]
    assert [f"{tmp_path}/s/damaged/manifest.json: not valid JSON" in damage for damage in damages] == [True]


def test_shard_records_are_commits_of_their_own(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("00000.bin", b"1")
    files = {"00000.bin": artifact.describe("00000.bin")}
    artifact.commit_shard(ShardRecord(shard="00000", counts={"in": 3, "ok": 2, "failed": 1}, files=files))
    assert artifact.shard_records()["00000"].counts["ok"] == 2
    assert artifact.describe_files()["00000.bin"] == files["00000.bin"]


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
    artifact.commit(make_manifest())
    assert artifact.shard_records() == records


def test_the_shards_of_a_pass_are_no_shards_of_the_step(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    of_pass = Artifact(f"{artifact.uri}/live/measures")
    of_pass.commit_shard(ShardRecord(shard="00000", counts={"in": 3, "ok": 3}, files={}))
    assert artifact.shard_records() == {}
    assert of_pass.shard_records()["00000"].counts["ok"] == 3


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"shard": "00000"}', b'{"shard": "00000", "counts": {}, "files": 3}']
)
def test_a_shard_record_that_cannot_be_read_costs_its_shard_alone(tmp_path: Path, content: bytes) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("00000.done.json", content)
    with pytest.raises(DataError, match=r"00000\.done\.json: .*its shard alone is made again"):
        artifact.shard_records()
    artifact.write_json("manifest.json", make_manifest().to_dict())
    with pytest.raises(DataError, match=r"00000\.done\.json: .* move .* away"):
        artifact.shard_records()


def test_verify_names_the_file_whose_bytes_changed(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("data.bin", b"1")
    artifact.commit(make_manifest(files=artifact.describe_files()))
    artifact.verify("data.bin")
    (tmp_path / "step/key/data.bin").write_bytes(b"2")
    with pytest.raises(DataError, match=r"data\.bin"):
        artifact.verify("data.bin")


def test_counts_that_lose_rows_are_refused() -> None:
    with pytest.raises(DataError, match="do not add up"):
        check_counts({"in": 3, "ok": 2}, where="here")
    assert add_counts([{"in": 1, "ok": 1}, {"in": 2, "ok": 1, "bad": 1}]) == {"in": 3, "ok": 2, "bad": 1}

"""Damage of the files of an index, in its folder, in a store, and before a change is committed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError, StepError
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import SegmentBuild, build_index
from pipeline.retrieve.changes import delete, publish_segment, restore, segment_of_more
from pipeline.workspace import stored_files
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import CONFIG, DIM, append, build_segment, commit_embed, compact, uid_of


def _describe(output: Artifact) -> None:
    """Commit the index with the checksums of its first segment."""
    described = output.describe_files()
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}, files=described))


def _flip_last_bit(place: Path) -> None:
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_damage_of_any_file_of_a_version_is_seen_by_its_checksum(index: Any, caplog: pytest.LogCaptureFixture) -> None:
    output, workspace, vectors = index
    _describe(output)
    append(output, commit_embed(workspace, "more", vectors[24:], first=24))
    delete(output, [uid_of(2), uid_of(3)])
    flat = "text.flat.faiss"
    for name in (f"segment_00000/{flat}", f"segment_00001/{flat}", "changes/deleted-000002.npy"):
        _flip_last_bit(output.path(name))
        NeighbourIndex.open(output)
        with pytest.raises(DataError, match=f"{name}: does not match its checksum; bring it back from a copy"):
            NeighbourIndex.open(output, is_verified=True)
        _flip_last_bit(output.path(name))
    assert restore(output, [uid_of(2), uid_of(3)]).changed == 2
    compact(output)
    delete(output, [uid_of(1)])  # the files of the first segments go; the manifest still describes them
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 47
    assert not caplog.records


def test_what_has_no_checksums_is_named_in_one_warning(index: Any, caplog: pytest.LogCaptureFixture) -> None:
    output, workspace, vectors = index
    _describe(output)
    append(output, commit_embed(workspace, "more", vectors[24:], first=24))
    delete(output, [uid_of(2)])
    output.remove("segment_00001/files.json")  # as an earlier release left the index
    written = output.read_json("changes/000002.json")
    output.write_json("changes/000002.json", {name: written[name] for name in ("number", "segments", "deleted")})
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 47
    [record] = caplog.records
    assert "no checksums are recorded of segment_00001, changes/deleted-000002.npy" in record.getMessage()


def test_damage_between_the_build_of_a_segment_and_its_commit_is_not_taken_for_its_content(index: Any) -> None:
    output, workspace, vectors = index
    _describe(output)
    build = segment_of_more(SegmentBuild((commit_embed(workspace, "more", vectors[24:], first=24),), output, CONFIG, 0))
    summary = build_segment(build)
    _flip_last_bit(output.path("segment_00001/text.flat.faiss"))
    driver = replace(build, output=Artifact(output.uri))  # another process, which did not write the files
    publish_segment(driver, summary, replaces=False)
    with pytest.raises(DataError, match=r"segment_00001/text.flat.faiss: does not match its checksum"):
        NeighbourIndex.open(output, is_verified=True)


def test_an_append_that_was_stopped_before_its_commit_is_finished_by_the_next_one(index: Any) -> None:
    output, workspace, vectors = index
    _describe(output)
    build = segment_of_more(SegmentBuild((commit_embed(workspace, "more", vectors[24:], first=24),), output, CONFIG, 0))
    summary = build_segment(build)

    def lost() -> None:
        raise StepError("the lock is lost")

    with pytest.raises(StepError, match="the lock is lost"):
        publish_segment(build, summary, replaces=False, check=lost)
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 24
    publish_segment(build, build_segment(build), replaces=False)
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 48


def test_the_files_of_a_store_are_fetched_once_and_a_damaged_copy_of_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "writer"))
    monkeypatch.setattr(stored_files, "stamp_of", lambda info: str(info["created"]))  # else no copy of it is used twice
    workspace, fetched = Workspace(f"memory://{tmp_path.name}"), Counter[str]()
    vectors, output = unit(np.random.default_rng(0).normal(size=(24, DIM))), workspace.artifact("index", "i")
    build_index(commit_embed(workspace, "base", vectors), output, CONFIG, seed=0)
    _describe(output)
    delete(output, [uid_of(3)])
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "reader"))
    for method in ("get_file", "open"):
        real = getattr(ObjectStore, method)

        def count(self: ObjectStore, path: str, *rest: Any, real: Any = real) -> Any:
            fetched[path.rpartition("/i/")[2]] += 1
            return real(self, path, *rest)

        monkeypatch.setattr(ObjectStore, method, count)
    assert NeighbourIndex.open(Artifact(output.uri), is_verified=True).num_rows == 23
    names = {name for name in output.names() if name.startswith("segment_")} | {"changes/deleted-000001.npy"}
    assert fetched == dict.fromkeys(names, 1)
    copy = output.path("segment_00000/text.flat.faiss")
    whole = copy.read_bytes()
    _flip_last_bit(copy)
    assert NeighbourIndex.open(Artifact(output.uri), is_verified=True).num_rows == 23
    assert copy.read_bytes() == whole
    assert fetched == dict.fromkeys(names, 1) | {"segment_00000/text.flat.faiss": 2}

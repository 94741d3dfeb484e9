"""Rows of a finished index that are deleted, restored, appended and compacted."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.data.rows import row_id
from pipeline.errors import StepError
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import SegmentBuild, build_index
from pipeline.retrieve.changes import (
    delete,
    delete_everywhere,
    publish_segment,
    restore,
    restore_everywhere,
    segment_of_all,
    segment_of_more,
)
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.retrieve.takedown import Takedown
from pipeline.retrieve.versions import Version, read_version
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import (
    CONFIG,
    DIM,
    SHARD_ROWS,
    append,
    build_segment,
    commit_embed,
    compact,
    rows_of,
    uid_of,
)


def test_deleted_rows_are_not_found_and_come_back(index: Any) -> None:
    output, _, vectors = index
    change = delete(output, [uid_of(3), "http://a/5", "http://a/5", "http://nowhere/"])
    assert (change.version, change.changed, change.unknown) == (1, 2, ("http://nowhere/",))
    opened = NeighbourIndex.open(output)
    assert rows_of(opened, vectors) == set(range(24)) - {3, 5}
    with pytest.raises(ValueError, match="no row"):
        opened.rows([row_id(uid_of(5))])
    assert delete(output, [uid_of(3)]).changed == 0
    assert restore(output, ["http://a/5", uid_of(4)]).changed == 1
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24)) - {3}
    assert rows_of(opened, vectors) == set(range(24)) - {3, 5}  # a reader keeps its version


def test_appended_rows_are_found_once_and_with_their_pictures_source(index: Any) -> None:
    output, workspace, vectors = index
    delete(output, [uid_of(2), uid_of(30)])
    more = commit_embed(workspace, "more", vectors[20:48], first=20)
    assert append(output, more) == {"in": 28, "ok": 24, "already_indexed": 4}
    opened = NeighbourIndex.open(output)
    assert rows_of(opened, vectors) == set(range(48)) - {2}
    assert opened.sources[opened.sources_of([row_id(uid_of(40))])[0]].uri == more.uri
    assert delete(output, ["http://a/40"]).changed == 1
    assert append(output, more)["ok"] == 0
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(48)) - {2, 40}


def test_compact_keeps_the_rows_and_drops_the_deleted_ones(index: Any) -> None:
    output, workspace, vectors = index
    append(output, commit_embed(workspace, "more", vectors[24:], first=24))
    delete(output, [uid_of(1), uid_of(30)])
    before = NeighbourIndex.open(output)
    assert compact(output) == {"in": 48, "ok": 46, "deleted": 2}
    expected = set(range(48)) - {1, 30}
    assert rows_of(NeighbourIndex.open(output), vectors) == expected
    assert rows_of(before, vectors) == expected
    delete(output, [uid_of(2)])  # only now do the files of the segments before go
    assert {name.split("/")[0] for name in output.names()} == {"changes", "index.json", "segment_00002"}
    assert rows_of(before, vectors) == expected
    restore(output, [uid_of(1)])
    assert append(output, workspace.artifact("embed", "base"))["ok"] == 1
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(48)) - {2, 30}


def test_a_version_stays_open_until_its_files_are_gone(index: Any) -> None:
    output, _, vectors = index
    delete(output, [uid_of(3)])
    assert rows_of(NeighbourIndex.open(output, version_number=0), vectors) == set(range(24))
    compact(output)
    assert rows_of(NeighbourIndex.open(output, version_number=1), vectors) == set(range(24)) - {3}
    delete(output, [uid_of(4)])
    with pytest.raises(StepError, match="version 1 is gone: the index has version 3 by now"):
        NeighbourIndex.open(output, version_number=1)


def test_an_append_that_was_given_up_is_no_part_of_the_next_one(index: Any) -> None:
    output, workspace, vectors = index
    given_up = segment_of_more(
        SegmentBuild((commit_embed(workspace, "x", vectors[24:40], first=24),), output, CONFIG, 0)
    )
    given_up.prepare()
    output.commit_shard(given_up.add_part(given_up.parts()[0]))
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24))
    assert append(output, commit_embed(workspace, "y", vectors[40:], first=40)) == {"in": 8, "ok": 8}
    assert rows_of(NeighbourIndex.open(output), vectors) == {*range(24), *range(40, 48)}
    assert not [name for name in output.names() if name.startswith("live/")]


class _Deleted(np.ndarray[Any, Any]):
    """Ids that are not looked through for each name: of 100,000 names that is minutes."""

    def __contains__(self, number: object) -> bool:
        raise AssertionError(f"all ids were looked through for {number}")


def test_restored_names_are_looked_up_all_at_once(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = index[0]
    delete(output, [uid_of(row) for row in (3, 5, 7)])
    compact(output)
    deleted = read_version(output).read_deleted(output).view(_Deleted)
    monkeypatch.setattr(Version, "read_deleted", lambda _version, _index: deleted)
    change = restore(output, [uid_of(3), "http://a/none", uid_of(7), uid_of(8)])
    assert (change.changed, change.unchanged, change.unknown) == (2, 1, ("http://a/none",))
    monkeypatch.undo()
    assert read_version(output).read_deleted(output).tolist() == [row_id(uid_of(5))]


def test_nothing_is_committed_after_the_lock_was_lost(index: Any) -> None:
    output, workspace, _ = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))

    def lost() -> None:
        raise StepError("lost")

    before = output.names()
    for change in (
        lambda: delete_everywhere(workspace, [uid_of(3)], lost),
        lambda: delete(output, [uid_of(3)], lost),
        lambda: restore_everywhere(workspace, [uid_of(3)], lost),
    ):
        with pytest.raises(StepError, match="lost"):
            change()
    assert (output.names(), Takedown.read(workspace.root).names) == (before, ())
    build = segment_of_all(SegmentBuild((), output, CONFIG, 0))
    summary = build_segment(build)
    with pytest.raises(StepError, match="lost"):
        publish_segment(build, summary, replaces=True, check=lost)
    assert read_version(output).number == 0


def test_deleted_ids_are_not_sorted_for_each_shard(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = index[0]
    delete(output, [uid_of(row) for row in (2, 21, 5)])
    build = segment_of_all(SegmentBuild((), output, CONFIG, 0))
    build.prepare()
    monkeypatch.setattr(np, "isin", None)  # it would
    assert [build.add_part(name).counts for name in build.parts()] == [{"in": 24, "ok": 21, "deleted": 3}]


def test_the_parts_do_not_read_the_records_of_all_embeddings_again(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output, _, _ = index
    build = segment_of_all(SegmentBuild((), output, CONFIG, 0))
    build.prepare()
    names = build.parts()
    monkeypatch.setattr(EmbeddedShards, "open", None)
    for name in names:
        output.commit_shard(build.add_part(name))
    assert build.finish().counts == {"in": 24, "ok": 24}


def test_a_sample_has_as_many_rows_as_were_requested_however_many_segments_there_are(index: Any) -> None:
    output, workspace, vectors = index
    append(output, commit_embed(workspace, "more", vectors[24:], first=24))
    assert len(NeighbourIndex.open(output).sample("train", 1)) == 1


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "delete", "restore", "compact"]), st.lists(st.integers(0, 47), max_size=6)
        ),
        max_size=6,
    )
)
@example([("delete", [1]), ("compact", []), ("restore", [1]), ("compact", [])])
def test_any_sequence_of_changes_leaves_the_rows_that_a_set_would_have(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, list[int]]]
) -> None:
    vectors, workspace = (
        unit(np.random.default_rng(0).normal(size=(48, DIM))),
        Workspace(str(tmp_path_factory.mktemp("w"))),
    )
    output = workspace.artifact("index", "i")
    build_index(commit_embed(workspace, "0", vectors[:SHARD_ROWS]), output, CONFIG, seed=0)
    indexed, embedded, deleted, num_appended = set(range(SHARD_ROWS)), set(range(SHARD_ROWS)), set[int](), 1
    for name, rows in changes:
        if name == "append" and num_appended < 4:
            first = num_appended * SHARD_ROWS
            append(output, commit_embed(workspace, str(num_appended), vectors[first : first + SHARD_ROWS], first=first))
            embedded |= set(range(first, first + SHARD_ROWS))
            indexed |= set(range(first, first + SHARD_ROWS)) - deleted
            num_appended += 1
        elif name == "delete" and rows:
            delete(output, [uid_of(row) for row in rows])
            deleted |= set(rows) & indexed
        elif name == "restore" and rows:
            restore(output, [uid_of(row) for row in rows])
            deleted -= set(rows)
        elif name == "compact" and indexed - deleted:
            compact(output)
            indexed = embedded - deleted  # a row that was restored after an earlier compaction comes back
        assert rows_of(NeighbourIndex.open(output), vectors) == indexed - deleted

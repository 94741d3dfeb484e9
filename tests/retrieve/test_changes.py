from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.rows import make_uid, row_id
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.recipe.appended import Appended, appended_embeddings
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import IndexSummary, SegmentBuild, build_index
from pipeline.retrieve.changes import (
    delete,
    delete_everywhere,
    publish_segment,
    read_names,
    restore,
    restore_everywhere,
    segment_of_all,
    segment_of_more,
)
from pipeline.retrieve.embedded import EmbeddedShards, content_now
from pipeline.retrieve.queries import read_embedding
from pipeline.retrieve.takedown import Takedown
from pipeline.retrieve.versions import Version, read_version
from pipeline.workspace import stored_files
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.tiny.shards import make_embeddings

_DIM, _PART = 8, 12
_CONFIG = IndexConfig(kind="flat", num_recall_queries=4)


def _uid(row: int) -> str:
    return make_uid(f"http://a/{row}", f"caption {row}")


def _embed(
    workspace: Workspace, name: str, vectors: NDArray[np.float32], *, clip: str = "c", first: int = 0
) -> Artifact:
    artifact = workspace.artifact("embed", name)
    make_embeddings(artifact, vectors, vectors, rows_per_shard=_PART, first=first)
    artifact.commit(Manifest(step="embed", key=name, step_version=1, section={}, inputs={"clip": clip}))
    return artifact


def _build(build: SegmentBuild) -> IndexSummary:
    build.prepare()
    for name in build.parts():
        build.output.commit_shard(build.add_part(name))
    return build.finish()


def _append(index: Artifact, embed: Artifact) -> dict[str, int]:
    build = segment_of_more(SegmentBuild((embed,), index, _CONFIG, 0))
    summary = _build(build)
    publish_segment(build, summary, replaces=False)
    return summary.counts


def _compact(index: Artifact) -> dict[str, int]:
    build = segment_of_all(SegmentBuild((), index, _CONFIG, 0))
    summary = _build(build)
    publish_segment(build, summary, replaces=True)
    return summary.counts


def _rows(index: NeighbourIndex, vectors: NDArray[np.float32]) -> set[int]:
    """Numbers of the rows that a search for everything returns; each must be found by its own vector."""
    [ids], rows = index.search(vectors[:1], len(vectors))[1], {row_id(_uid(row)): row for row in range(len(vectors))}
    results = [rows[number] for number in ids.tolist() if number >= 0]
    assert len(set(results)) == len(results) == index.num_rows
    for row in results:
        [[best]] = index.find(vectors[[row]], 1)
        assert (best.uid, best.url) == (_uid(row), f"http://a/{row}")
    return set(results)


@pytest.fixture
def index(tmp_path: Path) -> tuple[Artifact, Workspace, NDArray[np.float32]]:
    """An index of the first 24 of 48 rows."""
    vectors, workspace = unit(np.random.default_rng(0).normal(size=(48, _DIM))), Workspace(str(tmp_path))
    embed, output = _embed(workspace, "base", vectors[:24]), workspace.artifact("index", "i")
    build_index(embed, output, _CONFIG, seed=0)
    return output, workspace, vectors


def test_deleted_rows_are_not_found_and_come_back(index: Any) -> None:
    output, _, vectors = index
    change = delete(output, [_uid(3), "http://a/5", "http://a/5", "http://nowhere/"])
    assert (change.version, change.changed, change.unknown) == (1, 2, ("http://nowhere/",))
    opened = NeighbourIndex.open(output)
    assert _rows(opened, vectors) == set(range(24)) - {3, 5}
    with pytest.raises(ValueError, match="no row"):
        opened.rows([row_id(_uid(5))])
    assert delete(output, [_uid(3)]).changed == 0
    assert restore(output, ["http://a/5", _uid(4)]).changed == 1
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24)) - {3}
    assert _rows(opened, vectors) == set(range(24)) - {3, 5}  # a reader keeps its version


def test_appended_rows_are_found_once_and_with_their_pictures_source(index: Any) -> None:
    output, workspace, vectors = index
    delete(output, [_uid(2), _uid(30)])
    more = _embed(workspace, "more", vectors[20:48], first=20)
    assert _append(output, more) == {"in": 28, "ok": 24, "already_indexed": 4}
    opened = NeighbourIndex.open(output)
    assert _rows(opened, vectors) == set(range(48)) - {2}
    assert opened.sources[opened.sources_of([row_id(_uid(40))])[0]].uri == more.uri
    assert delete(output, ["http://a/40"]).changed == 1
    assert _append(output, more)["ok"] == 0
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(48)) - {2, 40}


def test_compact_keeps_the_rows_and_drops_the_deleted_ones(index: Any) -> None:
    output, workspace, vectors = index
    _append(output, _embed(workspace, "more", vectors[24:], first=24))
    delete(output, [_uid(1), _uid(30)])
    before = NeighbourIndex.open(output)
    assert _compact(output) == {"in": 48, "ok": 46, "deleted": 2}
    expected = set(range(48)) - {1, 30}
    assert _rows(NeighbourIndex.open(output), vectors) == expected
    assert _rows(before, vectors) == expected
    delete(output, [_uid(2)])  # only now do the files of the segments before go
    assert {name.split("/")[0] for name in output.names()} == {"changes", "index.json", "segment_00002"}
    assert _rows(before, vectors) == expected
    restore(output, [_uid(1)])
    assert _append(output, workspace.artifact("embed", "base"))["ok"] == 1
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(48)) - {2, 30}


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
    _append(output, _embed(workspace, "more", vectors[24:], first=24))
    delete(output, [_uid(2), _uid(3)])
    flat = "text.flat.faiss"
    for name in (f"segment_00000/{flat}", f"segment_00001/{flat}", "changes/deleted-000002.npy"):
        _flip_last_bit(output.path(name))
        NeighbourIndex.open(output)
        with pytest.raises(DataError, match=f"{name}: does not match its checksum; bring it back from a copy"):
            NeighbourIndex.open(output, is_verified=True)
        _flip_last_bit(output.path(name))
    assert restore(output, [_uid(2), _uid(3)]).changed == 2
    _compact(output)
    delete(output, [_uid(1)])  # the files of the first segments go; the manifest still describes them
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 47
    assert not caplog.records


def test_what_has_no_checksums_is_named_in_one_warning(index: Any, caplog: pytest.LogCaptureFixture) -> None:
    output, workspace, vectors = index
    _describe(output)
    _append(output, _embed(workspace, "more", vectors[24:], first=24))
    delete(output, [_uid(2)])
    output.remove("segment_00001/files.json")  # as an earlier release left the index
    written = output.read_json("changes/000002.json")
    output.write_json("changes/000002.json", {name: written[name] for name in ("number", "segments", "deleted")})
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 47
    [record] = caplog.records
    assert "no checksums are recorded of segment_00001, changes/deleted-000002.npy" in record.getMessage()


def test_damage_between_the_build_of_a_segment_and_its_commit_is_not_taken_for_its_content(index: Any) -> None:
    output, workspace, vectors = index
    _describe(output)
    build = segment_of_more(SegmentBuild((_embed(workspace, "more", vectors[24:], first=24),), output, _CONFIG, 0))
    summary = _build(build)
    _flip_last_bit(output.path("segment_00001/text.flat.faiss"))
    driver = replace(build, output=Artifact(output.uri))  # another process, which did not write the files
    publish_segment(driver, summary, replaces=False)
    with pytest.raises(DataError, match=r"segment_00001/text.flat.faiss: does not match its checksum"):
        NeighbourIndex.open(output, is_verified=True)


def test_an_append_that_was_stopped_before_its_commit_is_finished_by_the_next_one(index: Any) -> None:
    output, workspace, vectors = index
    _describe(output)
    build = segment_of_more(SegmentBuild((_embed(workspace, "more", vectors[24:], first=24),), output, _CONFIG, 0))
    summary = _build(build)

    def lost() -> None:
        raise StepError("the lock is lost")

    with pytest.raises(StepError, match="the lock is lost"):
        publish_segment(build, summary, replaces=False, check=lost)
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 24
    publish_segment(build, _build(build), replaces=False)
    assert NeighbourIndex.open(output, is_verified=True).num_rows == 48


def test_the_files_of_a_store_are_fetched_once_and_a_damaged_copy_of_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "writer"))
    monkeypatch.setattr(stored_files, "stamp_of", lambda info: str(info["created"]))  # else no copy of it is used twice
    workspace, fetched = Workspace(f"memory://{tmp_path.name}"), Counter[str]()
    vectors, output = unit(np.random.default_rng(0).normal(size=(24, _DIM))), workspace.artifact("index", "i")
    build_index(_embed(workspace, "base", vectors), output, _CONFIG, seed=0)
    _describe(output)
    delete(output, [_uid(3)])
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


def test_a_version_stays_open_until_its_files_are_gone(index: Any) -> None:
    output, _, vectors = index
    delete(output, [_uid(3)])
    assert _rows(NeighbourIndex.open(output, version_number=0), vectors) == set(range(24))
    _compact(output)
    assert _rows(NeighbourIndex.open(output, version_number=1), vectors) == set(range(24)) - {3}
    delete(output, [_uid(4)])
    with pytest.raises(StepError, match="version 1 is gone: the index has version 3 by now"):
        NeighbourIndex.open(output, version_number=1)


def test_an_append_that_was_given_up_is_no_part_of_the_next_one(index: Any) -> None:
    output, workspace, vectors = index
    given_up = segment_of_more(SegmentBuild((_embed(workspace, "x", vectors[24:40], first=24),), output, _CONFIG, 0))
    given_up.prepare()
    output.commit_shard(given_up.add_part(given_up.parts()[0]))
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24))
    assert _append(output, _embed(workspace, "y", vectors[40:], first=40)) == {"in": 8, "ok": 8}
    assert _rows(NeighbourIndex.open(output), vectors) == {*range(24), *range(40, 48)}
    assert not [name for name in output.names() if name.startswith("live/")]


def test_a_takedown_holds_in_every_index_of_the_workspace_and_in_those_that_are_built_later(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    other = workspace.artifact("index", "other")
    build_index(workspace.artifact("embed", "base"), other, _CONFIG, seed=1)
    other.commit(Manifest(step="index", key="other", step_version=1, section={}, inputs={}))
    changes = delete_everywhere(workspace, [_uid(3), "http://a/30", "http://a/5"])
    assert {key: (change.changed, change.unknown) for key, change in changes.items()} == dict.fromkeys(
        ["i", "other"], (2, ("http://a/30",))
    )
    assert _rows(NeighbourIndex.open(other), vectors) == set(range(24)) - {3, 5}

    later = workspace.artifact("index", "later")
    built = build_index(_embed(workspace, "all", vectors), later, _CONFIG, seed=0)
    assert built.counts == {"in": 48, "ok": 45, "deleted": 3}
    assert _rows(NeighbourIndex.open(later), vectors) == set(range(48)) - {3, 5, 30}
    assert _append(output, workspace.artifact("embed", "all"))["deleted"] == 3
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(48)) - {3, 5, 30}

    with pytest.raises(ConfigError, match="restore the URL: http://a/5"):
        restore_everywhere(workspace, [_uid(5)])
    assert restore_everywhere(workspace, ["http://a/5"])["i"].changed == 1
    assert _compact(output)["deleted"] == 3  # row 3 twice: two of its embeddings are in the index
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(48)) - {3, 30}
    assert _append(later, workspace.artifact("embed", "base"))["ok"] == 1
    assert _rows(NeighbourIndex.open(later), vectors) == set(range(48)) - {3, 30}


def test_a_restored_pair_comes_back_after_a_compaction_and_one_that_is_on_no_list_stays_away(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    base = workspace.artifact("embed", "base")
    delete(output, [_uid(7)])  # as before there was the list
    delete_everywhere(workspace, ["http://a/5", _uid(3)])
    assert _compact(output)["deleted"] == 3
    assert _append(output, base) == {"in": 24, "ok": 0, "already_indexed": 21, "deleted": 3}
    restore_everywhere(workspace, ["http://a/5"])
    assert _append(output, base)["ok"] == 1
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24)) - {3, 7}


class _Deleted(np.ndarray[Any, Any]):
    """Ids that are not looked through for each name: of 100,000 names that is minutes."""

    def __contains__(self, number: object) -> bool:
        raise AssertionError(f"all ids were looked through for {number}")


def test_restored_names_are_looked_up_all_at_once(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = index[0]
    delete(output, [_uid(row) for row in (3, 5, 7)])
    _compact(output)
    deleted = read_version(output).read_deleted(output).view(_Deleted)
    monkeypatch.setattr(Version, "read_deleted", lambda _version, _index: deleted)
    change = restore(output, [_uid(3), "http://a/none", _uid(7), _uid(8)])
    assert (change.changed, change.unchanged, change.unknown) == (2, 1, ("http://a/none",))
    monkeypatch.undo()
    assert read_version(output).read_deleted(output).tolist() == [row_id(_uid(5))]


def test_a_pair_that_was_deleted_by_both_its_names_says_which_one_is_left(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    delete_everywhere(workspace, [_uid(5), "http://a/5"])
    with pytest.raises(ConfigError, match="restore the URL: http://a/5"):
        restore_everywhere(workspace, [_uid(5)])
    with pytest.raises(ConfigError, match=f"restore the uid: {_uid(5)}"):
        restore_everywhere(workspace, ["http://a/5"])
    restore_everywhere(workspace, [_uid(5), "http://a/5"])
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24))


def test_a_forgotten_pair_is_not_restored(index: Any) -> None:
    output, workspace, _ = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    Forgotten.read(workspace.root).add(["http://a/3"], 0.0, {}, []).write(workspace.root)
    delete(output, [_uid(3)])
    with pytest.raises(ConfigError, match="http://a/3: this pair was forgotten"):
        restore_everywhere(workspace, [_uid(3)])


class _Counted(str):
    """A name that counts how often names of its class are hashed."""

    num_hashes = 0

    def __hash__(self) -> int:
        type(self).num_hashes += 1
        return super().__hash__()


def test_names_are_hashed_once_for_all_shards_and_deleted_ids_are_sorted_once(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    takedown = Takedown(tuple(_Counted(name) for name in ("http://a/1", _uid(2), "http://nowhere/")))
    rows = pa.table({"uid": [_uid(row) for row in range(4)], "url": ["http://a/0", "http://a/1", "http://a/2", None]})
    for _ in range(3):
        assert takedown.has(rows).tolist() == [False, True, True, False]
    assert _Counted.num_hashes == 3
    output, _, _ = index
    delete(output, [_uid(row) for row in (2, 21, 5)])
    build = segment_of_all(SegmentBuild((), output, _CONFIG, 0))
    build.prepare()
    monkeypatch.setattr(np, "isin", None)  # it sorts them for each shard
    assert [build.add_part(name).counts for name in build.parts()] == [{"in": 24, "ok": 21, "deleted": 3}]


def test_a_url_with_another_line_break_stays_deleted(tmp_path: Path) -> None:
    names = ("http://a/1\u2028", "http://a/\x852", "http://a/\r3")
    Takedown().add(names).write(str(tmp_path))
    assert Takedown.read(str(tmp_path)).names == names
    with pytest.raises(ConfigError, match="a name with a line break"):
        Takedown().add(["http://a/\n4"])


def test_nothing_is_committed_after_the_lock_was_lost(index: Any) -> None:
    output, workspace, _ = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))

    def lost() -> None:
        raise StepError("lost")

    before = output.names()
    for change in (
        lambda: delete_everywhere(workspace, [_uid(3)], lost),
        lambda: delete(output, [_uid(3)], lost),
        lambda: restore_everywhere(workspace, [_uid(3)], lost),
    ):
        with pytest.raises(StepError, match="lost"):
            change()
    assert (output.names(), Takedown.read(workspace.root).names) == (before, ())
    build = segment_of_all(SegmentBuild((), output, _CONFIG, 0))
    summary = _build(build)
    with pytest.raises(StepError, match="lost"):
        publish_segment(build, summary, replaces=True, check=lost)
    assert read_version(output).number == 0


def test_the_parts_do_not_read_the_records_of_all_embeddings_again(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output, _, _ = index
    build = segment_of_all(SegmentBuild((), output, _CONFIG, 0))
    build.prepare()
    names = build.parts()
    monkeypatch.setattr(EmbeddedShards, "open", None)
    for name in names:
        output.commit_shard(build.add_part(name))
    assert build.finish().counts == {"in": 24, "ok": 24}


def test_a_sample_has_as_many_rows_as_were_requested_however_many_segments_there_are(index: Any) -> None:
    output, workspace, vectors = index
    _append(output, _embed(workspace, "more", vectors[24:], first=24))
    opened = NeighbourIndex.open(output)
    splits = set(opened.rows([row_id(_uid(row)) for row in range(48)]).column("split").to_pylist())
    for split in splits:
        assert len(set(opened.sample(split, 1).tolist())) == 1


def test_a_build_that_was_stopped_before_a_takedown_does_not_keep_its_parts(index: Any) -> None:
    _, workspace, vectors = index
    build = SegmentBuild((_embed(workspace, "all", vectors),), workspace.artifact("index", "j"), _CONFIG, 0)
    build.prepare()
    build.output.commit_shard(build.add_part(build.parts()[0]))
    delete_everywhere(workspace, [_uid(3)])
    build.prepare()
    assert not build.output.shard_records()


def _make_anew(embed: Artifact, vectors: NDArray[np.float32], first: int = 0, rows_per_shard: int = _PART - 1) -> None:
    """Embeddings of the same rows, in other places, as after a retry that gained some."""
    manifest = embed.manifest()
    assert manifest is not None
    embed.clear()
    make_embeddings(embed, vectors, vectors, rows_per_shard=rows_per_shard, first=first)
    embed.commit(replace(manifest, files=embed.describe_files()))


def test_an_index_of_embeddings_that_were_made_anew_is_not_searched(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={"embed": "base"}))
    base = workspace.artifact("embed", "base")
    base.clear()
    with pytest.raises(StepError, match=r"embed/base, which is not finished; make both anew: unclip run RECIPE"):
        NeighbourIndex.open(output)
    _embed(workspace, "base", vectors[:24])  # with the bytes of before
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24))
    _make_anew(base, vectors[:24])
    with pytest.raises(StepError, match=r"embed/base, which was made anew since; make both anew: unclip run RECIPE"):
        NeighbourIndex.open(output)
    with pytest.raises(StepError, match="made anew since"):
        NeighbourIndex.open(output, version_number=0)
    _compact(output)
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24))


def test_appended_embeddings_that_were_made_anew_are_put_together_again(index: Any) -> None:
    output, workspace, vectors = index
    more = _embed(workspace, "more", vectors[24:], first=24)
    _append(output, more)
    assert appended_embeddings(output, {"embed": "base"}) == [Appended(more.uri, content_now(more))]
    _make_anew(more, vectors[24:], first=24)
    with pytest.raises(StepError, match=r"embed/more, which was appended, and made anew since; .*: unclip compact"):
        NeighbourIndex.open(output)
    more.remove("manifest.json")
    with pytest.raises(StepError, match=r"and is not finished or is gone; run the recipe of these embeddings first"):
        NeighbourIndex.open(output)
    _make_anew(_embed(workspace, "more", vectors[24:], first=24), vectors[24:], first=24)
    _compact(output)
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(48))
    assert appended_embeddings(output, {"embed": "base"}) == [Appended(more.uri, content_now(more))]


def test_a_segment_that_does_not_say_what_it_was_built_from_is_put_together_again(index: Any) -> None:
    output, _, vectors = index
    description = output.read_json("segment_00000/segment.json")
    del description["embedded"]["contents"]
    output.write_json("segment_00000/segment.json", description)
    with pytest.raises(StepError, match=r"segment_00000: an earlier release built it, .*: unclip compact RECIPE"):
        NeighbourIndex.open(output)
    _compact(output)
    assert _rows(NeighbourIndex.open(output), vectors) == set(range(24))


def test_a_build_that_was_stopped_does_not_keep_parts_of_embeddings_that_were_made_anew(index: Any) -> None:
    _, workspace, vectors = index
    embed = _embed(workspace, "all", vectors)
    build = SegmentBuild((embed,), workspace.artifact("index", "j"), _CONFIG, 0)
    build.prepare()
    build.output.commit_shard(build.add_part(build.parts()[0]))
    build.prepare()
    assert build.output.shard_records()
    _make_anew(embed, vectors[::-1].copy(), rows_per_shard=_PART)  # as many rows in each shard, of other vectors
    build.prepare()
    assert not build.output.shard_records()


def test_embeddings_of_another_clip_are_refused(index: Any) -> None:
    output, workspace, vectors = index
    with pytest.raises(DataError, match="of another CLIP"):
        _append(output, _embed(workspace, "other", vectors[24:], clip="d", first=24))


def _imported(workspace: Workspace, name: str, vectors: NDArray[np.float32], *, first: int = 0) -> Artifact:
    artifact = workspace.artifact("embed", name)
    make_embeddings(artifact, vectors, vectors, rows_per_shard=_PART, first=first)
    section = {"import_from": "", "import_content": name}
    artifact.commit(Manifest(step="embed", key=name, step_version=1, section=section, inputs={}))
    return artifact


def _clip(workspace: Workspace, key: str, sha256: str = "") -> Artifact:
    """A CLIP step, finished if there is a checksum of its weights."""
    clip = workspace.artifact("clip", key)
    if sha256:
        files = {"open_clip_model.safetensors": {"bytes": 1, "sha256": sha256}}
        clip.commit(Manifest(step="clip", key=key, step_version=1, section={}, inputs={}, files=files))
    return clip


def test_imported_embeddings_are_appended_if_their_recipe_names_the_same_clip(tmp_path: Path) -> None:
    workspace, vectors = Workspace(str(tmp_path)), unit(np.random.default_rng(0).normal(size=(48, _DIM)))
    output = workspace.artifact("index", "i")
    build_index(_imported(workspace, "first", vectors[:24]), output, _CONFIG, seed=0)
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={"embed": "first"}))
    more, own = _imported(workspace, "more", vectors[24:], first=24), _clip(workspace, "c", "a" * 64)

    def check(embed: Artifact, clip_of_more: Artifact | None, clip_of_index: Artifact | None = own) -> SegmentBuild:
        return segment_of_more(SegmentBuild((embed,), output, _CONFIG, 0), clip_of_index, clip_of_more)

    with pytest.raises(DataError, match=r"more: embeddings that were imported, .* give their recipe"):
        check(more, None)
    with pytest.raises(DataError, match=r"more: perhaps embeddings of another CLIP .*/clip/d to compare with; first:"):
        check(more, _clip(workspace, "d"))
    with pytest.raises(DataError, match="more: embeddings of another CLIP"):
        check(more, _clip(workspace, "e", "b" * 64))
    with pytest.raises(DataError, match="index/i: not the finished embeddings of an embed step"):
        check(output, own)
    narrow = _imported(workspace, "narrow", vectors[:, :4])
    with pytest.raises(DataError, match=r"narrow: embeddings of width 4; those of the index, .*, have 8"):
        check(narrow, own)
    computed = _embed(workspace, "computed", vectors[24:], clip="c", first=24)
    assert check(computed, None).segment == "segment_00001"
    for same in (own, _clip(workspace, "f", "a" * 64)):
        assert check(more, same).segment == "segment_00001"
    filtered = workspace.artifact("filter_embeddings", "filtered")
    make_embeddings(filtered, vectors[24:], vectors[24:], rows_per_shard=_PART, first=24)
    filtered.commit(
        Manifest(step="filter_embeddings", key="filtered", step_version=1, section={}, inputs={"embed": "more"})
    )
    build = check(filtered, own)
    publish_segment(build, _build(build), replaces=False)
    assert NeighbourIndex.open(output).num_rows == 48


def test_names_of_a_file_that_begins_with_a_byte_order_mark_are_all_read(tmp_path: Path) -> None:
    names = tmp_path / "takedown.txt"
    names.write_bytes("\ufeffhttp://a/1\n\nhttp://a/2\n".encode())
    assert read_names(str(names)) == ["http://a/1", "http://a/2"]
    assert Takedown.read(str(tmp_path)).names == ("http://a/1", "http://a/2")
    vector = tmp_path / "vector.json"
    vector.write_bytes("\ufeff[3, 4]".encode())
    np.testing.assert_allclose(read_embedding(str(vector), 2), [0.6, 0.8], rtol=1e-6)


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
        unit(np.random.default_rng(0).normal(size=(48, _DIM))),
        Workspace(str(tmp_path_factory.mktemp("w"))),
    )
    output = workspace.artifact("index", "i")
    build_index(_embed(workspace, "0", vectors[:_PART]), output, _CONFIG, seed=0)
    indexed, embedded, deleted, num_appended = set(range(_PART)), set(range(_PART)), set[int](), 1
    for name, rows in changes:
        if name == "append" and num_appended < 4:
            first = num_appended * _PART
            _append(output, _embed(workspace, str(num_appended), vectors[first : first + _PART], first=first))
            embedded |= set(range(first, first + _PART))
            indexed |= set(range(first, first + _PART)) - deleted
            num_appended += 1
        elif name == "delete" and rows:
            delete(output, [_uid(row) for row in rows])
            deleted |= set(rows) & indexed
        elif name == "restore" and rows:
            restore(output, [_uid(row) for row in rows])
            deleted -= set(rows)
        elif name == "compact" and indexed - deleted:
            _compact(output)
            indexed = embedded - deleted  # a row that was restored after an earlier compaction comes back
        assert _rows(NeighbourIndex.open(output), vectors) == indexed - deleted

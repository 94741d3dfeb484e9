"""Pairs that no index of a workspace may return, and how they come back."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest

from pipeline.errors import ConfigError
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import SegmentBuild, build_index
from pipeline.retrieve.changes import delete, delete_everywhere, read_names, restore, restore_everywhere
from pipeline.retrieve.takedown import Takedown
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import CONFIG, DIM, append, commit_embed, compact, rows_of, uid_of

pc: Any = pyarrow.compute  # its functions are made when it is imported


def test_a_takedown_holds_in_every_index_of_the_workspace_and_in_those_that_are_built_later(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    other = workspace.artifact("index", "other")
    build_index(workspace.artifact("embed", "base"), other, CONFIG, seed=1)
    other.commit(Manifest(step="index", key="other", step_version=1, section={}, inputs={}))
    changes = delete_everywhere(workspace, [uid_of(3), "http://a/30", "http://a/5"])
    assert {key: (change.changed, change.unknown) for key, change in changes.items()} == dict.fromkeys(
        ["i", "other"], (2, ("http://a/30",))
    )
    assert rows_of(NeighbourIndex.open(other), vectors) == set(range(24)) - {3, 5}

    later = workspace.artifact("index", "later")
    built = build_index(commit_embed(workspace, "all", vectors), later, CONFIG, seed=0)
    assert built.counts == {"in": 48, "ok": 45, "deleted": 3}
    assert rows_of(NeighbourIndex.open(later), vectors) == set(range(48)) - {3, 5, 30}
    assert append(output, workspace.artifact("embed", "all"))["deleted"] == 3
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(48)) - {3, 5, 30}

    with pytest.raises(ConfigError, match="restore the URL: http://a/5"):
        restore_everywhere(workspace, [uid_of(5)])
    assert restore_everywhere(workspace, ["http://a/5"])["i"].changed == 1
    assert compact(output)["deleted"] == 3  # row 3 twice: two of its embeddings are in the index
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(48)) - {3, 30}
    assert append(later, workspace.artifact("embed", "base"))["ok"] == 1
    assert rows_of(NeighbourIndex.open(later), vectors) == set(range(48)) - {3, 30}


def test_a_restored_pair_comes_back_after_a_compaction_and_one_that_is_on_no_list_stays_away(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    base = workspace.artifact("embed", "base")
    delete(output, [uid_of(7)])  # as before there was the list
    delete_everywhere(workspace, ["http://a/5", uid_of(3)])
    assert compact(output)["deleted"] == 3
    assert append(output, base) == {"in": 24, "ok": 0, "already_indexed": 21, "deleted": 3}
    restore_everywhere(workspace, ["http://a/5"])
    assert append(output, base)["ok"] == 1
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24)) - {3, 7}


def test_a_pair_that_was_deleted_by_both_its_names_says_which_one_is_left(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    delete_everywhere(workspace, [uid_of(5), "http://a/5"])
    with pytest.raises(ConfigError, match="restore the URL: http://a/5"):
        restore_everywhere(workspace, [uid_of(5)])
    with pytest.raises(ConfigError, match=f"restore the uid: {uid_of(5)}"):
        restore_everywhere(workspace, ["http://a/5"])
    restore_everywhere(workspace, [uid_of(5), "http://a/5"])
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24))


def test_a_forgotten_pair_is_not_restored(index: Any) -> None:
    output, workspace, _ = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={}))
    Forgotten.read(workspace.root).add(["http://a/3"], 0.0, {}, []).write(workspace.root)
    delete(output, [uid_of(3)])
    with pytest.raises(ConfigError, match="http://a/3: this pair was forgotten"):
        restore_everywhere(workspace, [uid_of(3)])


class _Counted(str):
    """A name that counts how often names of its class are hashed."""

    num_hashes = 0

    def __hash__(self) -> int:
        type(self).num_hashes += 1
        return super().__hash__()


def test_names_are_hashed_once_for_all_shards() -> None:
    takedown = Takedown(tuple(_Counted(name) for name in ("http://a/1", uid_of(2), "http://nowhere/")))
    rows = pa.table({"uid": [uid_of(row) for row in range(4)], "url": ["http://a/0", "http://a/1", "http://a/2", None]})
    for _ in range(3):
        assert takedown.has(rows).tolist() == [False, True, True, False]
    assert _Counted.num_hashes == 3


def test_the_urls_of_a_deletion_are_made_a_table_once_for_many_batches_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million URLs that takes longer than to look up 8,192 rows: for each batch it would be hours."""
    monkeypatch.setattr("pipeline.retrieve.rows.BATCH_ROWS", 5)
    vectors, workspace = unit(np.random.default_rng(0).normal(size=(24, DIM))), Workspace(str(tmp_path))
    embed, output = commit_embed(workspace, "base", vectors), workspace.artifact("index", "i")
    build_index(embed, output, CONFIG, seed=0)
    sizes, is_in = list[int](), pc.is_in

    def counted(column: Any, **options: Any) -> Any:
        sizes.append(len(column))
        return is_in(column, **options)

    monkeypatch.setattr(pc, "is_in", counted)
    change = delete(output, ["http://a/23", "http://a/none", "http://a/4", "http://a/5"])
    assert (change.changed, change.unknown, sizes) == (3, ("http://a/none",), [24])
    sizes.clear()
    monkeypatch.setattr("pipeline.retrieve.changes._BLOCK_ROWS", 10)
    monkeypatch.setattr("pipeline.retrieve.changes._ROWS_OF_A_URL", 3)
    assert restore(output, [f"http://a/{row}" for row in (4, 5, 6, 23)]).changed == 3
    assert sizes == [10, 10, 4]  # batches that 12 rows hold whole


def test_a_url_with_another_line_break_stays_deleted(tmp_path: Path) -> None:
    names = ("http://a/1\u2028", "http://a/\x852", "http://a/\r3")
    Takedown().add(names).write(str(tmp_path))
    assert Takedown.read(str(tmp_path)).names == names
    with pytest.raises(ConfigError, match="a name with a line break"):
        Takedown().add(["http://a/\n4"])


def test_a_build_that_was_stopped_before_a_takedown_does_not_keep_its_parts(index: Any) -> None:
    _, workspace, vectors = index
    build = SegmentBuild((commit_embed(workspace, "all", vectors),), workspace.artifact("index", "j"), CONFIG, 0)
    build.prepare()
    build.output.commit_shard(build.add_part(build.parts()[0]))
    delete_everywhere(workspace, [uid_of(3)])
    build.prepare()
    assert not build.output.shard_records()


def test_names_of_a_file_that_begins_with_a_byte_order_mark_are_all_read(tmp_path: Path) -> None:
    names = tmp_path / "takedown.txt"
    names.write_bytes("\ufeffhttp://a/1\n\nhttp://a/2\n".encode())
    assert read_names(str(names)) == ["http://a/1", "http://a/2"]
    assert Takedown.read(str(tmp_path)).names == ("http://a/1", "http://a/2")

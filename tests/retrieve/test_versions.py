"""Versions of an index: a change reads few of them, however many there were, and leaves the last two."""

from typing import Any

import pytest

from pipeline.errors import DataError, StepError
from pipeline.recipe.appended import CHANGE, appended_embeddings
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.changes import delete, remove_earlier_versions, restore
from pipeline.retrieve.versions import read_version
from pipeline.workspace.store import Artifact
from tests.retrieve.segments import append, commit_embed, compact, rows_of, uid_of


def _changes(index: Artifact) -> list[str]:
    return [name for name in index.names() if CHANGE.fullmatch(name)]


def test_a_change_reads_no_more_versions_the_more_changes_there_were(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _, vectors = index
    read, find = list[str](), Artifact.find_bytes
    monkeypatch.setattr(Artifact, "read_bytes", lambda one, name: read.append(name) or find(one, name))
    monkeypatch.setattr(Artifact, "find_bytes", lambda one, name: read.append(name) or find(one, name))
    numbers = list[int]()
    for row in range(20):
        read.clear()
        delete(output, [uid_of(row)])
        numbers.append(sum(name == "index.json" or CHANGE.fullmatch(name) is not None for name in read))
        assert len(_changes(output)) <= 2
    assert set(numbers[2:]) == {3}  # the newest, and both that stay
    assert _changes(output) == ["changes/000019.json", "changes/000020.json"]
    monkeypatch.undo()
    assert rows_of(NeighbourIndex.open(output), vectors) == {20, 21, 22, 23}


def test_versions_that_an_earlier_release_left_go_with_the_next_change(index: Any) -> None:
    output, _, vectors = index
    delete(output, [uid_of(0)])
    first = output.read_bytes("changes/000001.json")
    delete(output, [uid_of(1)])
    delete(output, [uid_of(2)])
    output.write_bytes("changes/000001.json", first)
    assert restore(output, [uid_of(0)]).version == 4
    assert _changes(output) == ["changes/000003.json", "changes/000004.json"]
    assert output.exists("index.json")  # the manifest has it
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24)) - {1, 2}
    with pytest.raises(StepError, match="version 1 is gone: the index has version 4 by now"):
        NeighbourIndex.open(output, version_number=1)
    with pytest.raises(DataError, match=r"no file changes/000009\.json"):
        read_version(output, 9)
    remove_earlier_versions(output)
    assert _changes(output) == ["changes/000004.json"]


def test_a_reader_whose_version_is_removed_between_listing_and_reading_reads_the_newest(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, workspace, vectors = index
    append(output, commit_embed(workspace, "more", vectors[24:], first=24))
    names, before = Artifact.names, list[str]()
    delete(output, [uid_of(1), uid_of(2)])

    def names_then_changes(self: Artifact) -> list[str]:
        listed = names(self)
        if not before:
            before.extend(listed)
            for row in (1, 2):
                delete(output, [uid_of(row)])
        return listed

    for read in (
        lambda: read_version(output).number,
        lambda: len(NeighbourIndex.open(output).sources),
        lambda: len(appended_embeddings(output, {"embed": "base"})),
    ):
        expected = read()
        restore(output, [uid_of(1), uid_of(2)])
        before.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Artifact, "names", names_then_changes)
            result = read()
        assert result in {expected, expected + 3}, read  # three changes since
        assert f"changes/{read_version(output).number - 2:06d}.json" not in output.names()


def test_segments_of_later_changes_never_take_the_number_of_an_earlier_one(index: Any) -> None:
    output, workspace, vectors = index
    for number, first in enumerate((24, 36), start=1):
        append(output, commit_embed(workspace, str(first), vectors[first : first + 12], first=first))
        assert read_version(output).segments[-1] == f"segment_{number:05d}"
    compact(output)
    for row in (3, 4, 5):
        delete(output, [uid_of(row)])
    compact(output)
    assert read_version(output).segments == ("segment_00004",)
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(48)) - {3, 4, 5}


def test_a_newest_version_that_cannot_be_read_is_named(index: Any) -> None:
    output = index[0]
    delete(output, [uid_of(0)])
    output.write_bytes("changes/000001.json", b"{")
    for read in (lambda: read_version(output), lambda: appended_embeddings(output, {})):
        with pytest.raises(DataError, match=r"changes/000001\.json: .*JSON"):
            read()

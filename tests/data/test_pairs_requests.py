"""What the pairs step asks of the storage: it grows with the files of the list, and with nothing else."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.data import duplicates, make_pairs, sources
from pipeline.data.make_pairs import COMPARE, PairsMaker, PairsSummary, write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.sources import Source
from pipeline.errors import StepError
from pipeline.recipe.pairs_sections import PairsConfig, PairsList
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.pairs import run_pairs
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.data.listing import bytes_of, write_repeats
from tests.tiny.recipe import tiny_tables
from tests.tiny.shards import write_tar


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read of the artifacts of this process: ``records`` of all tasks, or a file by its name."""
    made: list[str] = []
    shard_records, path = Artifact.shard_records, Artifact.path

    def records_noted(self: Artifact, *, live: bool = True) -> dict[str, ShardRecord]:
        made.append("records")
        return shard_records(self, live=live)

    def path_noted(self: Artifact, name: str) -> Path:
        made.append(name)
        return path(self, name)

    monkeypatch.setattr(Artifact, "shard_records", records_noted)
    monkeypatch.setattr(Artifact, "path", path_noted)
    return made


@pytest.mark.parametrize("max_pairs", [0, 1000])
def test_the_records_of_all_tasks_are_read_once_a_phase_and_no_part_is_read_again(
    max_pairs: int, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repeats(tmp_path / "list", num_parts=40, rows=9)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    pairs = {"source": "list", "path": str(tmp_path / "list"), "resources": {"num_workers": 1}, "max_pairs": max_pairs}
    recipe = parse_recipe(tiny_tables(tmp_path / "w", pairs=pairs))
    context = StepContext(recipe, make_plan(recipe)[0], recipe.workspace)
    assert run_pairs(context).counts["in"] == 360
    assert len(Pairs(context.output).parts) == (1 if max_pairs else 40)
    assert calls.count("records") <= 7  # of four phases, and of what lies between them
    assert not [name for name in calls if "/" not in name and name.endswith(".parquet")]


def test_max_pairs_reads_the_records_of_the_pieces_before_once(calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(9):
        write_tar(tmp_path / f"in/{number}.tar", [(f"{key}.{end}", b"") for key in "ab" for end in ("jpg", "txt")])
    source = Source(PairsConfig(source="shards", path=str(tmp_path / "in"), max_pairs=13))
    for num_reads in (0, 1):  # the second maker has made none of the pieces
        maker = PairsMaker(source, Artifact(str(tmp_path / "out")))
        names = next(maker.phases())
        rows = [maker.make(name).counts.get("in", 0) for name in (names if not num_reads else reversed(names))]
        assert sorted(rows) == [0, 0, 1, 2, 2, 2, 2, 2, 2]
        assert calls.count("records") == num_reads


def _write_tars(folder: Path, num_tars: int, num_samples: int) -> None:
    """Tars of which each begins with the last sample of the one before; the second has none."""
    folder.mkdir()
    for tar in range(num_tars):
        numbers = range(0 if tar == 1 else num_samples)
        texts = [f"text {tar * (num_samples - 1) + number}".encode() for number in numbers]
        members = [(f"{number}.{end}", text) for number, text in enumerate(texts) for end in ("jpg", "txt")]
        write_tar(folder / f"{tar:03d}.tar", members)


@pytest.mark.parametrize("max_pairs", [0, 3, 8, 1000])
def test_tars_that_are_read_together_give_the_same_list(
    max_pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, num_tars in (("in", 11), ("more", 5)):
        _write_tars(tmp_path / name, num_tars, 3)
    lists = tuple(PairsList(path=str(tmp_path / name)) for name in ("in", "more"))
    source = Source(PairsConfig(source="shards", lists=lists, max_pairs=max_pairs))
    made = list[tuple[dict[str, bytes], PairsSummary]]()
    for most in (1024, 4, 1):
        monkeypatch.setattr(make_pairs, "MOST_READS", most)
        output = Artifact(str(tmp_path / f"out{most}"))
        summary = write_pairs(source, output)
        made.append((bytes_of(tmp_path / f"out{most}"), summary))
        assert len([name for name in output.names() if name.endswith(".runs")]) <= 2 * most
    assert made[1:] == made[:1] * 2
    assert len(made[0][0]) == len(source.pieces()) + 1


def test_what_is_asked_of_the_storage_grows_with_the_tars_and_not_with_the_groups(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_pairs, "MOST_READS", 4)
    asked = list[int]()
    for group_rows in (1000, 10):
        monkeypatch.setattr(duplicates, "GROUP_ROWS", group_rows)
        _write_tars(tmp_path / f"in{group_rows}", 20, 3)
        output = Artifact(str(tmp_path / f"out{group_rows}"))
        calls.clear()
        write_pairs(Source(PairsConfig(source="shards", path=str(tmp_path / f"in{group_rows}"))), output)
        num_groups = len([name for name in output.names() if name.endswith(".npy")]) - 1
        assert len([name for name in calls if name.endswith(".runs")]) == 4
        assert len([name for name in calls if name.startswith(COMPARE)]) == num_groups
        asked.append(len([name for name in calls if name != "records"]) - num_groups)
    assert num_groups == 6
    assert asked[0] == asked[1] == 4 + 20 + 1  # runs, rows, and what was found


def test_a_full_disk_is_named_before_what_was_found_is_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, int, int]]()

    def fail(handle: int, start: int, num_bytes: int) -> None:
        asked.append((start, num_bytes, os.fstat(handle).st_size))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source, output = write_repeats(tmp_path / "list"), Artifact(str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        with pytest.raises(StepError, match=r"live/repeats\.npy: the disk is full"):
            write_pairs(source, output)
    [(start, num_bytes, size_bytes)] = asked
    assert start == 0
    assert num_bytes == size_bytes
    assert not output.exists("live/repeats.npy")
    num_found = write_pairs(source, output).counts["duplicate"]
    assert size_bytes > 8 * num_found > 0

"""Arrays on a disk that is full: they are written whole, or there is an error."""

import hashlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.arrays import save_array, write_values
from pipeline.data.duplicates import Runs, RunWriter, repeated_positions
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.sources import Source
from pipeline.errors import StepError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.workspace.store import Artifact
from tests.small_disk import SmallDisk, small_disk
from tests.tiny.storage import files_of_at_most

_NUM_UIDS = 512
"""With so many the last 16 bytes of a file of runs are alone on their page."""


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Generator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def _write_runs(path: Path) -> None:
    with path.open("wb") as stream:
        runs = RunWriter(stream)
        runs.begin(0)
        runs.add([hashlib.md5(b"%d" % (number % 500)).digest() for number in range(_NUM_UIDS)])
        runs.close()


def _write_array(path: Path) -> None:
    save_array(path, np.arange(600, dtype=np.uint64))


_WRITERS: dict[str, Callable[[Path], None]] = {"runs": _write_runs, "array": _write_array}


@pytest.mark.parametrize("name", _WRITERS)
def test_no_byte_of_an_array_is_lost_at_a_full_disk_without_an_error(
    name: str, disk: SmallDisk, tmp_path: Path
) -> None:
    _WRITERS[name](tmp_path / "whole")
    whole, path = (tmp_path / "whole").read_bytes(), disk.folder / "file"
    num_pages = -(-len(whole) // 4096)
    for pages in range(1, num_pages):
        disk.grow(4 * pages)
        with pytest.raises(OSError, match="No space left on device"):
            _WRITERS[name](path)
        path.unlink()
    disk.grow(4 * num_pages)
    _WRITERS[name](path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", _WRITERS)
def test_an_array_without_its_last_bytes_is_an_error(name: str, tmp_path: Path) -> None:
    _WRITERS[name](tmp_path / "whole")
    num_bytes = (tmp_path / "whole").stat().st_size
    with files_of_at_most(num_bytes - 16), pytest.raises(OSError, match="File too large"):
        _WRITERS[name](tmp_path / "file")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.arange(12, dtype=">u8").reshape(3, 4).T,
        np.zeros((0, 4), np.float32),
        np.array([(1, 2.0)], dtype=[("row", "<i8"), ("score", "<f4")]),
    ],
    ids=["halves", "turned", "empty", "records"],
)
def test_arrays_come_back_as_they_were(array: Any, tmp_path: Path) -> None:
    save_array(tmp_path / "array.npy", array)
    loaded = np.load(tmp_path / "array.npy")
    assert (loaded.dtype, loaded.tolist()) == (array.dtype, array.tolist())
    with (tmp_path / "values").open("wb") as stream:
        write_values(stream, array)
    assert (tmp_path / "values").read_bytes() == array.tobytes()


def test_runs_come_back_as_they_were(tmp_path: Path) -> None:
    _write_runs(tmp_path / "runs")
    runs = Runs.of(tmp_path / "runs")
    assert repeated_positions([runs], (0, 1024)).tolist() == list(range(500, _NUM_UIDS))


def test_a_disk_that_is_full_for_a_moment_changes_no_row_of_the_pairs(disk: SmallDisk, tmp_path: Path) -> None:
    urls = [f"http://a/{row % 505}" for row in range(512)]
    (tmp_path / "list.txt").write_text("\n".join(urls))
    source = Source(PairsConfig(source="list", path=str(tmp_path / "list.txt")))
    calm, full = Artifact(str(tmp_path / "calm")), Artifact(str(disk.folder / "full"))
    counts, failures = write_pairs(source, calm).counts, list[str]()
    assert counts == {"in": 512, "ok": 505, "duplicate": 7}
    for size_kb in range(8, 400, 4):
        disk.grow(size_kb)
        try:
            again = write_pairs(source, full).counts
        except StepError as error:
            failures.append(str(error))
        else:
            break
    assert again == counts
    assert len(failures) > 5
    assert all("the disk is full" in failure for failure in failures)
    columns = Pairs(calm).columns
    assert Pairs(full).read(0, 505, columns) == Pairs(calm).read(0, 505, columns)

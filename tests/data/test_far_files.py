"""Parts of many files in a store, of which this machine has some: what is asked for, and that it is the right one."""

import contextlib
import multiprocessing
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import far_files
from pipeline.data.far_files import FarFiles
from pipeline.data.vectors import RowGroups, StoredVectors
from pipeline.errors import StepError

_FILES, _BYTES, _SIZE = 40, 100_000, 8


def _random_halves(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(1, 60, _BYTES, np.uint8).tobytes()


@dataclass
class _Store:
    """Files of random numbers of half precision, and a folder for copies."""

    folder: Path
    contents: list[bytes] = field(default_factory=lambda: [_random_halves(n) for n in range(_FILES)])
    looks: list[int] = field(default_factory=list[int])
    fetches: list[int] = field(default_factory=list[int])
    parts: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    is_full: bool = False

    def path_here(self, number: int) -> Path | None:
        self.looks.append(number)
        path = self.folder / str(number)
        return path if path.exists() else None

    def path(self, number: int) -> Path:
        if self.is_full:
            raise StepError("no space left")
        self.fetches.append(number)
        (self.folder / str(number)).write_bytes(self.contents[number])
        return self.folder / str(number)

    def num_bytes(self, number: int) -> int:
        return len(self.contents[number])

    def read_parts(self, parts: Sequence[tuple[int, int, int]]) -> list[bytes]:
        self.parts += parts
        return [self.contents[number][start:stop] for number, start, stop in parts]

    def clear(self) -> None:
        for calls in (self.looks, self.fetches, self.parts):
            calls.clear()


@pytest.fixture
def store(tmp_path: Path) -> _Store:
    return _Store(tmp_path)


def _read(far: FarFiles, store: _Store, places: Sequence[tuple[int, int]]) -> None:
    """Read some places (file, start), and compare what comes with what the files hold."""
    numbers, starts = (np.array(each, np.int64) for each in zip(*places, strict=True))
    values = far.read(numbers, starts, _SIZE)
    assert [bytes(value) for value in values] == [store.contents[number][start:][:_SIZE] for number, start in places]


def _random_places(count: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return list(
        zip(rng.integers(0, _FILES, count).tolist(), rng.integers(0, _BYTES - _SIZE, count).tolist(), strict=True)
    )


def test_places_come_in_their_order_whether_a_file_is_here_or_not(
    store: _Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    monkeypatch.setattr(far_files, "_VECTORS_AT_ONCE", 70)
    for number in range(0, _FILES, 3):
        store.path(number)
    store.clear()
    far, places = FarFiles(store), _random_places(200)
    _read(far, store, [*places, *places[::-1], (1, 0), (1, _BYTES - _SIZE)])
    assert sorted(store.looks) == sorted({1, *(number for number, _ in places)})  # each once
    assert {number % 3 for number, _, _ in store.parts} == {1, 2}
    store.clear()
    _read(far, store, places)
    assert store.looks == store.fetches == []
    assert far.read(np.zeros(0, np.int64), np.zeros(0, np.int64), _SIZE).shape == (0, _SIZE)


def test_neighbours_in_a_file_are_one_request(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    monkeypatch.setattr(far_files, "_GAP_BYTES", 100)
    _read(FarFiles(store), store, [(7, 9000), (5, 0), (7, 0), (7, 108), (5, 50), (7, 0), (7, 217)])
    assert store.parts == [(5, 0, 58), (7, 0, 116), (7, 217, 225), (7, 9000, 9008)]


def test_a_file_comes_whole_when_its_requests_have_cost_as_much(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", _BYTES // 4)
    far = FarFiles(store)
    for _ in range(3):
        _read(far, store, [(3, 10), (4, 10)])
    assert (store.fetches, len(store.parts)) == ([], 6)
    _read(far, store, [(4, 10)])
    _read(far, store, [(4, 20), (3, 20)])
    assert (store.fetches, len(store.parts)) == ([4, 3], 6)


def test_few_files_come_whole_in_one_call(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", _BYTES)
    far, places = FarFiles(store), [(number, 10) for number in range(20)]
    for num_whole in (8, 16, 20, 20):
        _read(far, store, places)
        assert len(store.fetches) == num_whole
    assert len(store.parts) == 12 + 4


def test_a_copy_that_goes_away_is_not_fetched_again(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", _BYTES)
    monkeypatch.setattr(far_files, "num_mapped_files", lambda: 1)
    far = FarFiles(store)
    for number in (1, 2):
        _read(far, store, [(number, 10)])
    shutil.rmtree(store.folder)
    for number in (1, 1, 2):
        _read(far, store, [(number, 10)])
    assert (store.fetches, store.parts) == ([1, 2], [(1, 10, 18)] * 2)  # the other one is still mapped


def test_a_full_disk_stops_no_search(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", _BYTES)
    store.is_full = True
    far = FarFiles(store)
    for _ in range(2):
        _read(far, store, [(3, 10)])
    assert store.parts == [(3, 10, 18)] * 2


def _read_with_few_open_files(folder: Path, *, are_far: bool) -> None:
    """Read more files than this process may open, which has nearly all open that it may."""
    num_open = 200
    num_files = num_open + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    with contextlib.ExitStack() as stack:
        while max(int(file.name) for file in Path("/proc/self/fd").iterdir()) < num_open:
            stack.enter_context(Path(os.devnull).open())
        store = _Store(folder, [_random_halves(0)[: 4 * _SIZE]] * num_files)
        for number in range(num_files):
            store.path(number)
        groups = RowGroups(np.arange(num_files), np.arange(num_files), np.zeros((num_files, 2), np.int64))
        vectors = StoredVectors(groups, store.path, 4, FarFiles(store) if are_far else None)
        assert vectors.read(np.arange(num_files), "z_image").shape == (num_files, 4)


@pytest.mark.parametrize("are_far", [False, True])
def test_a_process_that_may_open_few_files_reads_many(*, are_far: bool, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_read_with_few_open_files, args=(tmp_path,), kwargs={"are_far": are_far}
    )
    process.start()
    process.join()
    assert process.exitcode == 0

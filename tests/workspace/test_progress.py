import itertools
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.workspace.progress import (
    ERROR,
    PROGRESS,
    Progress,
    ProgressState,
    byte_size,
    duration,
    last_error,
    read_progress,
)
from pipeline.workspace.store import Artifact
from tests.tiny.storage import fail_calls


def _wall_s(artifact: Artifact) -> float:
    state = read_progress(artifact)
    assert state is not None
    return state.wall_s


def test_a_reading_with_a_field_of_a_later_release_is_read(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    Progress(artifact).update(3, 9, "rows", force=True)
    artifact.write_json(PROGRESS, artifact.read_json(PROGRESS) | {"host": "here"})
    state = read_progress(artifact)
    assert state is not None
    assert state.done == 3


def test_a_reading_is_taken_again_where_the_storage_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact(str(tmp_path))
    assert last_error(artifact) == ""
    Progress(artifact).update(3, 9, "rows", force=True)
    artifact.write_bytes(ERROR, b"first\nlast\n\n")
    expected = read_progress(artifact)
    for read, answer in ((read_progress, expected), (last_error, "last")):
        with monkeypatch.context() as patch:
            failed = fail_calls(patch, "open")
            assert read(artifact) == answer
            assert len(failed) == 1


def test_a_new_notice_is_written_at_once(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    progress = Progress(artifact, every_s=1000)
    for done, notice in enumerate(("", "a worker was lost", "a worker was lost", "another was lost")):
        progress.notice = notice
        progress.update(done, 10, "rows")
    state = read_progress(artifact)
    assert state is not None
    assert (state.done, state.notice) == (3, "another was lost")
    progress.update(4, 10, "rows")
    assert read_progress(artifact) == state


def test_progress_counts_the_work_and_not_the_waiting(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    progress = Progress(artifact, waits=True)
    time.sleep(0.3)
    progress.update(0, 10, "rows", force=True)
    assert _wall_s(artifact) == 0
    progress.begin(ago_s=5)
    progress.begin(ago_s=50)  # the second worker's: the clock runs already
    progress.update(0, 10, "rows", force=True)
    assert 5 <= _wall_s(artifact) < 6


def test_the_rate_does_not_count_the_time_before_the_first_row(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    progress = Progress(artifact, waits=True)
    progress.update(0, 10, "", "starting", force=True)
    progress.begin(ago_s=5)
    progress.update(0, 10, "rows", force=True)
    time.sleep(0.5)
    progress.update(5, 10, "rows", force=True)
    state = read_progress(artifact)
    assert state is not None
    assert state.rate == pytest.approx(10, rel=0.1)
    assert state.eta_s == pytest.approx(0.5, rel=0.1)


def test_progress_of_a_second_start_adds_to_the_first(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    first = Progress(artifact, waits=True)
    first.begin(ago_s=3)
    first.update(1, 2, "steps", force=True)
    second = Progress(artifact)
    second.update(1, 2, "steps", force=True)
    assert 3 <= _wall_s(artifact) < 4
    assert read_progress(artifact).rate == 0  # type: ignore[union-attr]


def test_the_workers_of_each_start_are_counted(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    for num_workers, seconds in ((4, 10), (2, 5)):
        start = Progress(artifact, waits=True, num_workers=num_workers)
        start.begin(ago_s=seconds)
        start.update(1, 2, "steps", force=True)
        Progress(artifact, waits=True).update(0, 1, "", "waiting for 1 x 1 CPU", force=True)
    assert 15 <= Progress(artifact, waits=True).wall_s < 16
    assert 50 <= Progress(artifact, waits=True).node_s < 54
    assert Progress(artifact, waits=True).num_workers == 4


def test_a_reading_of_before_workers_were_counted_keeps_its_time(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    reading = ProgressState(1, 2, "steps", 0.0, 0.0, "", 3600.0, 0.0)
    artifact.write_json(PROGRESS, {**asdict(reading), "node_s": 0.0})
    assert Progress(artifact, waits=True).node_s == 3600.0


def test_progress_writes_at_its_own_pace_and_at_the_end(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    progress = Progress(artifact, every_s=60)
    for done, reported in [(0, 0), (1, 0), (2, 2)]:
        progress.update(done, 2, "rows")
        assert read_progress(artifact).done == reported  # type: ignore[union-attr]


@pytest.mark.parametrize(("write_s", "every_s"), [(0.001, 1.0), (0.05, 5.0), (0.3, 30.0), (30.0, 60.0)])
def test_a_slow_store_is_written_to_in_one_percent_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_s: float, every_s: float
) -> None:
    artifact, now, written = Artifact(str(tmp_path)), [0.0], list[float]()

    def write(*_: object) -> None:
        written.append(now[0])
        now[0] += write_s

    monkeypatch.setattr("pipeline.workspace.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(artifact, "write_json", write)
    progress = Progress(artifact)
    for done in range(900):
        progress.update(done, 1000, "steps")
        now[0] += 0.5
    gaps = [later - earlier - write_s for earlier, later in itertools.pairwise(written)]
    assert len(gaps) >= 4
    assert gaps[0] < 2  # one slow write may be chance
    assert all(every_s - 0.01 <= gap <= every_s + 0.51 for gap in gaps[1:])


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (ProgressState(0, 1, "", 0.0, 0.0, "waiting for 1 x 1 CPU", 0.0, 0.0), "waiting for 1 x 1 CPU"),
        (ProgressState(5, 20, "rows", 2.5, 6.0, "", 2.0, 0.0), "5/20 rows (25 %), 2.5/s, 6 s to go"),
        (
            ProgressState(10, 1000, "steps", 0.5, 1980.0, "loss 0.1", 20.0, 0.0),
            "10/1000 steps (1 %), 0.5/s, 33 min to go, loss 0.1",
        ),
        (ProgressState(1, 100, "steps", 0.01, 9900.0, "", 9.0, 0.0), "1/100 steps (1 %), 0.0/s, 2 h 45 min to go"),
    ],
)
def test_progress_reads_well(state: ProgressState, text: str) -> None:
    assert state.text == text


def test_progress_has_begun_when_it_counts_something(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    progress = Progress(artifact, waits=True)
    progress.update(0, 1, "", "waiting for 1 x 1 CPU", force=True)
    state = read_progress(artifact)
    assert state is not None
    assert not state.has_begun
    progress.update(0, 500, "steps", "training", force=True)
    state = read_progress(artifact)
    assert state is not None
    assert state.has_begun


def test_another_unit_is_written_at_once_and_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """A training that continues at step 400 has not made 400 steps while it loaded its checkpoint."""
    artifact = Artifact(str(tmp_path))
    progress = Progress(artifact, every_s=1000)
    progress.update(0, 1, "networks", "loading")
    progress.update(400, 500, "steps", "training")
    state = read_progress(artifact)
    assert state is not None
    assert (state.done, state.unit, state.rate, state.eta_s) == (400, "steps", 0.0, 0.0)
    progress.update(401, 500, "steps", force=True)
    later = read_progress(artifact)
    assert later is not None
    assert 0 < later.rate * (later.wall_s - state.wall_s) < 1.5
    progress.update(402, 500, "steps")
    assert read_progress(artifact) == later


@pytest.mark.parametrize(
    ("seconds", "about", "exactly"),
    [
        (4.24, "4 s", "4.2 s"),
        (42.4, "42 s", "42 s"),
        (185, "3 min", "3 min 05 s"),
        (3599.6, "60 min", "60 min 00 s"),
        (7845, "2 h 11 min", "2 h 11 min"),
    ],
)
def test_a_time_in_words(seconds: float, about: str, exactly: str) -> None:
    assert (duration(seconds), duration(seconds, exact=True)) == (about, exactly)


def test_bytes_in_words_have_three_digits() -> None:
    counts = (0, 999, 999.5, 12_345, 999_499, 999_500, 1.5e9, 3.25e15)
    assert [byte_size(count) for count in counts] == [
        "0 B", "999 B", "1 KB", "12.3 KB", "999 KB", "1 MB", "1.5 GB", "3,250 TB",
    ]  # fmt: skip

"""The pool of workers on a real Ray. Workers import this module: it stays light."""

import contextlib
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipeline.errors import DataError, StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.sections import TaskResources
from pipeline.runtime import pool
from pipeline.runtime.context import StepContext
from pipeline.runtime.pool import ShardJob, ShardReading, map_shards
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress, read_progress
from pipeline.workspace.store import Artifact

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
_TWO = TaskResources(num_workers=2, cpus_per_worker=0.5, max_retries=1)
_ONE = TaskResources(num_workers=1, cpus_per_worker=0.5, max_retries=1)


def _context(folder: Path) -> StepContext:
    recipe = parse_recipe({"workspace": str(folder / "workspace")})
    step = next(step for step in make_plan(recipe) if step.name == "download")
    return StepContext(recipe, step, recipe.workspace)


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class _Stage:
    """Writes a shard's name; shards named for a fault have it, once or always."""

    def __init__(self, context: StepContext) -> None:
        self._output = context.output

    def __call__(self, shard: str) -> ShardRecord:
        first = not self._output.exists(f"tried-{shard}")
        self._output.write_bytes(f"tried-{shard}", b"")
        if shard == "dies-beside" and first:  # when its partner has begun, which would hang once more else
            _wait_for(lambda: self._output.exists("tried-hangs-once"))
        if shard == "dies" or (shard in {"dies-once", "dies-beside"} and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == "hangs-once" and first:
            time.sleep(600)
        if shard.startswith("meets-"):  # waits until its partner is being made, too
            _wait_for(lambda: len([name for name in self._output.names() if name.startswith("tried-meets-")]) == 2)
        if shard == "bad":
            raise DataError("shard bad: row 3 is wrong")
        if shard == "bug":
            raise KeyError("surprise")
        self._output.write_bytes(shard, f"{shard} by {os.getpid()}".encode())
        counts = {} if shard == "uncounted" else {"in": 2, "ok": 2}
        record = ShardRecord(shard=shard, counts=counts, files={shard: self._output.describe(shard)})
        self._output.commit_shard(record)
        return record


def _map(context: StepContext, *shards: str, resources: TaskResources = _ONE, **settings: Any) -> list[ShardRecord]:
    return map_shards(context, ShardJob(_Stage, shards, 2 * len(shards), resources, **settings))


def test_map_shards_makes_each_shard_and_none_twice(tmp_path: Path) -> None:
    context = _context(tmp_path)
    names = ["uncounted", *(f"s{i}" for i in range(4))]  # the first has no rows to count
    assert [record.shard for record in _map(context, *names[:3])] == names[:3]
    contents = {name: context.output.path(name).read_bytes() for name in names[:3]}
    assert [record.shard for record in _map(context, *names)] == names
    assert {name: context.output.path(name).read_bytes() for name in names[:3]} == contents
    assert set(context.output.shard_records()) == set(names)


def test_map_shards_makes_a_lost_workers_shard_again(tmp_path: Path) -> None:
    records = _map(_context(tmp_path), "a", "dies-once", "b", "c", resources=_TWO)
    assert [record.shard for record in records] == ["a", "dies-once", "b", "c"]


def test_a_worker_makes_several_shards_at_once_and_all_come_back_when_it_is_lost(tmp_path: Path) -> None:
    records = _map(_context(tmp_path), "meets-a", "meets-b", "c", num_at_once=2)
    assert [record.shard for record in records] == ["meets-a", "meets-b", "c"]
    context = _context(tmp_path / "lost")
    names = ["hangs-once", "dies-beside", "c", "d"]
    assert [record.shard for record in _map(context, *names, num_at_once=2)] == names
    assert set(context.output.shard_records()) == set(names)


def test_map_shards_gives_up_a_shard_that_hangs(tmp_path: Path) -> None:
    assert len(_map(_context(tmp_path), "hangs-once", "a", limit_s=3)) == 2


def test_map_shards_names_the_shard_that_kills_its_workers_and_keeps_the_others(tmp_path: Path) -> None:
    context = _context(tmp_path)
    with pytest.raises(StepError, match=r"download: shard dies was lost 2 times; .*run again to continue"):
        _map(context, "a", "b", "dies")
    assert {"a", "b"} <= set(context.output.shard_records())


def test_map_shards_raises_what_a_worker_raised(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        _map(_context(tmp_path), "a", "bad")
    assert str(caught.value) == "shard bad: row 3 is wrong"
    with pytest.raises(KeyError) as unforeseen:
        _map(_context(tmp_path / "other"), "bug")
    assert unforeseen.value.__notes__ == ["while making shard bug"]


def test_map_shards_counts_no_time_before_its_workers_have_a_place(tmp_path: Path) -> None:
    context = _context(tmp_path)

    @ray.remote(num_cpus=2)
    def occupy(seconds: float) -> None:
        time.sleep(seconds)

    busy = [occupy.remote(0.1), occupy.remote(3)]
    ray.wait(busy, num_returns=1)
    begun = time.monotonic()
    _map(context, "a")
    assert time.monotonic() - begun > 2.5
    state = read_progress(context.output)
    assert state is not None
    assert 0 < state.wall_s < 2


def test_map_shards_stops_when_it_is_asked_to(tmp_path: Path) -> None:
    heard: list[str] = []

    def stop(records: list[ShardRecord]) -> None:
        heard.extend(record.shard for record in records)
        if len(heard) >= 2:
            raise StepError("enough")

    context = _context(tmp_path)
    with pytest.raises(StepError, match="enough"):
        _map(context, *(f"s{i}" for i in range(40)), on_records=stop)
    assert len(context.output.shard_records()) < 40


def test_map_shards_tells_each_record_once_those_of_before_first(tmp_path: Path) -> None:
    context, heard = _context(tmp_path), list[list[str]]()
    _map(context, "a", "c")
    _map(context, *"abcd", on_records=lambda records: heard.append([record.shard for record in records]))
    assert heard[0] == ["a", "c"]
    assert [shard for shards in heard[1:] for shard in shards] == ["b", "d"]


def _worker_names() -> list[str]:
    names: list[str] = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end while we look
            names += [part for part in child.cmdline() if "_Actor" in part]
    return names


def test_no_worker_is_left_behind(tmp_path: Path) -> None:
    workers: list[str] = []
    _map(_context(tmp_path), "a", "b", resources=_TWO, on_records=lambda _records: workers.extend(_worker_names()))
    assert workers
    give_up = time.monotonic() + 10
    while _worker_names() and time.monotonic() < give_up:
        time.sleep(0.1)
    assert _worker_names() == []


def test_map_shards_waits_for_a_shard_whose_readings_change_and_counts_its_rows(tmp_path: Path) -> None:
    context = _context(tmp_path)
    start = time.monotonic()
    job = ShardJob(
        _Slow,
        ["slow"],
        100,
        _ONE,
        limit_s=2,
        read=lambda shards: dict.fromkeys(shards, ShardReading(rows=int(10 * (time.monotonic() - start)))),
    )
    counts: list[int] = []
    update = Progress.update

    def note(progress: Progress, done: int, *values: Any, **settings: Any) -> None:
        counts.append(done)
        update(progress, done, *values, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", note)
        assert len(map_shards(context, job)) == 1
    assert any(0 < done < 100 for done in counts)


class _Slow(_Stage):
    """Takes twice the time after which a silent shard is given up."""

    def __call__(self, shard: str) -> ShardRecord:
        time.sleep(5)
        return super().__call__(shard)


def test_a_driver_that_waits_for_storage_does_not_hold_it_against_a_worker(tmp_path: Path) -> None:
    beats, losses = iter(range(1000)), list[str]()

    def read(shards: Sequence[str]) -> dict[str, ShardReading]:
        """The first is nothing new, after a wait that is longer than the limit."""
        beat = next(beats)
        if not beat:
            time.sleep(2)
        return dict.fromkeys(shards, ShardReading(beat=beat))

    def on_loss(shard: str, _number: int) -> bool:
        losses.append(shard)
        return True

    _map(_context(tmp_path), "a", limit_s=1, read=read, on_loss=on_loss)
    assert losses == []


def test_map_shards_asks_whether_a_lost_shard_is_tried_again(tmp_path: Path) -> None:
    context, losses = _context(tmp_path), list[tuple[str, int]]()

    def on_loss(shard: str, number: int) -> bool:
        losses.append((shard, number))
        return number < 3

    with pytest.raises(StepError, match="shard dies was lost 3 times"):
        _map(context, "a", "dies", num_at_once=2, on_loss=on_loss)
    assert [loss for loss in losses if loss[0] == "dies"] == [("dies", 1), ("dies", 2), ("dies", 3)]
    assert ("a", 2) not in losses  # what was lost once is made alone


class _Pass(_Stage):
    """Commits in a folder of its own, as the passes of a filter do."""

    def __init__(self, context: StepContext) -> None:
        super().__init__(context)
        self._output = Artifact(f"{context.output.uri}/live/pass")


def test_a_pass_commits_in_its_own_folder_and_the_progress_says_what_it_has(tmp_path: Path) -> None:
    context = _context(tmp_path)
    output = Artifact(f"{context.output.uri}/live/pass")

    shards: list[str] = []

    def add(records: list[ShardRecord]) -> None:
        shards.extend(record.shard for record in records)

    def note() -> str:
        return f"{len(shards)} of them"

    job = ShardJob(_Pass, ["a", "b"], 4, _ONE, unit="parts", on_records=add, note=note, output=output)
    assert [record.shard for record in map_shards(context, job)] == ["a", "b"]
    assert context.output.shard_records() == {}
    assert list(output.shard_records()) == ["a", "b"]
    state = read_progress(context.output)
    assert state is not None
    assert (state.done, state.unit, state.message) == (4, "parts", "2 of them")
    output.write_bytes("tried-a", b"before")
    map_shards(context, job)
    assert output.path("tried-a").read_bytes() == b"before"


def test_who_waits_is_told_since_when_for_what_and_that_nothing_offers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_SLOW_START_S", -1.0)
    for resources, what, is_offered in (
        (replace(_ONE, cpus_per_worker=64), "64 CPU; free now: ", False),
        (replace(_ONE, label_selector={"color": "red"}), "0.5 CPU on a machine with color=red; free now: ", False),
        (replace(_ONE, label_selector={"color": "!red"}), "0.5 CPU on a machine with color=!red; free now: ", True),
    ):
        waiting = pool._Pool(_context(tmp_path), ShardJob(_Stage, ["a"], 2, resources), deque(["a"]))
        message = waiting.message()
        waiting.close()
        assert re.match(rf"waiting since \d+ s for a worker of {what}", message)
        assert message.endswith("; no machine that is there now has that") != is_offered

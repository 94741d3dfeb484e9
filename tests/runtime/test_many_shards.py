"""The driver of a pool with many shards under way: no worker runs, and the clock moves when somebody waits."""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.sections import TaskResources
from pipeline.runtime import download_watch, pool
from pipeline.runtime.context import StepContext
from pipeline.runtime.download_watch import DownloadWatch
from pipeline.runtime.pool import ShardJob, ShardReading
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact


@dataclass(eq=False)
class _Answer:
    at: float
    value: ShardRecord | tuple[float, str] | Exception


@dataclass
class _Cluster:
    """In the place of Ray and of the clock; a shard is ready some time after it was begun."""

    shard_s: Callable[[str], float]
    fault: Callable[[str], Exception | None] = lambda _shard: None
    now: float = 0.0
    begun: list[str] = field(default_factory=list[str])

    exceptions = ray.exceptions

    def use(self, patch: pytest.MonkeyPatch) -> None:
        clock = SimpleNamespace(monotonic=lambda: self.now)
        for name, value in {
            "ray": self,
            "time": clock,
            "worker_options": lambda *_, **__: {},
            "cluster_has_roles": lambda: False,
            "_Actor": SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor)),
        }.items():
            patch.setattr(pool, name, value)
        patch.setattr(download_watch, "time", clock)

    def _actor(self) -> "_Actor":
        actor = _Actor()
        actor.start = SimpleNamespace(remote=lambda *_: _Answer(self.now, (1.0, "machine")))
        actor.make = SimpleNamespace(remote=self._make)
        return actor

    def _make(self, shard: str) -> _Answer:
        self.begun.append(shard)
        record = ShardRecord(shard=shard, counts={"in": 10, "ok": 10}, files={})
        return _Answer(self.now + self.shard_s(shard), self.fault(shard) or record)

    def wait(self, answers: list[_Answer], *, num_returns: int, timeout: float) -> tuple[list[_Answer], list[_Answer]]:
        self.now = max(self.now, min(self.now + timeout, *(answer.at for answer in answers)))
        return [answer for answer in answers if answer.at <= self.now][:num_returns], []

    def get(self, answer: _Answer) -> ShardRecord | tuple[float, str]:
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value

    def put(self, value: object) -> object:
        return value

    def kill(self, _actor: object) -> None:
        """Nothing runs."""


class _Actor:
    start: SimpleNamespace
    make: SimpleNamespace


class _SlowStore(Artifact):
    """A store whose requests take 30 ms, of which ten are made at a time."""

    cluster: _Cluster

    def find_jsons(self, names: Sequence[str]) -> list[Any]:
        self.cluster.now += 0.03 * math.ceil(len(names) / 10)
        return [{"rows": int(10 * self.cluster.now), "beat": 0, "causes": {}} for _ in names]


def _pool(folder: Path, num_workers: int, shards: Sequence[str], **settings: Any) -> pool._Pool:
    recipe = parse_recipe({"workspace": str(folder)})
    step = next(step for step in make_plan(recipe) if step.name == "download")
    resources = TaskResources(num_workers=num_workers, max_retries=1)
    job = ShardJob(Any, shards, 10 * len(shards), resources, num_at_once=2, **settings)
    return pool._Pool(StepContext(recipe, step, recipe.workspace), job, deque(shards))


def _made(one: pool._Pool) -> Counter[str]:
    made = Counter[str]()
    while one.is_busy:
        made.update(record.shard for record in one.poll())
    return made


def test_looks_at_many_shards_in_a_store_hold_up_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, output = _Cluster(lambda _: 4.0), _SlowStore(str(tmp_path))
    cluster.use(monkeypatch)
    output.cluster = cluster
    watch, losses = DownloadWatch(output), list[str]()
    shards = [f"{number:05d}" for number in range(128 * 50)]

    def on_loss(shard: str, _number: int) -> bool:
        losses.append(shard)
        return True

    many = _pool(tmp_path, 64, shards, limit_s=360, read=watch.read, on_loss=on_loss)
    assert _made(many) == Counter(shards)
    assert losses == []
    assert cluster.now < 50 * 4.0 / 0.9


def test_a_shard_that_is_finished_during_a_look_was_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, looks = _Cluster({"a": 145.0, "b": 1000.0}.__getitem__), list[float]()
    cluster.use(monkeypatch)

    def read(shards: Sequence[str]) -> dict[str, ShardReading]:
        cluster.now = max(cluster.now, 30.0 * len(looks))
        looks.append(cluster.now)
        return {shard: ShardReading(beat=len(looks) if shard == "b" else 0) for shard in shards}

    one = _pool(tmp_path, 1, ["a", "b"], limit_s=60, read=read, on_loss=lambda *_: pytest.fail("a was finished"))
    assert _made(one) == Counter(["a", "b"])
    assert cluster.begun == ["a", "b"]


def test_a_worker_whose_shards_stay_silent_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(lambda _: 1000.0 if cluster.begun.count("a") == 1 else 1.0)
    cluster.use(monkeypatch)
    assert _made(_pool(tmp_path, 1, ["a"], limit_s=60)) == Counter("a")
    assert cluster.begun == ["a", "a"]
    assert 60 < cluster.now < 70


def test_time_without_a_look_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(lambda _: 1000.0)
    cluster.use(monkeypatch)
    made = _made(_pool(tmp_path, 1, ["a"], limit_s=60, read=lambda _: {}))
    assert (made, cluster.begun) == (Counter("a"), ["a"])


def test_what_a_lost_worker_has_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(shard: str) -> Exception | None:
        return ray.exceptions.ActorDiedError() if shard == "dies" and cluster.begun.count(shard) == 1 else None

    cluster = _Cluster(lambda _: 10.0, fault)
    cluster.use(monkeypatch)
    one = _pool(tmp_path, 1, ["dies", "made", "c"])
    assert _made(one) == Counter(["dies", "made", "c"])
    assert cluster.begun == ["dies", "made", "dies", "c"]

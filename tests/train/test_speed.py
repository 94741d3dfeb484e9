"""The speed of a training: waiting for data, samples a second, counted arithmetic."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.train import speed as speed_module
from pipeline.train.speed import Speed, describe_speed, measure_peak
from tests.tiny.training import tiny_job


class _Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _batches(clock: _Clock, wait_s: float) -> Iterator[Any]:
    for number in itertools.count():
        clock.now += wait_s
        yield number


def test_the_share_that_waits_for_data_and_the_samples_a_second(tmp_path: Path) -> None:
    clock, job = _Clock(), tiny_job("prior", {}, tmp_path)
    speed = Speed(job, 10, clock=clock)
    batches = speed.timed(_batches(clock, 1.0))
    for _ in range(4):
        next(batches)
        clock.now += 3.0
    numbers = speed.read(14)
    assert numbers["samples_per_s"] == 4 * job.section.train.batch_size / 16
    assert numbers["stalled_share"] == 0.25
    next(batches)
    clock.now += 1.0
    numbers = speed.read(15)
    assert (numbers["samples_per_s"], numbers["stalled_share"]) == (job.section.train.batch_size / 2, 0.5)
    assert "50 % waiting for data" in describe_speed(numbers)


def test_mfu_is_the_counted_share_of_a_measured_peak_once_a_training_has_run_for_a_while(tmp_path: Path) -> None:
    clock = _Clock()
    speed = Speed(tiny_job("prior", {}, tmp_path), 0, clock=clock, count_after_s=30)
    clock.now += 29
    assert "mfu" not in speed.read(1)
    clock.now += 1
    one = speed.read(2)["mfu"]
    clock.now += 2
    assert speed.read(3)["mfu"] == pytest.approx(one / 2)  # half as fast
    assert 0 < one < 1


def test_a_gpu_without_room_for_the_product_costs_the_number_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed_module, "measure_peak", fail)
    speed = Speed(tiny_job("prior", {}, tmp_path), 0, count_after_s=0)
    assert "mfu" not in speed.read(1)


def test_the_peak_of_this_machine_is_that_of_a_product() -> None:
    assert 1e8 < measure_peak(torch.device("cpu"), "float32") < 1e14

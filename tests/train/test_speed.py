"""The speed of a training: waiting for data, samples a second, counted arithmetic."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.networks.costs import training_flops
from pipeline.recipe.train_sections import TrainPhase
from pipeline.train import speed as speed_module
from pipeline.train.assemble import TrainJob
from pipeline.train.speed import Speed, describe_speed, measure_peak
from tests.tiny.training import tiny_job, training_recipe


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
    clock, job = _Clock(), tiny_job("prior", {}, tmp_path, training_recipe(20))
    speed = Speed(job, 10, clock=clock)
    batches = speed.timed(_batches(clock, 1.0))
    for _ in range(4):
        next(batches)
        clock.now += 3.0
    numbers = speed.read(14)
    assert numbers["samples_per_s"] == 4 * job.section.train.batch_size / 16
    assert numbers["stalled_share"] == 0.25
    assert numbers["eta_s"] == (job.section.train.total_steps - 14) * 4
    next(batches)
    clock.now += 1.0
    numbers = speed.read(15)
    assert (numbers["samples_per_s"], numbers["stalled_share"]) == (job.section.train.batch_size / 2, 0.5)
    assert "50 % waiting for data" in describe_speed(numbers)
    assert "eta_s" not in speed.read(15)  # no step was taken since


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


def _peaks(patch: pytest.MonkeyPatch, *peaks: float) -> list[str]:
    """Let measurements of the peak give these numbers, one after another; the precisions of those that were made."""
    left, made = list(peaks), list[str]()

    def measure(_: torch.device, precision: str) -> float:
        made.append(precision)
        return left.pop(0)

    patch.setattr(speed_module, "measure_peak", measure)
    return made


def _flops_per_s(job: TrainJob, seconds: float) -> float:
    """Operations per second of a training that takes a step in so many."""
    return training_flops(job.recipe, job.name) * job.section.train.batch_size / seconds


def test_a_peak_that_was_measured_beside_others_gives_no_share_above_one_and_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, job = _Clock(), tiny_job("prior", {}, tmp_path)
    rate = _flops_per_s(job, seconds=1.0)
    made = _peaks(monkeypatch, rate / 0.8, rate / 0.4, rate / 0.6)
    speed = Speed(job, 0, count_after_s=0, clock=clock)
    shares = list[float | None]()
    for step, seconds in enumerate((1, 0.5, 30, 1, 30, 1), start=1):
        clock.now += seconds
        shares.append(speed.read(step).get("mfu"))
    # Alone, the second step takes half of the time; what others leave of the processors never lowers the peak.
    expected = [0.8, None, 0.4 / 30, 0.4, 0.4 / 30, 0.4]
    assert shares == [None if share is None else pytest.approx(share) for share in expected]
    assert len(made) == 3
    assert "MFU" not in describe_speed({"samples_per_s": 1.0, "stalled_share": 0.0, "peak_memory_gb": 1.0})


def test_each_precision_has_a_peak_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, recipe = _Clock(), training_recipe(6)
    phases = (TrainPhase(from_step=3, precision="bfloat16"),)
    prior = replace(recipe.prior, train=replace(recipe.prior.train, phases=phases))
    job = tiny_job("prior", {}, tmp_path, replace(recipe, prior=prior))
    rate = _flops_per_s(job, seconds=1.0)
    made = _peaks(monkeypatch, 2 * rate, 4 * rate)
    speed = Speed(job, 0, count_after_s=0, clock=clock)
    shares = list[float]()
    for step in (1, 2, 3, 4):
        clock.now += 1
        shares.append(speed.read(step)["mfu"])
    assert shares == pytest.approx([0.5, 0.5, 0.5, 0.25])
    assert made == ["float32", "bfloat16"]


def test_a_gpu_without_room_for_the_product_costs_the_number_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed_module, "measure_peak", fail)
    speed = Speed(tiny_job("prior", {}, tmp_path), 0, count_after_s=0)
    assert "mfu" not in speed.read(1)


def test_the_peak_of_a_processor_is_what_it_does_while_it_has_one() -> None:
    """Beside twice as many busy processes as there are processors: by the clock it would be half or less."""
    device, words = torch.device("cpu"), [sys.executable, "-c", "while True: pass"]
    assert 1e8 < measure_peak(device, "float32") < 1e14
    others = [subprocess.Popen(words) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.5)  # until they compute
        begun = time.perf_counter()
        peak = measure_peak(device, "float32")
        seconds = time.perf_counter() - begun
    finally:
        for other in others:
            other.kill()
            other.wait()
    by_the_clock = speed_module._NUM_PRODUCTS * 2 * speed_module._PRODUCT_SIDE["cpu"] ** 3 / seconds
    assert peak > 1.5 * by_the_clock

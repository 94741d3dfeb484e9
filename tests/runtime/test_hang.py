"""A training on one worker that hangs is ended and goes on; one that compiles, validates or waits is left alone."""

from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.hang import HangWatch, Stillness
from pipeline.runtime.train import run_training
from pipeline.train.job import run_job
from pipeline.train.resume import checkpoint_steps
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact
from tests.tiny.faults import processes_with
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import no_watch, tiny_inputs, tiny_job, upsampler_context

NUM_STEPS = 600  # more than it takes to suspend a worker
LIMIT_S = 100.0


def _recipe(workspace: Path, **resources: Any) -> Recipe:
    upsampler = {
        "train": {"num_steps": NUM_STEPS, "batch_size": 4},
        "resources": {"save_every_steps": 25, "log_every_steps": 5, "validation": "in_line", **resources},
    }
    return parse_recipe(tiny_tables(workspace, upsampler_1=upsampler))


def _late(*pulses: tuple[int, int, bool] | None, every_s: float, slowest_s: float = 0.0) -> list[bool]:
    """Whether each of some pulses (looks, steps, whether it may hang), read one after the other, is that of a hang."""
    stillness, late = Stillness(LIMIT_S), list[bool]()
    for number, pulse in enumerate(pulses):
        names = ("looks", "steps", "may_hang")
        read = None if pulse is None else dict(zip(names, pulse, strict=True)) | {"slowest_s": slowest_s}
        late.append(stillness.is_too_long(read, number * every_s))
    return late


def test_only_a_step_that_does_not_end_is_too_long() -> None:
    pulses = [
        *(None for _ in range(4)),  # its worker waits for a machine
        *((look, 1, False) for look in range(1, 5)),  # compiles the network
        (5, 2, True), (6, 2, True), (7, 3, True), (8, 3, True),  # takes steps
        *((look, 3, False) for look in range(9, 13)),  # validates
        (13, 4, True), (14, 4, True),
        None,  # the storage does not answer
        (15, 4, True), (16, 4, True),
    ]  # fmt: skip
    assert _late(*pulses, every_s=0.6 * LIMIT_S) == [False] * (len(pulses) - 1) + [True]


def test_a_process_that_stands_still_is_missed_whatever_it_was_at() -> None:
    pulses = [(1, 1, False), (2, 1, False), (2, 1, False), (2, 1, False)]
    assert _late(*pulses, every_s=0.6 * LIMIT_S) == [False, False, False, True]


def test_a_training_with_slow_steps_may_take_twice_as_long_for_the_next() -> None:
    pulses = [(look, 2, True) for look in range(8)]
    assert _late(*pulses, every_s=LIMIT_S, slowest_s=3 * LIMIT_S) == [False] * 7 + [True]


def test_a_training_says_when_it_takes_steps(tmp_path: Path) -> None:
    said: list[bool] = []
    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "out")  # saves after steps 2 and 4 of 6
    run_job(job, no_watch, pulse=said.append)
    step, aside = True, False
    assert said == [step, step, aside, step, step, aside, step, step, aside]


def test_the_pulse_of_an_earlier_start_ends_no_worker(tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path))
    watch = HangWatch(context, 0.0)
    pulse = {"attempt": "the one before", "looks": 9, "steps": 7, "may_hang": True, "slowest_s": 0.0}
    context.output.write_json("live/pulse.json", pulse)
    watch.look()
    watch.look()
    assert watch.end is None


def _wait_for_checkpoint(output: Artifact, task: Any) -> None:
    while not checkpoint_steps(output):
        assert not ray.wait([task], timeout=0.05)[0], "the training ended before"


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_the_only_worker_of_a_training_is_replaced_if_it_hangs(local_ray: None, tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path, hang_timeout_s=6))
    task = ray.remote(num_cpus=0, max_retries=0)(run_training).remote(context)
    _wait_for_checkpoint(context.output, task)
    (worker,) = processes_with("upsampler_1: train")
    worker.suspend()
    metrics = ray.get(task).metrics
    assert (metrics["num_steps"], metrics["num_failures"]) == (NUM_STEPS, 1)
    assert not worker.is_running()
    progress = read_progress(context.output)
    assert progress is not None
    assert (
        progress.notice
        == "its worker hung: no step has ended for 6 s (resources.hang_timeout_s); it goes on from its newest checkpoint"
    )

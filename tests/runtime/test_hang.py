"""A training on one worker that hangs is ended and goes on; one that compiles, validates or waits is left alone."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime import hang, train
from pipeline.runtime.calls import GivenUpError
from pipeline.runtime.context import StepContext
from pipeline.runtime.hang import HangWatch, Pulse, Stillness, begun_s, kill
from pipeline.runtime.restarts import End
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


class _Clock:
    """The seconds that the watch and the worker read, and what the watch wants to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.kills = 0.0, list[int]()
        monkeypatch.setattr(hang, "time", self)
        monkeypatch.setattr(hang, "_kill", self)

    def monotonic(self) -> float:
        return self.now

    def options(self, **_: Any) -> "_Clock":
        return self

    def remote(self, process: int, _begun: float) -> None:
        self.kills.append(process)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


class _Storage:
    """What a watch reads of one worker, and how long it takes."""

    def __init__(self, context: StepContext, clock: _Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pulse = {"attempt": context.attempt, "looks": 1, "steps": 2, "may_hang": True, "slowest_s": 0.0}
        self.pulse |= {"machine": "07" * 28, "process": 7, "begun": 0.0}
        self.takes_s, self._clock = 0.0, clock
        monkeypatch.setattr(Artifact, "find_json", lambda *_: self.read())

    def read(self) -> dict[str, Any]:
        self._clock.now += self.takes_s
        return self.pulse


def test_a_storage_that_does_not_answer_for_long_ends_no_worker(
    tmp_path: Path, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = upsampler_context(_recipe(tmp_path))
    storage, watch = _Storage(context, clock, monkeypatch), HangWatch(context, LIMIT_S)
    watch.look()
    storage.takes_s = 1.2 * LIMIT_S  # and then it shows what was written before
    watch.look()
    storage.takes_s = 0.05 * LIMIT_S
    clock.now += 0.8 * LIMIT_S
    watch.look()
    assert (clock.kills, watch.end) == ([], None)
    clock.now += 0.4 * LIMIT_S
    watch.look()
    assert clock.kills == [7]
    assert watch.end is not None


def test_a_worker_that_cannot_be_ended_is_stuck_until_it_takes_a_step(
    tmp_path: Path, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = upsampler_context(_recipe(tmp_path))
    storage, watch, answers = _Storage(context, clock, monkeypatch), HangWatch(context, LIMIT_S), list[bool]()
    for wait_s in (0.0, 1.2 * LIMIT_S, 80.0, 80.0):
        clock.now += wait_s
        watch.look()
        answers.append(watch.is_stuck)
    assert (answers, clock.kills) == ([False, False, False, True], [7, 7, 7])
    storage.pulse |= {"looks": 2, "steps": 3}
    watch.look()
    assert not watch.is_stuck


def test_a_worker_says_how_long_its_steps_take_and_when_one_may_hang(tmp_path: Path, clock: _Clock) -> None:
    pulse, states = Pulse(upsampler_context(_recipe(tmp_path)), LIMIT_S, 1), list[dict[str, Any]]()
    for clock.now, is_step in ((0.0, True), (10.0, True), (40.0, False), (90.0, True)):
        pulse(is_step)
        states.append(pulse.state())
    assert [state["steps"] for state in states] == [1, 2, 2, 3]
    assert [state["may_hang"] for state in states] == [False, True, False, True]
    assert [state["slowest_s"] for state in states] == [0.0, 10.0, 30.0, 30.0]


def test_a_process_is_known_by_its_number_and_its_age_also_after_the_clock_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        begun, machine = begun_s(process.pid), psutil.boot_time()
        kill(process.pid, begun + 60)  # one that had its number before
        assert process.poll() is None
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: machine + 3600.0)
        assert psutil.Process(process.pid).create_time() > time.time() + 3000
        kill(process.pid, begun)
        assert process.wait(60) < 0


class _StuckWatch(HangWatch):
    """Has ended its worker, whose process is there still."""

    def __init__(self, context: StepContext, timeout_s: float) -> None:
        super().__init__(context, timeout_s)
        self.end = End("failed", "its worker hung")

    @property
    def is_stuck(self) -> bool:
        return True


@pytest.mark.ray
@pytest.mark.parametrize(
    ("error", "counts", "cause"),
    [
        (ray.exceptions.WorkerCrashedError(), {"num_failures": 1}, "its worker hung; it goes on"),
        (GivenUpError(), {"num_failures": 1}, "its worker hung, and its process does not end; it goes on"),
        (
            ray.exceptions.OutOfMemoryError("words"),
            {"num_out_of_memory": 1, "micro_batch_size": 2},
            "out of memory with",
        ),
    ],
)
def test_a_worker_that_hung_costs_the_budget_of_what_it_hung_for(
    local_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    counts: dict[str, int],
    cause: str,
) -> None:
    errors = [error]

    def call_or_fail(*_: Any, is_given_up: Any, **__: Any) -> End:
        assert is_given_up()
        if errors:
            raise errors.pop()
        return End("finished")

    monkeypatch.setattr(train, "call", call_or_fail)
    monkeypatch.setattr(train, "HangWatch", _StuckWatch)
    context = upsampler_context(_recipe(tmp_path))
    assert run_training(context).metrics == counts
    progress = read_progress(context.output)
    assert progress is not None
    assert cause in progress.notice


def _wait_for_checkpoint(output: Artifact, task: Any) -> None:
    while not checkpoint_steps(output):
        assert not ray.wait([task], timeout=0.05)[0], "the training ended before"


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_the_only_worker_of_a_training_is_replaced_if_it_hangs(local_ray: None, tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path, hang_timeout_s=6, max_failures=10))
    task = ray.remote(num_cpus=0, max_retries=0)(run_training).remote(context)
    _wait_for_checkpoint(context.output, task)
    (worker,) = processes_with("upsampler_1: train")
    worker.suspend()
    metrics = ray.get(task).metrics
    assert metrics["num_steps"] == NUM_STEPS
    assert metrics["num_failures"] >= 1  # on a busy machine another step may take as long
    assert not worker.is_running()
    progress = read_progress(context.output)
    assert progress is not None
    assert (
        progress.notice
        == "its worker hung: no step has ended for 6 s (resources.hang_timeout_s); it goes on from its newest checkpoint"
    )

"""What ends a training early: SIGTERM, the driver, a machine that is drained. The same training goes on afterwards."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.runtime import stopping
from pipeline.runtime.stopping import NOTICE_S, ROOM, STOP, StopNotice, is_leaving, request_stop, tell_of_room
from pipeline.train.job import run_job
from pipeline.train.resume import checkpoint_steps
from pipeline.train.stop import StoppedError
from pipeline.workspace.store import Artifact
from tests.tiny.training import no_watch, tiny_inputs, tiny_job


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def calm(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the undisturbed training."""
    output = tmp_path_factory.mktemp("calm")
    run_job(tiny_job("upsampler_1", inputs, output), no_watch)
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 3, 5])  # regular checkpoints are of steps 2 and 4
def test_sigterm_ends_a_training_at_its_step_and_it_goes_on_there(
    step: int, inputs: dict[str, Artifact], calm: bytes, tmp_path: Path
) -> None:
    job, steps = tiny_job("upsampler_1", inputs, tmp_path), list[int]()

    def terminate(done: int, total: int, message: str) -> None:
        if done == step - 1:  # the step after this line is the last
            os.kill(os.getpid(), signal.SIGTERM)

    def note(done: int, total: int, message: str) -> None:
        steps.append(done)

    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(StoppedError, match=f"ended after step {step}, with a checkpoint: its process got SIGTERM"),
        StopNotice(job.output, reads_requests=True) as notice,
    ):
        run_job(job, terminate, notice)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint_steps(job.output)[-1] == step
    run_job(job, note)
    assert steps[0] == step
    assert (tmp_path / "model.safetensors").read_bytes() == calm


def test_a_training_ends_when_the_driver_asks(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_POLL_S", 0.01)
    job = tiny_job("upsampler_1", inputs, tmp_path)
    with StopNotice(job.output, reads_requests=True) as notice:

        def ask(done: int, total: int, message: str) -> None:
            if done == 3:
                request_stop(job.output)
                while not notice():
                    time.sleep(0.001)

        with pytest.raises(StoppedError, match="ended after step 4, with a checkpoint: the run was asked to end"):
            run_job(job, ask, notice)
    assert job.output.exists(STOP)


def test_a_training_that_can_have_more_workers_ends_with_a_checkpoint(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    job = tiny_job("upsampler_1", inputs, tmp_path)

    def tell(done: int, total: int, message: str) -> None:
        if done == 3:
            tell_of_room()

    with (
        pytest.raises(StoppedError, match=f"ended after step 4, with a checkpoint: {ROOM}$") as stopped,
        StopNotice(job.output, reads_requests=True) as notice,
    ):
        run_job(job, tell, notice)
    assert stopped.value.reason == ROOM
    with StopNotice(job.output, reads_requests=True) as notice:
        assert notice() == ""  # the next one has them


def test_a_fault_of_any_kind_leaves_the_later_notices_to_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "_POLL_S", 0.01)
    looks: list[Artifact] = []

    def look(output: Artifact) -> bool:
        looks.append(output)
        if len(looks) < 4:
            raise ValueError("an answer that nobody can read")
        return True

    monkeypatch.setattr(stopping, "is_stop_requested", look)
    with StopNotice(Artifact(str(tmp_path)), reads_requests=True) as notice:
        end = time.monotonic() + 10
        while not notice():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert notice() == "the run was asked to end"
    assert capsys.readouterr().err.count("ValueError: an answer that nobody can read") == 1


def test_a_drain_is_seen_while_the_storage_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the storage waits for minutes, which is all the notice that a machine has."""
    monkeypatch.setattr(stopping, "_POLL_S", 0.01)
    monkeypatch.setattr(stopping, "_LAST_LOOK_S", 0.01)
    looks, answers = threading.Event(), threading.Event()

    def look(output: Artifact) -> bool:
        looks.set()
        return answers.wait() and False

    monkeypatch.setattr(stopping, "is_stop_requested", look)
    monkeypatch.setattr(StopNotice, "_drain", lambda _: "its machine is taken away" if looks.is_set() else "")
    with StopNotice(Artifact(str(tmp_path)), reads_requests=True) as notice:
        end = time.monotonic() + 10
        while not notice() and time.monotonic() < end:
            time.sleep(0.01)
        reason = notice()
        is_blocked = not answers.is_set()
    answers.set()
    assert (reason, is_blocked) == ("its machine is taken away", True)


def test_a_second_sigterm_and_one_outside_of_a_training_are_handled_as_before(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with StopNotice(Artifact(str(tmp_path)), reads_requests=False) as notice:
            assert notice() == ""
            os.kill(os.getpid(), signal.SIGTERM)
            assert (notice(), received) == ("its process got SIGTERM", [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(received) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_training_leaves_a_drained_machine_shortly_before_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines_s = {"soon": 1000 + NOTICE_S, "later": 1001 + NOTICE_S, "unknown": 0}
    draining = {name: int(1000 * deadline) for name, deadline in deadlines_s.items()}
    monkeypatch.setattr(stopping.ray_state, "get_draining_nodes", lambda: draining)
    assert [is_leaving(name, 1000) for name in (*draining, "another")] == [True, False, True, False]

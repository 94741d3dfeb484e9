"""The curves of a training and its checkpoints: what another start goes on with."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import StepError
from pipeline.recipe.train_sections import TrainConfig
from pipeline.runtime.tracking.records import begun_at
from pipeline.train.assemble import TrainJob
from pipeline.train.job import MetricsLog, run_job
from pipeline.train.resume import CheckpointWriter, checkpoint_name, checkpoint_steps
from pipeline.train.state import create_state
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Artifact
from tests.tiny.storage import fail_calls
from tests.tiny.training import KilledError, changed_recipe, kill_at, no_watch, tiny_inputs, tiny_job


@pytest.fixture
def killed(tmp_path: Path) -> TrainJob:
    """A training that was killed after its checkpoint of step 4."""
    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output")
    with pytest.raises(KilledError):
        run_job(job, kill_at(5))
    return job


def test_a_training_whose_checkpoints_cannot_be_listed_does_not_begin_again(
    killed: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoint_steps(killed.output)
    with monkeypatch.context() as patch:
        fail_calls(patch, "scandir", times=99, ends=("live/checkpoints", "live/checkpoints/"))
        with pytest.raises(StepError, match=r"live/checkpoints/: cannot be read: Stale"):
            run_job(killed, no_watch)
    assert checkpoint_steps(killed.output) == checkpoints == [2, 4]


def test_curves_beyond_a_checkpoint_that_is_whole_after_all_are_kept(killed: TrainJob) -> None:
    newest = killed.output.path(checkpoint_name(4))
    whole = newest.read_bytes()
    before = killed.output.read_bytes(METRICS)
    for _ in range(2):  # starts that see it as damaged, as on a machine with bad memory
        newest.write_bytes(whole[:-1])
        with pytest.raises(KilledError):
            run_job(killed, kill_at(3))
        newest.write_bytes(whole)
    assert _steps_of_losses(killed)[-1] < 4
    run_job(killed, no_watch)
    assert _steps_of_losses(killed) == [1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in killed.output.read_bytes(METRICS).splitlines()]
    assert json.loads(before.splitlines()[-1]) in rows  # step 4 was not trained again


def test_a_training_says_that_it_begins_at_step_0_though_its_curves_went_further(killed: TrainJob) -> None:
    messages: list[str] = []

    def note(done: int, total: int, message: str) -> None:
        messages.append(f"{done} {message}")

    run_job(killed, note)
    assert messages[0] == "4 training"
    for step in checkpoint_steps(killed.output):
        killed.output.remove(checkpoint_name(step))
    messages.clear()
    run_job(killed, note)
    assert messages[0] == "0 training; begun at step 0: there is no checkpoint, though the curves reach step 6"
    assert messages[-1].endswith(messages[0].partition("training")[2])


def test_a_killed_training_that_is_validated_beside_loses_no_row_of_its_curves(tmp_path: Path) -> None:
    recipe = changed_recipe("upsampler_1", resources__validation="beside")
    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe)
    with pytest.raises(KilledError):
        run_job(job, kill_at(5))
    assert checkpoint_steps(job.output) == [2, 4]
    assert _steps_of_losses(job) == [1, 2, 3, 4]
    run_job(job, no_watch)
    assert _steps_of_losses(job) == [1, 2, 3, 4, 5, 6]


def test_the_curves_are_published_before_a_checkpoint_and_by_the_thread_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker waits for it; if it fails there is no checkpoint, whose rows no later start would write."""
    recipe = changed_recipe("upsampler_1", resources__validation="beside")
    job, write = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe), Artifact.write_bytes
    writers = list[str]()

    def write_noted(artifact: Artifact, name: str, data: bytes) -> None:
        if name == METRICS:
            writers.append(threading.current_thread().name)
            if writers.count("checkpoint") == 2:
                raise StepError("no room for curves")
        write(artifact, name, data)

    monkeypatch.setattr(Artifact, "write_bytes", write_noted)
    monkeypatch.setattr("pipeline.train.job._FLUSH_S", 600.0)
    with pytest.raises(StepError, match="no room for curves"):
        run_job(job, no_watch)
    # The first line is published at once, the others with the next checkpoint.
    assert writers == [threading.main_thread().name, "checkpoint", "checkpoint"]
    assert checkpoint_steps(job.output) == [2]
    monkeypatch.undo()
    run_job(job, no_watch)
    assert _steps_of_losses(job) == [1, 2, 3, 4, 5, 6]


def test_the_curves_are_published_before_the_state_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, keep = changed_recipe("upsampler_1", resources__keep_state=True), CheckpointWriter.keep_state
    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe)

    def keep_and_die(writer: CheckpointWriter, *arguments: Any) -> None:
        keep(writer, *arguments)
        raise KilledError

    monkeypatch.setattr("pipeline.train.job._FLUSH_S", 600.0)
    monkeypatch.setattr(CheckpointWriter, "keep_state", keep_and_die)
    with pytest.raises(KilledError):
        run_job(job, no_watch)
    monkeypatch.undo()
    run_job(job, no_watch)
    assert _steps_of_losses(job) == [1, 2, 3, 4, 5, 6]


def test_rows_are_added_while_others_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = MetricsLog(Artifact(str(tmp_path)), 0), Artifact.write_bytes
    state = create_state(torch.nn.Linear(1, 1), TrainConfig(), torch.device("cpu"))
    begun, goes_on = threading.Event(), threading.Event()

    def write_slowly(artifact: Artifact, name: str, data: bytes) -> None:
        begun.set()
        assert goes_on.wait(10)
        write(artifact, name, data)

    monkeypatch.setattr(Artifact, "write_bytes", write_slowly)
    writer = threading.Thread(target=log.flush, args=(0,))
    writer.start()
    assert begun.wait(10)
    for state.step in (1, 2):
        log.add_losses(state, 0.1, {"samples_per_s": 1.0, "stalled_share": 0.0, "peak_memory_gb": 0.0}, 1)
    goes_on.set()
    writer.join()
    log.flush(2)
    assert [row["step"] for row in MetricsLog(Artifact(str(tmp_path)), 2).rows] == [1, 2]


def test_curves_that_cannot_be_read_for_a_moment_are_continued(
    killed: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _steps_of_losses(killed)
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "open", ends=(METRICS,))
        assert [row["step"] for row in MetricsLog(killed.output, 4).rows if "loss" in row] == before == [1, 2, 3, 4]
        assert len(failed) == 1


def test_a_training_has_begun_anew_only_if_it_has_no_checkpoint(tmp_path: Path) -> None:
    recipe = changed_recipe("upsampler_1", resources__log_every_steps=4)  # and a checkpoint after every second step
    job, begun = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe), list[float]()

    def kill(done: int, total: int, message: str) -> None:
        if done == 4:
            begun.append(begun_at(job.output.path(METRICS).read_text().splitlines()))
            raise KilledError  # before the checkpoint of that step

    for without_checkpoints in (False, False, True):
        for step in checkpoint_steps(job.output) if without_checkpoints else []:
            job.output.remove(checkpoint_name(step))
        with pytest.raises(KilledError):
            run_job(job, kill)
    assert begun[0] == begun[1] < begun[2]
    run_job(job, no_watch)
    rows = [json.loads(line) for line in job.output.path(METRICS).read_text().splitlines()]
    assert [row["begun"] for row in rows if "begun" in row] == begun[2:]


def _steps_of_losses(job: TrainJob) -> list[int]:
    rows = map(json.loads, job.output.path(METRICS).read_text().splitlines())
    return [row["step"] for row in rows if "loss" in row]


def test_a_damaged_checkpoint_counts_also_after_another_start(killed: TrainJob) -> None:
    path = killed.output.path(checkpoint_name(4))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(KilledError):
        run_job(killed, kill_at(3))
    killed.output.remove(checkpoint_name(4))
    assert run_job(killed, no_watch)["num_damaged_checkpoints"] == 1

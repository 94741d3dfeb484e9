"""A training whose workers are there does not wait for machines, however long they load and count."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime import admission, memory, run, train
from pipeline.runtime.admission import Waits, fits_now
from pipeline.runtime.context import StepContext
from pipeline.train import fitting, job
from pipeline.workspace.progress import Progress, ProgressState, read_progress
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context


def _recipe(workspace: Path, **resources: Any) -> Recipe:
    upsampler = {"train": {"num_steps": 4, "batch_size": 4}, "resources": {"max_wait_s": 300, **resources}}
    return parse_recipe(tiny_tables(workspace, upsampler_1=upsampler))


def _wait(context: StepContext) -> None:
    """What the progress says until a worker is there."""
    Progress(context.output, waits=True).update(0, 1, "", "waiting for 1 x 1 CPU", force=True)


def _reading(context: StepContext) -> ProgressState:
    state = read_progress(context.output)
    assert state is not None
    return state


def _end_late(context: StepContext, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is cancelled at a look an hour after the first one, when the training waited."""
    now, cancelled = [0.0], list[str]()
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(admission, "cancel_step", lambda reference, _: cancelled.append(reference))
    monkeypatch.setattr(admission, "cluster_has_roles", lambda: False)
    monkeypatch.setattr(admission, "needed", lambda number, _: f"{number} x 1 CPU")
    waits = Waits([])
    waiting = ProgressState(0, 1, "", 0.0, 0.0, "waiting for 1 x 1 CPU", 0.0, 0.0)
    waits.end_late({"task": context}, {"upsampler_1": waiting})
    now[0] = 3600.0
    waits.end_late({"task": context}, {"upsampler_1": _reading(context)})
    return cancelled


def test_a_training_that_gets_no_machine_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = upsampler_context(_recipe(tmp_path))
    _wait(context)
    assert _end_late(context, monkeypatch) == ["task"]


def test_a_worker_that_loads_says_so_before_it_reads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, readings, trains = upsampler_context(_recipe(tmp_path)), list[ProgressState](), list[bool]()
    assemble, run_job = job.assemble, job.run_job

    def load(of: Any) -> Any:
        readings.append(_reading(context))
        trains.append(run._is_training(context))
        return assemble(of)

    def run_until_a_step(of: Any, watch: Any, *more: Any) -> Any:
        def look(done: int, total: int, message: str) -> None:
            watch(done, total, message)
            trains.append(run._is_training(context))

        return run_job(of, look, *more)

    monkeypatch.setattr(job, "assemble", load)
    monkeypatch.setattr(job, "run_job", run_until_a_step)
    _wait(context)
    assert train._run_worker(context).kind == "finished"
    assert [state.text for state in readings] == ["0/1 networks (0 %), 0.0/s, loading"]
    assert trains[:2] == [False, True]  # it could write no checkpoint yet; then it can, however soon that is
    assert (_reading(context).unit, _reading(context).done) == ("steps", 4)


def test_a_training_that_loads_is_not_late_and_its_resources_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = upsampler_context(_recipe(tmp_path))
    monkeypatch.setattr(admission.ray, "available_resources", lambda: {"CPU": 1.0})
    _wait(context)
    assert not fits_now(context, [context])  # it may soon take what seems free
    monkeypatch.setattr(job, "run_job", lambda *_: {})
    monkeypatch.setattr(train.Progress, "update", _first_alone(train.Progress.update))
    train._run_worker(context)
    assert _reading(context).message == "loading"
    assert fits_now(context, [context])
    assert _end_late(context, monkeypatch) == []


def _first_alone(update: Any) -> Any:
    """The first reading is written, as if the worker were still at what it says."""
    calls: list[object] = []

    def update_first(progress: Progress, *arguments: Any, **options: Any) -> None:
        calls.append(progress)
        if len(calls) == 1:
            update(progress, *arguments, **options)

    return update_first


def test_a_worker_that_counts_the_memory_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = upsampler_context(_recipe(tmp_path, micro_batch_size="auto", memory_gb_per_worker=4))
    readings, memory_of = list[ProgressState](), fitting.memory_of

    def count(*arguments: Any) -> Any:
        readings.append(_reading(context))
        return memory_of(*arguments)

    monkeypatch.setattr(fitting, "memory_of", count)
    _wait(context)
    memory._count("upsampler_1", context)
    assert [state.message for state in readings] == ["counting its memory"]
    assert _end_late(context, monkeypatch) == []

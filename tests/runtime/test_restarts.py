"""A training begins again after memory did not suffice, errors and preemptions; each has a budget of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime import memory, train
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext
from pipeline.runtime.restarts import End, Restarts
from pipeline.train import job
from pipeline.train.loop import StepFunction, make_step
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.progress import read_progress
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context


def _recipe(workspace: Path, **resources: float | str) -> Recipe:
    upsampler = {
        "train": {"num_steps": 6, "batch_size": 4, "learning_rate": 1e-3},
        "resources": {"save_every_steps": 2, **resources},
    }
    return parse_recipe(tiny_tables(workspace, upsampler_1=upsampler))


def _here(context: StepContext, _resources: object) -> End:
    """A start of the training in this process."""
    return train._run_worker(context)


def _with_little_memory(enough_for: int, at_step: int) -> Any:
    """``make_step`` on a device whose memory holds so many samples at a time; it notices at a step."""

    def make(objective: Any, section: Any, share: Any, **options: Any) -> StepFunction:
        step = make_step(objective, section, share, **options)

        def scarce(state: Any, batch: Any) -> None:
            if state.step >= at_step and (section.resources.micro_batch_size or share.batch_size) > enough_for:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")
            step(state, batch)

        return scarce

    return make


def test_a_start_with_more_workers_takes_nothing_of_a_budget(tmp_path: Path) -> None:
    restarts = Restarts(upsampler_context(_recipe(tmp_path, max_preemptions=0)))
    for _ in range(3):
        context = restarts.next(End("resized", "there was room"))
    assert context.notice == "there was room; it goes on from its newest checkpoint"
    assert not restarts.metrics
    with pytest.raises(StepError, match="was preempted more than 0 times"):
        restarts.next(End("preempted", "its machine was taken away"))


def test_a_training_goes_on_with_half_the_micro_batch_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit_one", _here)
    calm, scarce = (upsampler_context(_recipe(tmp_path / name)) for name in ("calm", "scarce"))
    expected = train.run_training(calm).metrics
    monkeypatch.setattr(job, "make_step", _with_little_memory(1, at_step=3))
    metrics = train.run_training(scarce).metrics
    progress = read_progress(scarce.output)
    assert progress is not None
    assert progress.notice == (
        "out of memory with 2 samples at a time (CUDA out of memory. Tried to allocate 2 GiB.); it goes on with 1 "
        "(resources.micro_batch_size = 1), the same training"
    )
    assert metrics["num_out_of_memory"] == 2
    assert (metrics["micro_batch_size"], "micro_batch_size" in expected) == (1, False)  # the recipe says: all 4
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    weights = [load_file(context.output.path("model.safetensors")) for context in (calm, scarce)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("enough_for", "resources", "words"),
    [
        (0, {}, "out of memory with 1 samples at a time .*less is not possible; set resources.checkpointing"),
        (1, {"max_out_of_memory": 1}, "upsampler_1: training ran out of memory more than 1 times: .*with 2 samples"),
    ],
)
def test_a_training_that_never_fits_ends(
    enough_for: int, resources: dict[str, int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit_one", _here)
    monkeypatch.setattr(job, "make_step", _with_little_memory(enough_for, at_step=0))
    with pytest.raises(StepError, match=words):
        train.run_training(upsampler_context(_recipe(tmp_path, **resources)))


def test_the_part_of_a_batch_is_counted_once_where_the_recipe_leaves_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = upsampler_context(_recipe(tmp_path / "auto", micro_batch_size="auto", memory_gb_per_worker=4))
    with connect():
        counted = memory.with_counted_part(context)
    assert counted.recipe.upsampler_1.resources.micro_batch_size == 4
    assert counted.notice.startswith("micro_batch_size = 4: a worker needs 0.00")
    assert counted.notice.endswith("GB of 2.5 GB")
    monkeypatch.setattr(train, "_fit_one", _here)
    metrics = train.run_training(context).metrics  # without Ray: it is not counted again
    assert metrics["micro_batch_size"] == 4
    alone = upsampler_context(_recipe(tmp_path / "alone"))
    train.run_training(alone)
    weights = [load_file(each.output.path("model.safetensors")) for each in (context, alone)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=0)


def test_a_training_of_which_no_part_fits_is_told_what_would(tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path, micro_batch_size="auto", memory_gb_per_worker=1.5001))
    with pytest.raises(
        StepError, match=r"upsampler_1: not even 1 samples at a time fit: a worker needs .* of 0.0001 GB"
    ):
        memory._count("upsampler_1", context)


def test_preemptions_and_errors_have_budgets_of_their_own(tmp_path: Path) -> None:
    restarts = Restarts(upsampler_context(_recipe(tmp_path, max_failures=1, max_preemptions=3)))
    lost, drained = End("failed", "a worker failed"), End("preempted", "its machine is taken away")
    for end in (drained, lost, drained):
        assert restarts.next(end).notice == f"{end.cause}; it goes on from its newest checkpoint"
    assert restarts.metrics == {"num_preemptions": 2, "num_failures": 1}
    with pytest.raises(
        StepError, match="training failed more than 1 times without a new checkpoint in between: a worker failed; its"
    ):
        restarts.next(lost)
    restarts.next(drained)
    with pytest.raises(StepError, match="training was preempted more than 3 times: its machine is taken away"):
        restarts.next(drained)
    again = Restarts(upsampler_context(_recipe(tmp_path, max_failures=1, max_preemptions=3)))  # of the next run
    assert again.metrics == {"num_preemptions": 4, "num_failures": 2}  # the last of each has ended a run
    again.next(lost)  # with budgets of its own
    assert again.metrics == {"num_preemptions": 4, "num_failures": 3}
    with pytest.raises(ZeroDivisionError):  # a person sees all of an error
        restarts.next(End("failed", "division by zero", error=ZeroDivisionError()))


def test_half_of_a_part_that_was_counted_too_large_is_kept_for_later_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = upsampler_context(_recipe(tmp_path, micro_batch_size="auto", memory_gb_per_worker=4))
    with connect():
        assert memory.with_counted_part(context).recipe.upsampler_1.resources.micro_batch_size == 4
    monkeypatch.setattr(train, "_fit_one", _here)
    monkeypatch.setattr(job, "make_step", _with_little_memory(2, at_step=3))
    metrics = train.run_training(context).metrics
    assert (metrics["micro_batch_size"], metrics["num_out_of_memory"]) == (2, 1)
    later = memory.with_counted_part(context)
    assert later.recipe.upsampler_1.resources.micro_batch_size == 2
    assert later.notice == "micro_batch_size = 2: memory did not suffice for 4 at a time"
    with connect():  # other resources are counted anew
        other = upsampler_context(_recipe(tmp_path, micro_batch_size="auto", memory_gb_per_worker=5))
        assert memory.with_counted_part(other).recipe.upsampler_1.resources.micro_batch_size == 4


def test_errors_of_a_training_that_goes_on_between_them_are_counted_anew(tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path, max_failures=1))
    restarts, lost = Restarts(context), End("failed", "a worker failed")
    for step in (0, 2, 4):
        if step:
            context.output.write_bytes(checkpoint_name(step), b"")
        restarts.next(lost)
    context.output.remove(checkpoint_name(4))  # a damaged one goes, and that is no progress
    with pytest.raises(StepError, match="failed more than 1 times without a new checkpoint in between"):
        restarts.next(lost)
    assert restarts.metrics == {"num_failures": 4}

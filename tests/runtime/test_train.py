"""Training steps: through a real Ray, a task for one worker and Ray Train for two; and a CLIP that is taken as it is."""

import contextlib
import signal
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from pipeline.clip.files import load_clip
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext
from pipeline.runtime.train import run_clip, run_training
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact
from tests.tiny.networks import make_clip
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context


def _recipe(workspace: Path, *, learning_rate: float = 1e-3, **resources: int | str) -> Recipe:
    upsampler = {
        "train": {"num_steps": 4, "batch_size": 4, "learning_rate": learning_rate},
        "resources": {"cpus_per_worker": 0.5, "save_every_steps": 2, **resources},
    }
    return parse_recipe(tiny_tables(workspace, upsampler_1=upsampler))


def _step(context: StepContext) -> object:
    """Run the step as the executor does: inside a task that holds no CPU."""
    task = ray.remote(num_cpus=0, max_retries=0)(run_training)
    try:
        return ray.get(task.remote(context))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@contextlib.contextmanager
def _cpus_taken(*, seconds: float) -> Generator[None]:
    """Every CPU is held by somebody else for a while."""

    @ray.remote(num_cpus=int(ray.cluster_resources()["CPU"]))
    def hold(seconds: float) -> None:
        time.sleep(seconds)

    first, then = hold.remote(0), hold.remote(seconds)
    ray.wait([first])
    yield
    ray.get(then)


@pytest.mark.ray
def test_fit_trains_on_one_worker_and_on_two(tmp_path: Path) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    with connect():
        weights: dict[int, dict[str, torch.Tensor]] = {}
        for num_workers in (1, 2):
            # In line, so that all of its time is that of its workers.
            recipe = _recipe(tmp_path / str(num_workers), num_workers=num_workers, validation="in_line")
            context = upsampler_context(recipe)
            with _cpus_taken(seconds=4):
                begun = time.monotonic()
                result = _step(context)
            waited_and_worked_s = time.monotonic() - begun
            progress = read_progress(context.output)
            assert progress is not None
            assert (progress.done, progress.unit) == (4, "steps")
            assert 0 < progress.wall_s < waited_and_worked_s - 3
            assert progress.node_s == pytest.approx(num_workers * progress.wall_s, abs=0.01)
            assert progress.num_workers == num_workers
            assert result.metrics["num_steps"] == 4
            weights[num_workers] = load_file(context.output.path("model.safetensors"))
            # What is committed on another machine is not read there.
            assert result.files["model.safetensors"] == Artifact(context.output.uri).describe("model.safetensors")
        # This machine has room for both workers, so they may not be spread.
        assert {group["strategy"] for group in placement_group_table().values()} == {"STRICT_PACK"}
        # The same samples with the same random numbers, added up in another order.
        assert _gap(weights[1], weights[2]) < 1e-4
    assert signal.getsignal(signal.SIGINT) is on_interrupt


@pytest.mark.ray
@pytest.mark.slow
def test_errors_of_a_training_name_the_step_and_the_file(tmp_path: Path) -> None:
    with connect():
        context = upsampler_context(_recipe(tmp_path / "nan", num_workers=1, learning_rate=1e38))
        with pytest.raises(StepError, match="upsampler_1: step 2: loss or gradient is not finite"):
            _step(context)
        context = upsampler_context(_recipe(tmp_path / "torn", num_workers=2))
        Artifact(context.inputs["download"].uri).write_bytes("00001.tar", b"no tar")
        with pytest.raises(DataError, match=r"upsampler_1: .*00001\.tar: truncated"):
            _step(context)


@pytest.mark.ray
@pytest.mark.slow
def test_fit_divides_a_training_between_two_workers(tmp_path: Path) -> None:
    with connect():
        whole = upsampler_context(_recipe(tmp_path / "whole", num_workers=1))
        divided = upsampler_context(_recipe(tmp_path / "divided", num_workers=2, num_shards=0, keep_state=True))
        for context in (whole, divided):
            assert _step(context).metrics["num_steps"] == 4
    assert "state/00000004.2-of-2.safetensors" in divided.output.names()
    one, two = (load_file(context.output.path("model.safetensors")) for context in (whole, divided))
    assert _gap(one, two) < 1e-4


def _gap(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest difference of two networks' weights."""
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def _pretrained(folder: Path, name: str, tag: str = "none") -> StepContext:
    clip = {"source": "pretrained", "name": name, "tag": tag}
    recipe = parse_recipe({"workspace": str(folder / "workspace"), "clip": clip})
    step = next(step for step in make_plan(recipe) if step.name == "clip")
    return StepContext(recipe, step, recipe.workspace)


def test_clip_step_takes_over_a_local_folder(tmp_path: Path) -> None:
    context = _pretrained(tmp_path, str(make_clip(tmp_path / "mine", seed=5)))
    result = run_clip(context)
    theirs = load_clip(tmp_path / "mine").model.state_dict()
    ours = load_clip(context.output.path("open_clip_config.json").parent).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result.metrics["num_parameters"] == sum(
        weight.numel() for weight in load_clip(tmp_path / "mine").model.parameters()
    )


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [("ViT-Nowhere", "laion", "ViT-Nowhere"), ("ViT-B-32", "no_such_tag", "no_such_tag")],
)
def test_clip_step_names_the_clip_that_it_does_not_find(tmp_path: Path, name: str, tag: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"clip\.name, clip\.tag: CLIP .*{words}"):
        run_clip(_pretrained(tmp_path, name, tag))

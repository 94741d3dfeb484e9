"""Trainings through a real Ray: a task for one worker, Ray Train for two."""

import contextlib
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from pipeline.errors import DataError, StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.run import connect
from pipeline.runtime.train import run_training
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact
from tests.train.data import write_download


def _recipe(workspace: Path, *, num_workers: int, learning_rate: float = 1e-3) -> Recipe:
    unet = {"channels": 8, "channel_mults": [1, 2], "num_res_blocks": 1, "attention_resolutions": [], "norm_groups": 4}
    return parse_recipe(
        {
            "workspace": str(workspace),
            "download": {"image_px": 32},
            "decoder": {"model": {"image_px": 8, "unet": {"attention_resolutions": [4], "channel_mults": [1, 2]}}},
            "upsampler_1": {
                "model": {"low_res_px": 8, "image_px": 16, "crop_px": 8, "unet": unet},
                "train": {"num_steps": 4, "batch_size": 4, "learning_rate": learning_rate},
                "resources": {"num_workers": num_workers, "cpus_per_worker": 0.5, "save_every_steps": 2},
            },
        }
    )


def _context(recipe: Recipe) -> StepContext:
    step = next(step for step in make_plan(recipe) if step.name == "upsampler_1")
    context = StepContext(recipe, step, recipe.workspace)
    write_download(Path(context.inputs["download"].uri))
    return context


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
    with connect():
        weights = {}
        for num_workers in (1, 2):
            context = _context(_recipe(tmp_path / str(num_workers), num_workers=num_workers))
            with _cpus_taken(seconds=4):
                begun = time.monotonic()
                result = _step(context)
            waited_and_worked_s = time.monotonic() - begun
            progress = read_progress(context.output)
            assert progress is not None
            assert (progress.done, progress.unit) == (4, "steps")
            assert 0 < progress.wall_s < waited_and_worked_s - 3
            assert result.num_workers == num_workers
            assert result.metrics["num_steps"] == 4
            weights[num_workers] = load_file(context.output.path("model.safetensors"))
        # The same samples in the same order, with draws of their own: close, and not the same.
        gaps = [float((weights[1][name] - weights[2][name]).abs().max()) for name in weights[1]]
        assert 0 < max(gaps) < 0.02

        context = _context(_recipe(tmp_path / "nan", num_workers=1, learning_rate=1e38))
        with pytest.raises(StepError, match="upsampler_1: step 2: loss or gradient is not finite"):
            _step(context)
        context = _context(_recipe(tmp_path / "torn", num_workers=2))
        Artifact(context.inputs["download"].uri).write_bytes("00001.tar", b"no tar")
        with pytest.raises(DataError, match=r"upsampler_1: shard 00001: .*not a readable tar"):
            _step(context)
        assert torch.get_num_threads() >= 1

"""One tiny training of each network, without Ray: its recipe, its inputs, its job."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.diffusion.config import DiffusionConfig
from pipeline.clip.model import create_clip
from pipeline.networks.clip import save_clip_artifact
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.train.assemble import TrainJob
from pipeline.train.job import run_job
from pipeline.workspace.store import Artifact
from tests.tiny.networks import CLIP
from tests.tiny.recipe import TRAINED, UNET, merge, tiny_tables, training
from tests.tiny.shards import write_download, write_embed


def training_recipe(num_steps: int = 6) -> Recipe:
    """Every network that can be trained, for ``num_steps`` steps."""
    tables = tiny_tables(
        Path("workspace"),
        prior={"model": {"sampler": {"method": "analytic"}}},
        prior_2={
            "model": {
                "kind": "autoregressive", "width": 16, "depth": 1, "num_heads": 2, "num_buckets": 16,
                "num_dot_buckets": 4, "max_pca_error": 0.2,
            }
        },
        noisy_clip={"model": {"image_px": 8, "tower": UNET}},
    )  # fmt: skip
    return parse_recipe(
        merge(tables, dict.fromkeys((*TRAINED, "prior_2", "noisy_clip"), training(num_steps, batch_size=4)))
    )


def changed_recipe(name: str, **changes: Any) -> Recipe:
    """The recipe with fields of one step's section changed, ``section__field`` inside its tables."""
    section: Any = getattr(training_recipe(), name)
    for path, value in changes.items():
        table, _, field = path.rpartition("__")
        inner = replace(getattr(section, table), **{field: value}) if table else value
        section = replace(section, **{table or field: inner})
    return replace(training_recipe(), **{name: section})


def bound_recipe() -> Recipe:
    """A decoder that is trained on the bound; of two timesteps, so that ten losses of each are soon known."""
    recipe = training_recipe()
    model = recipe.decoder.model
    diffusion = DiffusionConfig(
        num_timesteps=2, prediction="x0", variance="learned_range", loss="vlb", timestep_draws="loss_aware"
    )
    section = replace(
        recipe.decoder,
        model=replace(model, diffusion=diffusion, sampler=replace(model.sampler, num_steps=2)),
        train=replace(recipe.decoder.train, batch_size=16),
    )
    return replace(recipe, decoder=section, noisy_clip=None)  # the tower would have to see the same two timesteps


def tiny_inputs(folder: Path) -> dict[str, Artifact]:
    download = write_download(folder / "download")
    clip = Artifact(str(folder / "clip"))
    torch.manual_seed(0)
    save_clip_artifact(clip, create_clip(CLIP))
    return {"download": download, "embed": write_embed(folder / "embed", download), "clip": clip}


def tiny_job(name: str, inputs: dict[str, Artifact], output: Path, recipe: Recipe | None = None) -> TrainJob:
    """A job of one step; ``"decoder bound"`` is the decoder of ``bound_recipe``."""
    step, _, bound = name.partition(" ")
    recipe = recipe or (bound_recipe() if bound else training_recipe())
    return TrainJob(step, recipe, inputs, Artifact(str(output)), "key", torch.device("cpu"))


def no_watch(done: int, total: int, message: str) -> None:
    """Nobody watches."""


class KilledError(Exception):
    """In place of a kill."""


def kill_at(step: int) -> Callable[[int, int, str], None]:
    """Somebody watches, and kills the training when a step is done."""

    def watch(done: int, total: int, message: str) -> None:
        if done == step:
            raise KilledError

    return watch


def upsampler_context(recipe: Recipe) -> StepContext:
    """The training of a recipe's first upsampler, with its pictures."""
    step = next(step for step in make_plan(recipe) if step.name == "upsampler_1")
    context = StepContext(recipe, step, recipe.workspace)
    write_download(Path(context.inputs["download"].uri))
    return context


def train_here(context: StepContext) -> dict[str, Any]:
    """Train the network of a step as one worker of one CPU does, in this process and without Ray; its metrics."""
    inputs, output, key = context.inputs, context.output, context.step.key
    return run_job(TrainJob(context.step.name, context.recipe, inputs, output, key, torch.device("cpu")), no_watch)

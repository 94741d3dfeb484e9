"""Times the evaluation: a few denoising steps of every stage, and the loading of the cascade."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from models.cascade import Cascade
from models.stage import PIXELS, Z_IMAGE, Batch, Stage
from pipeline.data.drawn import NUM_EVALUATION_SCENES
from pipeline.evaluate.parts import NUM_RECONSTRUCTIONS
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.networks.cores import use_cores
from pipeline.pictures.png import to_png
from pipeline.recipe.recipe import Recipe
from pipeline.timing.clock import Clock
from pipeline.timing.units import EvaluationUnits
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip.frozen import FrozenClip

_CAPTION = "a small red circle to the left of a large blue square"
_STEPS_S = 0.5
_MOST_ON_CPU = 16
"""Pictures that are sampled together on a processor: there the time of each hardly depends on their number."""


def evaluation_units(recipe: Recipe, artifacts: Mapping[str, Artifact]) -> EvaluationUnits:
    """Times of the evaluation's pieces.

    Args:
        recipe: The recipe.
        artifacts: Of every trained network, by step name.
    """
    config = recipe.evaluate
    num_threads = use_cores(config.resources.cpus_per_worker)
    device = torch.device(config.resources.accelerator)
    clock = Clock(device, num_threads)
    start = clock.now()
    cascade = load_cascade(artifacts, device, network_configs(recipe))
    loaded = clock.now()
    size = min(config.batch_size, cascade.micro_batch)
    if device.type == "cpu":
        size = min(size, _MOST_ON_CPU)
    by_stage = {stage.name: _stage_s(cascade, stage, size, clock) / size for stage in cascade.stages}
    embed_s = _embed_s(cascade, size, clock) / size
    of_pictures = [stage.name for stage in cascade.after(Z_IMAGE)]
    before = [name for name in by_stage if name not in of_pictures]
    second_s = 0.0
    if recipe.prior_2 is not None:
        configs = {"prior": network_configs(recipe)["prior_2"]}
        second = load_cascade({"prior": artifacts["prior_2"]}, device, configs, cascade.clip)
        second_s = sum(_stage_s(second, stage, size, clock) for stage in second.stages) / size
    enlarging = [stage.name for stage in cascade.stages if stage.low_res_px is not None]
    return EvaluationUnits(
        start_s=loaded - start,
        sample_s=sum(by_stage.values()) + embed_s,
        row_s=sum(by_stage[name] for name in before) + second_s,
        reconstruction_s=sum(by_stage[name] for name in [*of_pictures, *enlarging]) + embed_s,
        num_reconstructions=NUM_RECONSTRUCTIONS,
        most_prompts=most_prompts(recipe),
    )


def most_prompts(recipe: Recipe) -> float:
    """Prompts of the recipe's file, or of the drawn source; without bound where they are captions of rows."""
    if path := recipe.evaluate.prompts_path:
        return sum(bool(line.strip()) for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines())
    return NUM_EVALUATION_SCENES if recipe.pairs.source == "drawn" else math.inf


@torch.no_grad()
def _stage_s(cascade: Cascade, stage: Stage, size: int, clock: Clock) -> float:
    """Seconds of a stage for a batch, from a few of its steps."""
    text = cascade.clip.encode_text([_CAPTION] * size)
    device, values = text.pooled.device, dict[str, torch.Tensor]()
    values[Z_IMAGE] = F.normalize(torch.randn(size, cascade.clip.dims.embed_dim, device=device), dim=-1)
    if stage.low_res_px is not None:
        values[PIXELS] = torch.zeros(size, 3, stage.low_res_px, stage.low_res_px, device=device)
    start = clock.now()
    chain = stage.enter(Batch(text, tuple(range(size)), values))
    joined = stage.join([chain])
    entered = clock.now()
    num_steps = len(chain.timesteps)
    joined.advance()  # not counted: it reserves memory and chooses kernels
    first = clock.now()
    counted = 0
    while not chain.finished and (counted == 0 or clock.now() - first < _STEPS_S):
        joined.advance()
        counted += 1
    step_s = (clock.now() - first) / counted if counted else first - entered
    return entered - start + num_steps * step_s


def _embed_s(cascade: Cascade, size: int, clock: Clock) -> float:
    """Seconds in which CLIP embeds a batch of captions and of finished pictures, and they are written as files."""
    side_px = list(cascade.sides_px.values())[-1]
    pictures = torch.randint(0, 256, (size, side_px, side_px, 3), dtype=torch.uint8)
    clip = cast("FrozenClip", cascade.clip)

    def embed() -> None:
        clip.encode_text([_CAPTION] * size)
        clip.encode_image(pictures)
        for picture in pictures.numpy():
            to_png(picture)

    embed()
    return clock.time(embed)

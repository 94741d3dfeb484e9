"""One tiny training of each network, without Ray: its recipe, its inputs, its job."""

from dataclasses import replace
from pathlib import Path

import torch

from models.clip_config import ClipConfig
from models.diffusion.config import DiffusionConfig
from pipeline.clip import create_clip
from pipeline.networks.clip import save_clip_artifact
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.train.assemble import TrainJob
from pipeline.workspace.store import Artifact
from tests.train.data import EMBED_DIM, write_download, write_embed

_UNET = {
    "channels": 8,
    "channel_mults": [1, 2],
    "num_res_blocks": 1,
    "head_channels": 8,
    "norm_groups": 4,
    "dropout": 0.1,
}
_SAMPLER = {"method": "ddim", "num_steps": 2, "respacing": ""}
_CLIP = {"embed_dim": EMBED_DIM, "image_px": 32, "vision_width": 8, "text_width": 16, "text_heads": 2, "text_layers": 1}


def tiny_recipe(num_steps: int = 6) -> Recipe:
    trained = {
        "train": {"num_steps": num_steps, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.9},
        "resources": {"save_every_steps": 2, "log_every_steps": 1},
    }
    upsampler = {"crop_px": 8, "unet": _UNET | {"attention_resolutions": []}, "sampler": _SAMPLER}
    return parse_recipe(
        {
            "download": {"image_px": 32},
            "clip": {"model": _CLIP | {"context_length": 32}} | trained,
            "prior": {
                "model": {
                    "width": 16, "depth": 1, "num_heads": 2,
                    "sampler": {"method": "analytic", "num_steps": 3, "clip_x0": False},
                }
            } | trained,
            "prior_2": {
                "model": {
                    "kind": "autoregressive", "width": 16, "depth": 1, "num_heads": 2, "num_buckets": 16,
                    "num_dot_buckets": 4, "max_pca_error": 0.2,
                }
            } | trained,
            "decoder": {
                "model": {"image_px": 8, "unet": _UNET | {"attention_resolutions": [4]}, "sampler": _SAMPLER}
            } | trained,
            "noisy_clip": {"model": {"image_px": 8, "tower": _UNET | {"attention_resolutions": []}}} | trained,
            "upsampler_1": {"model": upsampler | {"low_res_px": 8, "image_px": 16}} | trained,
            "upsampler_2": {"model": upsampler | {"low_res_px": 16, "image_px": 32}} | trained,
        }
    )  # fmt: skip


def bound_recipe() -> Recipe:
    """A decoder that is trained on the bound; of two timesteps, so that ten losses of each are soon known."""
    recipe = tiny_recipe()
    diffusion = DiffusionConfig(
        num_timesteps=2, prediction="x0", variance="learned_range", loss="vlb", timestep_draws="loss_aware"
    )
    section = replace(
        recipe.decoder,
        model=replace(recipe.decoder.model, diffusion=diffusion),
        train=replace(recipe.decoder.train, batch_size=16),
    )
    return replace(recipe, decoder=section, noisy_clip=None)  # the tower would have to see the same two timesteps


def tiny_inputs(folder: Path) -> dict[str, Artifact]:
    download = write_download(folder / "download")
    clip = Artifact(str(folder / "clip"))
    torch.manual_seed(0)
    save_clip_artifact(clip, create_clip(ClipConfig(**_CLIP)))
    return {"download": download, "embed": write_embed(folder / "embed", download), "clip": clip}


def tiny_job(name: str, inputs: dict[str, Artifact], output: Path, recipe: Recipe | None = None) -> TrainJob:
    """A job of one step; ``"decoder bound"`` is the decoder of ``bound_recipe``."""
    step, _, bound = name.partition(" ")
    recipe = recipe or (bound_recipe() if bound else tiny_recipe())
    return TrainJob(step, recipe, inputs, Artifact(str(output)), "key", torch.device("cpu"))


def no_watch(done: int, total: int, message: str) -> None:
    """Nobody watches."""

"""Tiny CLIPs and cascades with random weights; the networks are such as diffusers' layout can hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.cascade import Cascade
from models.clip_config import ClipConfig
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.clip.files import save_clip
from pipeline.clip.frozen import FrozenClip, FrozenText
from pipeline.clip.model import create_clip
from pipeline.networks.clip import save_clip_artifact
from pipeline.networks.diffusers import export_diffusers
from pipeline.networks.files import save_network
from pipeline.workspace.store import Artifact
from tests.models import tiny_models
from tests.models.tiny_models import randomise
from tests.tiny import recipe

CLIP = ClipConfig(**recipe.CLIP)
UNET = replace(tiny_models.UNET, channel_mults=(1, 2, 3), num_res_blocks=2, attention_resolutions=(8, 4), dropout=0.1)
PRIOR = PriorConfig(
    width=32,
    depth=2,
    num_heads=4,
    num_candidates=1,
    sampler=SamplerConfig(num_steps=6, guidance_scale=3.0, clip_x0=True, clip_range=5.0),
)
DECODER = DecoderConfig(
    image_px=16,
    unet=UNET,
    context_width=20,
    diffusion=DiffusionConfig(variance="learned_range"),
    sampler=SamplerConfig(num_steps=7, guidance_scale=2.0),
)
UPSAMPLER = UpsamplerConfig(
    image_px=32,
    low_res_px=16,
    crop_px=16,
    rounded=False,
    unet=replace(UNET, attention_resolutions=(), time_norm="add"),
    sampler=SamplerConfig(num_steps=5),
)

STD = 0.03
"""Of the weights: small, so that rounding errors do not grow."""


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP with random weights, saved."""
    torch.manual_seed(seed)
    save_clip(create_clip(CLIP), folder)
    return folder


def make_cascade(upsampler: UpsamplerConfig = UPSAMPLER, **clip_changes: Any) -> Cascade:
    """A cascade of one upsampler; the same arguments give the same weights."""
    torch.manual_seed(0)
    clip = FrozenClip(create_clip(replace(CLIP, text_layers=2, context_length=24, **clip_changes)))
    prior, decoder = Prior(PRIOR, clip.dims), Decoder(DECODER, clip.dims)
    for network in (prior, decoder):
        randomise(network, std=STD)
        network.null_text.set(clip.encode_text([""]))
    last = Upsampler(upsampler)
    randomise(last, std=STD)
    return Cascade(clip, [PriorStage.of(prior), DecoderStage.of(decoder), UpsamplerStage.of(last)])


def save_cascade(cascade: Cascade, folder: Path) -> dict[str, Artifact]:
    """Write our own layout, one folder a network."""
    assert isinstance(cascade.clip, FrozenClip)
    networks: dict[str, Any] = {stage.name: stage.network for stage in cascade.stages}
    artifacts = {name: Artifact(str(folder / name)) for name in ("clip", *networks)}
    save_clip_artifact(artifacts["clip"], cascade.clip.clip)
    for name, network in networks.items():
        save_network(artifacts[name], network.config, getattr(network, "dims", None), network.state_dict())
    return artifacts


def export_cascade(cascade: Cascade, folder: Path) -> list[str]:
    """Write diffusers' layout; returns the notes on what differs."""
    assert isinstance(cascade.clip, FrozenText)
    return export_diffusers(cascade, cascade.clip, folder)

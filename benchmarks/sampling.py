"""Sampling an exported cascade here against diffusers' UnCLIPPipeline: same weights, steps, guidance and prompts.

    python -m benchmarks.sampling [--rounds 5] [--threads 1]    at the demo's size: four pictures, 10 steps; floor 1.2x
    python -m benchmarks.sampling --karlo [...]                 at Karlo's: one picture; floor 1.0x

Both sample the whole cascade, from text to the upsampler's size. The pipeline is the installed diffusers', loaded from
the folder that `unclip export` would write. At Karlo's size (configs/karlo.toml) it is made from the same components in
memory, so that the two share the weights: 17 GB. There the three networks take 7, 14 and 2 steps, so that their shares
of the time are those of Karlo's own 25, 50 and 7 steps.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import module_of, randomise
from benchmarks.side_by_side import Comparison, compare, publish
from models.cascade import Cascade
from models.clip_config import ClipConfig
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.layers.config import UNetConfig
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.clip.frozen import FrozenClip
from pipeline.clip.model import create_clip
from pipeline.networks.arithmetic import Arithmetic
from pipeline.networks.diffusers import export_components, export_diffusers, write_tokenizer
from pipeline.networks.table import kind_of
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact

PROMPTS = ["a large red star on a white background", "a small blue circle above a large yellow square"]
CLIP = ClipConfig(embed_dim=64, image_px=32, vision_width=20, text_width=64, text_heads=2, context_length=24)
SMALL = UNetConfig(
    channels=64,
    channel_mults=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(16, 8),
    head_channels=32,
    norm_groups=8,
    dropout=0.0,
)
PLAIN = UNetConfig(
    channels=32, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=8, dropout=0.0
)


@dataclass(frozen=True)
class Size:
    """One size of cascade."""

    clip: ClipConfig
    prior: PriorConfig
    decoder: DecoderConfig
    upsampler: UpsamplerConfig
    guidance_scale: float
    num_images: int
    floor: float


DEMO = Size(
    CLIP,
    PriorConfig(width=128, depth=4, num_heads=4, num_candidates=1, sampler=SamplerConfig(num_steps=10)),
    DecoderConfig(
        image_px=16,
        context_width=64,
        unet=SMALL,
        diffusion=DiffusionConfig(variance="learned_range"),
        sampler=SamplerConfig(num_steps=10),
    ),
    UpsamplerConfig(
        image_px=64, low_res_px=16, crop_px=32, unet=PLAIN, rounded=False, sampler=SamplerConfig(num_steps=10)
    ),
    guidance_scale=2.5,
    num_images=4,
    floor=1.2,
)
"""The demo's sizes, without what the diffusers layout cannot express."""


def karlo() -> Size:
    """Karlo's sizes; CLIP has ViT-L/14's text tower and a small image tower, because no picture is embedded here."""
    recipe = load_recipe(Path(__file__).parent.parent / "configs" / "karlo.toml")
    prior, decoder, upsampler = recipe.prior.model, recipe.decoder.model, recipe.upsampler_1.model
    assert isinstance(prior, PriorConfig)
    return Size(
        ClipConfig(
            embed_dim=768, image_px=32, vision_width=8, text_width=768, text_heads=12, text_layers=12, context_length=77
        ),
        replace(prior, num_candidates=1, sampler=SamplerConfig(num_steps=7)),
        replace(decoder, sampler=SamplerConfig(num_steps=14)),
        replace(upsampler, rounded=False, sampler=SamplerConfig(num_steps=2)),
        guidance_scale=4.0,
        num_images=1,
        floor=1.0,
    )


def make_cascade(
    size: Size,
    device: str = "cpu",
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008  (it is frozen)
) -> Cascade:
    """Random weights; every sampler except the upsampler's is guided with the size's scale."""
    torch.manual_seed(0)
    clip = FrozenClip(create_clip(size.clip)).to(device)

    def guided(sampler: SamplerConfig) -> SamplerConfig:
        return replace(sampler, guidance_scale=size.guidance_scale)

    prior = Prior(replace(size.prior, sampler=guided(size.prior.sampler)), clip.dims)
    decoder = Decoder(replace(size.decoder, sampler=guided(size.decoder.sampler)), clip.dims)
    upsampler = Upsampler(size.upsampler)
    for network in (prior, decoder, upsampler):
        randomise(network)
        network.to(device)
        arithmetic.prepare(network, kind_of(network.config), device)
    for network in (prior, decoder):
        network.null_text.set(clip.encode_text([""]))
    return Cascade(clip, [PriorStage.of(prior), DecoderStage.of(decoder), UpsamplerStage.of(upsampler)])


def load_pipeline(cascade: Cascade, clip: FrozenClip, dtype: torch.dtype = torch.float32) -> Any:
    """The exported folder in diffusers, with the shim of docs/formats.md."""
    sys.path.append(str(Path(sys.prefix) / "oracles"))  # only there transformers is installed
    import diffusers
    from diffusers.pipelines.deprecated import unclip

    diffusers.pipelines.unclip = unclip
    with tempfile.TemporaryDirectory() as folder:
        export_diffusers(cascade, clip, Path(folder) / "unclip")
        return diffusers.UnCLIPPipeline.from_pretrained(f"{folder}/unclip", dtype=dtype)


def share_pipeline(cascade: Cascade, clip: FrozenClip) -> Any:
    """The pipeline of the same components, on the cascade's own weights."""
    sys.path.append(str(Path(sys.prefix) / "oracles"))
    import diffusers
    import transformers
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    parts, schedulers = export_components(cascade, clip)
    text = parts.pop("text_encoder")
    text_encoder = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig.from_dict(text.config))
    text_encoder.load_state_dict(text.tensors)
    kinds = {
        "prior": diffusers.PriorTransformer,
        "decoder": diffusers.UNet2DConditionModel,
        "text_proj": UnCLIPTextProjModel,
        "super_res_first": diffusers.UNet2DModel,
        "super_res_last": diffusers.UNet2DModel,
    }
    modules: dict[str, Any] = {name: module_of(kinds[name], part, share=True) for name, part in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(clip, Artifact(folder))
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return diffusers.UnCLIPPipeline(
        **modules,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        **{name: diffusers.UnCLIPScheduler.from_config(config) for name, config in schedulers.items()},
    )


def run(size: Size, rounds: int, *, share: bool) -> list[Comparison]:
    """Both sample the same number of pictures from text to the upsampler's size."""
    cascade = make_cascade(size)
    assert isinstance(cascade.clip, FrozenClip)
    pipe = (share_pipeline if share else load_pipeline)(cascade, cascade.clip)
    pipe.set_progress_bar_config(disable=True)
    prompts = (PROMPTS * size.num_images)[: size.num_images]

    def ours() -> object:
        return cascade.sample(prompts, range(size.num_images))

    def theirs() -> object:
        return pipe(
            prompts,
            prior_num_inference_steps=size.prior.sampler.num_steps,
            decoder_num_inference_steps=size.decoder.sampler.num_steps,
            super_res_num_inference_steps=size.upsampler.sampler.num_steps,
            prior_guidance_scale=size.guidance_scale,
            decoder_guidance_scale=size.guidance_scale,
            output_type="pt",
        )

    return [compare(f"cascade, {size.num_images} picture(s)", ours, theirs, rounds=rounds, floor=size.floor)]


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--karlo", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = run(karlo() if arguments.karlo else DEMO, arguments.rounds, share=arguments.karlo)
    publish("sampling_karlo" if arguments.karlo else "sampling", rows, vars(arguments))


if __name__ == "__main__":
    main()

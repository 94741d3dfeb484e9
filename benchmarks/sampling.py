"""Sampling an exported cascade here against diffusers' UnCLIPPipeline: same weights, steps, guidance and prompts.

    python -m benchmarks.sampling [--rounds 5] [--threads 1]    whole cascades at the demo's size; floor 1.2x
    python -m benchmarks.sampling --karlo [--rounds 3]         one guided decoder step at Karlo's width; floor 1.0x

The pipeline is the installed diffusers', loaded from the folder that `unclip export` would write. Karlo's width takes
about 8 GB: the two libraries share the weights.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import DecoderPair, make_inputs, randomise
from benchmarks.side_by_side import Comparison, compare, publish
from models.cascade import Cascade, decoder_denoiser
from models.clip import FrozenClip, create_clip
from models.config import (
    ClipConfig,
    ClipDims,
    DecoderConfig,
    DiffusionConfig,
    PriorConfig,
    SamplerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.decoder import Decoder
from models.prior import Prior
from models.upsampler import Upsampler
from pipeline.export import export_diffusers

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
KARLO = DecoderConfig(
    image_px=64,
    context_width=1536,
    unet=UNetConfig(
        channels=320, channel_mults=(1, 2, 3, 4), num_res_blocks=3, attention_resolutions=(32, 16, 8), dropout=0.0
    ),
)


def make_cascade(num_steps: int) -> Cascade:
    """The demo's sizes, less what the layout cannot hold, with random weights."""
    torch.manual_seed(0)
    clip = FrozenClip(create_clip(CLIP))
    sampler = SamplerConfig(num_steps=num_steps, guidance_scale=2.5)
    prior = Prior(PriorConfig(width=128, depth=4, num_heads=4, num_candidates=1, sampler=sampler), clip.dims)
    decoder = Decoder(
        DecoderConfig(
            image_px=16,
            context_width=64,
            unet=SMALL,
            diffusion=DiffusionConfig(variance="learned_range"),
            sampler=sampler,
        ),
        clip.dims,
    )
    last = SamplerConfig(num_steps=num_steps)
    upsampler = Upsampler(
        UpsamplerConfig(image_px=64, low_res_px=16, crop_px=32, unet=PLAIN, rounded=False, sampler=last)
    )
    for network in (prior, decoder, upsampler):
        randomise(network)
    for network in (prior, decoder):
        network.null_text.set(clip.encode_text([""]))
    return Cascade(clip, prior, decoder, [upsampler])


def load_pipeline(folder: Path) -> Any:
    """The exported folder in diffusers, with the shim of docs/formats.md."""
    sys.path.append(str(Path(sys.prefix) / "oracles"))  # transformers stands there alone
    import diffusers
    from diffusers.pipelines.deprecated import unclip

    diffusers.pipelines.unclip = unclip
    pipe = diffusers.UnCLIPPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_cascade(rounds: int, num_steps: int, num_images: int) -> list[Comparison]:
    """Both draw the same number of pictures from text to the upsampler's size."""
    cascade = make_cascade(num_steps)
    with tempfile.TemporaryDirectory() as name:
        assert isinstance(cascade.clip, FrozenClip)
        export_diffusers(cascade, cascade.clip, Path(name) / "unclip")
        pipe = load_pipeline(Path(name) / "unclip")
    prompts = (PROMPTS * num_images)[:num_images]
    settings = cascade.default_settings()

    def ours() -> object:
        return cascade.sample(prompts, range(num_images), settings)

    def theirs() -> object:
        return pipe(
            prompts,
            prior_num_inference_steps=num_steps,
            decoder_num_inference_steps=num_steps,
            super_res_num_inference_steps=num_steps,
            prior_guidance_scale=2.5,
            decoder_guidance_scale=2.5,
            output_type="pt",
        )

    return [compare(f"cascade, {num_images} pictures", ours, theirs, rounds=rounds, floor=1.2)]


def run_unet_step(config: DecoderConfig, dims: ClipDims, rounds: int, name: str) -> list[Comparison]:
    """One guided step of one picture: two items, conditions computed before, as both samplers do."""
    torch.manual_seed(0)
    with torch.no_grad():
        pair = DecoderPair(config, dims, share=True)
        pair.ours.eval()
        pair.theirs.eval()
        batch = make_inputs(dims, 1, config.image_px)
        t = torch.tensor([500])
        denoise = decoder_denoiser(pair.ours, batch.z_image, batch.text, 4.0)
        context, embedding, mask = (torch.cat([part, part]) for part in pair.condition_theirs(batch))

        def theirs() -> object:
            both = torch.cat([batch.pictures, batch.pictures])
            out = pair.unet(both, t[0], context, class_labels=embedding, attention_mask=mask).sample
            uncond, cond = out.chunk(2)
            return torch.cat([uncond[:, :3] + 4.0 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], dim=1)

        return [compare(name, _without_gradient(lambda: denoise(batch.pictures, t)), theirs, rounds=rounds, floor=1.0)]


def _without_gradient(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--karlo", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.karlo:
        rows = run_unet_step(KARLO, ClipDims(), arguments.rounds, "one guided step at Karlo's width")
    else:
        rows = run_cascade(arguments.rounds, arguments.steps, arguments.images)
    publish("sampling_karlo" if arguments.karlo else "sampling", rows, vars(arguments))


if __name__ == "__main__":
    main()

"""Network calls that the decoder of a finished recipe needs: a table of samplers, steps and Frechet distances.

    python -m benchmarks.sampler_steps configs/demo.toml [--images 512] [--steps 5 8 10 15 20 25 50]

Samples pictures of validation rows from their own z_image and caption with every sampler, and measures the squared
Frechet distance of their CLIP features to those of the real pictures. The reference is the ancestral sampler at 250
steps; the fewest steps within 2 % of it are marked. Floor: at most 25 with the best sampler. Heun calls the network
twice a step.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.side_by_side import publish
from models.decoder.network import Decoder
from models.decoder.stage import decoder_denoiser
from models.diffusion.analytic import X0Variance
from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.samplers import SAMPLERS, config_timesteps, make_limit, num_network_calls, sample
from models.text import TextEncoding
from pipeline.clip.frozen import FrozenClip
from pipeline.data.batch import Batch
from pipeline.data.samples import Samples
from pipeline.data.training_rows import ShardReader
from pipeline.evaluate.metrics import FeatureSums, frechet_distance
from pipeline.networks.clip import load_clip_artifact
from pipeline.networks.files import load_network
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.store import Workspace

WITHIN = 1.02
_VARIANCE_ROWS = 64


class DecoderQuality:
    """The decoder of a recipe, and the rows of one split whose pictures it samples."""

    def __init__(self, recipe: Recipe, num_images: int, batch_size: int, split: str = "validation") -> None:
        workspace = Workspace(recipe.workspace)
        artifacts = {step.name: artifact_of(workspace, step) for step in make_plan(recipe)}
        decoder = load_network(artifacts["decoder"], requested=recipe.decoder.model)
        assert isinstance(decoder, Decoder)
        self.decoder: Decoder = decoder
        self.clip: FrozenClip = load_clip_artifact(artifacts["clip"])
        self.batch_size = batch_size
        reader = ShardReader(artifacts["download"], artifacts["embed"], split)
        rows = Samples(reader, decoder.config.image_px).first(num_images)
        assert rows is not None, f"the recipe has no {split} row"
        self.rows: Batch = rows
        self.text = self.clip.encode_text(rows.captions)
        self.diffusion = Diffusion(decoder.config.diffusion)
        real = self.clip.encode_image(rows.require_images())
        self.real = FeatureSums.of(real.numpy())

    def distance(self, config: SamplerConfig) -> float:
        """Squared Frechet distance of the sampled pictures to the real ones."""
        features: list[torch.Tensor] = []
        measured = self._x0_variance(config) if config.method == "analytic" else None
        with torch.no_grad():
            for start in range(0, len(self.rows), self.batch_size):
                part = slice(start, start + self.batch_size)
                noise = NoiseSource.from_seeds(range(start, min(start + self.batch_size, len(self.rows))), "decoder")
                side_px = self.decoder.config.image_px
                x = sample(
                    decoder_denoiser(self.decoder, *self._conditions(part), config.guidance_scale),
                    noise.normal((3, side_px, side_px)),
                    self.diffusion,
                    config,
                    noise,
                    x0_variance=measured,
                )
                features.append(self.clip.encode_image(x.clamp(-1, 1)))
        return frechet_distance(FeatureSums.of(torch.cat(features).numpy()), self.real)

    def _conditions(self, part: slice) -> tuple[torch.Tensor, TextEncoding]:
        return self.rows.require_z_image()[part], self.text[part]

    def _x0_variance(self, config: SamplerConfig) -> torch.Tensor:
        part = slice(0, _VARIANCE_ROWS)
        pictures = self.rows.require_images()[part].permute(0, 3, 1, 2).float() / 127.5 - 1
        measure = X0Variance(self.diffusion, config_timesteps(config, self.diffusion))
        denoise = decoder_denoiser(self.decoder, *self._conditions(part), config.guidance_scale)
        measure.update(denoise, pictures, NoiseSource.from_seeds(range(len(pictures))), make_limit(config))
        return measure.table()


def run(quality: DecoderQuality, steps: Sequence[int], reference_steps: int) -> list[dict[str, Any]]:
    """One row for each sampler and number of steps, the reference first."""
    base = replace(quality.decoder.config.sampler, respacing="", eta=0.0)
    best = replace(base, method="ddpm", num_steps=reference_steps)
    reference = quality.distance(best)
    rows: list[dict[str, Any]] = [_row(quality, best, reference, reference, is_first=False)]
    for method in SAMPLERS:
        is_within = False
        for num_steps in sorted(steps):
            config = replace(base, method=method, num_steps=num_steps)
            distance = quality.distance(config)
            is_first = not is_within and distance <= WITHIN * reference
            is_within |= is_first
            rows.append(_row(quality, config, distance, reference, is_first=is_first))
    return rows


def _row(
    quality: DecoderQuality, config: SamplerConfig, distance: float, reference: float, *, is_first: bool
) -> dict[str, Any]:
    return {
        "sampler": config.method,
        "steps": config.num_steps,
        "network_calls": num_network_calls(config, quality.diffusion),
        "frechet_distance": distance,
        "of_reference": distance / reference,
        "fewest_within_2_percent": is_first,
    }


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20, 25, 50])
    parser.add_argument("--reference-steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quality = DecoderQuality(load_recipe(arguments.recipe, arguments.overrides), arguments.images, arguments.batch_size)
    arguments.images = len(quality.rows)  # the split may hold fewer
    publish("sampler_steps", run(quality, arguments.steps, arguments.reference_steps), vars(arguments))


if __name__ == "__main__":
    main()

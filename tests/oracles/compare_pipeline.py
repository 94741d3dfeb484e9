"""Draw with diffusers' UnCLIPPipeline and with our cascade at equal noise; print the largest differences as JSON.

A program of its own, because two releases of diffusers cannot be loaded into one process. Arguments: the exported
folder, the folder of our networks. Which diffusers: the one that PYTHONPATH names, else the installed one. Compared twice:
with its schedulers' own float32 tables ("own"), and with float64 tables in their place ("float64").
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(sys.prefix) / "oracles"))  # transformers stands there alone; what is installed goes first

import diffusers
import torch
import torch.nn.functional as F
from diffusers.schedulers import scheduling_unclip
from torch import Tensor

import pipeline.clip.library  # noqa: F401  (first: it lets torchvision be imported beside a torch without CUDA)
from models.cascade import Cascade
from models.diffusion.noise import NoiseSource
from models.diffusion.schedules import cosine_betas
from models.stage import Batch
from pipeline.networks.cascade import load_cascade
from pipeline.workspace.store import Artifact

PROMPTS = ["a red circle", "a large blue square to the left of a small green star on a white background"]
SEEDS = [11, 12]
"""With the seeds 3 and 4 rounding grows 50 times in a patch of the upsampler's picture (102 of 6,144 values)."""


def load_pipeline(folder: str) -> Any:
    """The pipeline; releases from 0.38 on need their moved module back under its old name (docs/formats.md)."""
    if not hasattr(diffusers.pipelines, "unclip"):
        from diffusers.pipelines.deprecated import unclip

        diffusers.pipelines.unclip = unclip
    pipe = diffusers.UnCLIPPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def share_noise(pipe: Any, *, is_float64: bool) -> dict[str, Tensor]:
    """Let every stage of the pipeline draw what the same stage of our cascade draws; returns the first latents."""
    sides = {"decoder": pipe.decoder.config.sample_size, "super_res": pipe.super_res_first.config.sample_size}
    latents: dict[str, Tensor] = {}
    for stage, stream in (("prior", "prior-0"), ("decoder", "decoder"), ("super_res", "upsampler-0")):
        noise = NoiseSource.from_seeds(SEEDS, stream)
        side = sides.get(stage)
        shape = (3, side, side) if side else (pipe.prior.config.embedding_dim,)
        latents[f"{stage}_latents"] = noise.normal(shape)
        scheduler = getattr(pipe, f"{stage}_scheduler")
        if is_float64:
            scheduler.betas = cosine_betas(scheduler.config.num_train_timesteps)
            scheduler.alphas = 1 - scheduler.betas
            scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.step = _drawing_from(noise, scheduler.step)
    return latents


def _drawing_from(noise: NoiseSource, step: Any) -> Any:
    def draw(shape: Any, **_: Any) -> Tensor:
        return noise.normal(shape[1:])

    def drawing(*args: Any, **kwargs: Any) -> Any:
        scheduling_unclip.randn_tensor = draw
        return step(*args, **kwargs)

    return drawing


def compare(*, is_float64: bool) -> dict[str, Any]:
    """The largest differences of text states, embeddings, and pictures."""
    torch.manual_seed(0)
    pipe = load_pipeline(sys.argv[1])
    ours = Path(sys.argv[2]).resolve()
    cascade: Cascade = load_cascade({name.name: Artifact(str(name)) for name in ours.iterdir()})
    settings = cascade.settings
    text = cascade.clip.encode_text(PROMPTS)
    length = text.mask.shape[1]
    embeds, states, mask = pipe._encode_prompt(PROMPTS, "cpu", 1, False)

    embeddings: list[Tensor] = []
    keep = pipe.prior.post_process_latents
    # The pipeline leaves the length of its samples as it is; ours are of length one.
    pipe.prior.post_process_latents = lambda x: embeddings.append(F.normalize(keep(x), dim=-1)) or embeddings[-1]
    latents = share_noise(pipe, is_float64=is_float64)
    step, decoded = pipe.decoder_scheduler.step, list[Tensor]()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        decoded.append(result.prev_sample.clamp(-1, 1))
        return result

    pipe.decoder_scheduler.step = recorded
    pictures = pipe(
        PROMPTS,
        prior_num_inference_steps=settings["prior"]["num_steps"],
        decoder_num_inference_steps=settings["decoder"]["num_steps"],
        super_res_num_inference_steps=settings["upsampler_1"]["num_steps"],
        prior_guidance_scale=settings["prior"]["guidance_scale"],
        decoder_guidance_scale=settings["decoder"]["guidance_scale"],
        output_type="pt",
        **latents,
    ).images
    batch, results = Batch(text, tuple(SEEDS)), list[Tensor]()
    for stage in cascade.stages:
        results.append(cascade.run_stage(stage, batch))
        batch = batch.with_values(**{stage.makes: results[-1]})
    z_image, small, large = results[0], results[1], results[2].clamp(-1, 1).permute(0, 2, 3, 1)
    valid = text.mask[:, :, None]
    return {
        "diffusers": diffusers.__version__,
        "mask": int((mask[:, :length].bool() ^ text.mask).sum() + mask[:, length:].sum()),
        "pooled": (embeds - text.pooled).abs().max().item(),
        "hidden": ((states[:, :length] - text.hidden) * valid).abs().max().item(),
        "z_image": (embeddings[0] - z_image).abs().max().item(),
        "pictures": (torch.as_tensor(pictures) * 2 - 1 - large).abs().max().item(),
        "small": (decoded[-1] - small).abs().max().item(),
        "spread": large.std().item(),
    }


if __name__ == "__main__":
    print(json.dumps({"float64": compare(is_float64=True), "own": compare(is_float64=False)}))

"""Write a tiny folder of Karlo's layout with diffusers and transformers alone, and what they make of it.

A program of its own, as compare_pipeline.py is. Arguments: the folder to write; where to write ``pictures.npy``, which
the pipeline samples from PROMPTS at the noise of our cascade, and ``embedding.npy`` of ``picture.npy``, by the image
tower, which stands beside the layout.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline.clip.library  # noqa: F401  (first: it lets torchvision be imported beside a torch without CUDA)

sys.path.append(str(Path(sys.prefix) / "oracles"))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from models.clip_config import ClipDims
from models.decoder.network import Decoder
from models.interchange.networks import export_decoder, export_upsampler
from models.upsampler.network import Upsampler
from pipeline.clip.frozen import FrozenText
from pipeline.clip.model import create_clip
from pipeline.networks.diffusers import write_tokenizer
from pipeline.workspace.store import Artifact
from tests.oracles.compare_pipeline import share_noise
from tests.tiny.networks import CLIP, DECODER, UPSAMPLER

PROMPTS = ["a red circle"] * 2
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH = 16
CONTEXT_LENGTH = 24


def clip_towers() -> tuple[Any, Any]:
    """Both towers of a CLIP; half of their fields are at transformers' defaults, which it leaves out of its files."""
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(**SHAPE, projection_dim=WIDTH, max_position_embeddings=CONTEXT_LENGTH)
    )
    vision = CLIPVisionConfig(**SHAPE, projection_dim=WIDTH, image_size=32, patch_size=8)
    return text.eval(), CLIPVisionModelWithProjection(vision).eval()


def make_pipeline(tokenizer: Path, text_encoder: Any) -> UnCLIPPipeline:
    """Random networks of diffusers, of the shapes of tiny_export."""
    prior = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH, num_embeddings=CONTEXT_LENGTH
    )
    torch.nn.init.normal_(prior.clip_mean, std=2.0)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 2.0)
    dims = ClipDims(embed_dim=WIDTH, text_width=WIDTH, context_length=CONTEXT_LENGTH)
    unet, projection = export_decoder(Decoder(DECODER, dims))
    text_proj = UnCLIPTextProjModel.from_config(projection.config)
    torch.nn.init.normal_(text_proj.learned_classifier_free_guidance_embeddings, std=2.0)
    super_res = UNet2DModel.from_config(export_upsampler(Upsampler(UPSAMPLER)).config)
    schedulers = {
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    return UnCLIPPipeline(
        prior=prior.eval(),
        decoder=UNet2DConditionModel.from_config(unet.config).eval(),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        text_proj=text_proj.eval(),
        super_res_first=super_res.eval(),
        super_res_last=super_res,
        **schedulers,
    )


def main(folder: Path, results: Path) -> None:
    """Write the folder, the picture and its embedding, and the pipeline's pictures."""
    torch.manual_seed(0)
    write_tokenizer(
        FrozenText(create_clip(replace(CLIP, context_length=CONTEXT_LENGTH))), Artifact(str(results / "tokenizer"))
    )
    text_encoder, image_encoder = clip_towers()
    pipe = make_pipeline(results / "tokenizer", text_encoder)
    pipe.save_pretrained(folder)
    image_encoder.save_pretrained(folder / "image_encoder")
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    np.save(results / "picture.npy", picture.numpy())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    with torch.no_grad():
        embedding = image_encoder(pixel_values=((picture + 1) / 2 - mean) / std).image_embeds
    np.save(results / "embedding.npy", F.normalize(embedding, dim=-1).numpy())

    # Ours brings every z_image to the length that the statistics tell; the pipeline leaves its samples as they are.
    norm = float(f"{torch.cat([pipe.prior.clip_mean, pipe.prior.clip_std]).double().norm().item():.3g}")
    keep = pipe.prior.post_process_latents
    pipe.prior.post_process_latents = lambda x: F.normalize(keep(x), dim=-1) * norm
    pipe.set_progress_bar_config(disable=True)
    latents = share_noise(pipe, is_float64=True)
    pictures = pipe(PROMPTS, output_type="np", **latents).images
    np.save(results / "pictures.npy", pictures)


_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, which a folder without feature_extractor/ has."""

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

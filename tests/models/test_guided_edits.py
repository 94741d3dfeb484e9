"""Guidance by CLIP in edits: of those that sample a prompt, and of no other."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DIMS, UNET, make_text, randomise

from models.cascade import Cascade, CascadeResult
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.config import SamplerConfig
from models.editor import Editor, EditSettings, Latents
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.pixels import resize_crop, to_pixels
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.rows import concat_rows
from models.text import TextEncoding

PROMPT, SEEDS = "a red circle", [3, 4]
PICTURE = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Clip:
    """Captions of n letters are n random tokens; z_image is a random projection of the picture."""

    dims = DIMS

    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        return concat_rows([make_text((len(caption) % 6 + 2,)) for caption in captions])

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        small = resize_crop(to_pixels(images), 4).flatten(1)
        matrix = torch.randn(small.shape[1], DIMS.embed_dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(small @ matrix, dim=1)


def make_editor(clip_guidance_scale: float, *, inpainting: bool = False, tower: bool = True) -> Editor:
    torch.manual_seed(0)
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.5, clip_guidance_scale=clip_guidance_scale)
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2, sampler=SamplerConfig(num_steps=2, clip_x0=False)), DIMS)
    decoder = Decoder(
        DecoderConfig(image_px=8, context_width=6, unet=UNET, inpainting=inpainting, sampler=sampler), DIMS
    )
    noisy_clip = NoisyClip(NoisyClipConfig(image_px=8, tower=replace(UNET, attention_resolutions=())), DIMS)
    for network in (prior, decoder, noisy_clip):
        randomise(network)
        network.requires_grad_(requires_grad=False)
    stages = [PriorStage.of(prior), DecoderStage.of(decoder, noisy_clip if tower else None)]
    return Editor(Cascade(Clip(), stages), EditSettings(num_steps=8))


def right_half() -> torch.Tensor:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    return mask


def similarity(editor: Editor, result: CascadeResult) -> torch.Tensor:
    """How near the pictures are to the prompt, as the noise-aware CLIP sees them."""
    pixels, noisy_clip = to_pixels(result.images), editor.decoder.noisy_clip
    assert noisy_clip is not None
    return noisy_clip(pixels, torch.zeros(len(pixels), dtype=torch.int64)) @ Clip().encode_text([PROMPT]).z_text[0]


@pytest.mark.parametrize("inpainting", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda editor: editor.sdedit(PICTURE, PROMPT, SEEDS, strength=0.9),
        lambda editor: editor.inpaint(PICTURE, right_half(), PROMPT, SEEDS),
    ],
)
def test_edits_that_sample_a_prompt_are_guided_towards_it(
    edit: Callable[[Editor], CascadeResult], inpainting: bool
) -> None:
    plain, guided = (make_editor(scale, inpainting=inpainting) for scale in (0.0, 100.0))
    before, after = similarity(plain, edit(plain)), similarity(guided, edit(guided))
    assert (after > before + 0.01).all()


def test_inpainting_that_is_guided_keeps_what_is_known() -> None:
    frames = make_editor(100.0).inpaint(PICTURE, right_half(), PROMPT, SEEDS).images
    assert torch.equal(frames[:, :, :4], PICTURE[:, :, :4].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    "edit",
    [
        lambda editor, latents: editor.reconstruct(latents, [0]),
        lambda editor, latents: editor.vary(latents, SEEDS, eta=0.8),
        lambda editor, latents: editor.interpolate(latents, latents, [0.0, 1.0], 0),
        lambda editor, latents: editor.text_diff(latents, "red", "a circle", [0.0, 0.4], 0),
        lambda editor, latents: editor.sample_embeddings(latents.z_image, 0),
    ],
)
def test_edits_without_a_prompt_are_not_guided(edit: Callable[[Editor, Latents], CascadeResult]) -> None:
    plain, guided = (edit(editor, editor.encode(PICTURE)) for editor in (make_editor(0.0), make_editor(100.0)))
    assert torch.equal(plain.images, guided.images)


def test_guidance_without_a_noise_aware_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise-aware CLIP"):
        make_editor(100.0, tower=False).sdedit(PICTURE, PROMPT, SEEDS, strength=0.5)

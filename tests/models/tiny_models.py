"""Tiny networks and captions that need torch alone; tests of other rooms build on them in ``tests/tiny``."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from models.cascade import Cascade
from models.clip_config import ClipDims
from models.layers.config import UNetConfig
from models.pca import Pca, PcaSums
from models.pixels import resize_crop, to_pixels, to_uint8
from models.rows import concat_rows
from models.stage import Stage
from models.text import TextEncoding

DIMS = ClipDims(embed_dim=12, text_width=10, context_length=9)
UNET = UNetConfig(
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=4,
    norm_groups=4,
    dropout=0.0,
)
CONVOLUTION = replace(UNET, attention_resolutions=())


def make_text(lengths: tuple[int, ...], width: int = 7, dims: ClipDims = DIMS) -> TextEncoding:
    """Random captions of ``lengths`` tokens; the same lengths give the same captions."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    hidden = torch.randn(len(lengths), width, dims.text_width, generator=generator)
    pooled = torch.randn(len(lengths), dims.embed_dim, generator=generator)
    tokens = torch.randint(1, 1000, mask.shape, generator=generator) * mask
    return TextEncoding(pooled, hidden, mask, tokens)


def randomise(model: torch.nn.Module, std: float = 0.1) -> None:
    """Random weights in place of those that start at zero, so that every input matters; norms keep theirs."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=std)


def with_stages(cascade: Cascade, *stages: Stage) -> Cascade:
    """The same cascade, in which each of ``stages`` replaces the one of its name."""
    by_name = {stage.name: stage for stage in stages}
    assert by_name.keys() <= {stage.name for stage in cascade.stages}
    replaced = [by_name.get(stage.name, stage) for stage in cascade.stages]
    return Cascade(cascade.clip, replaced, micro_batch=cascade.micro_batch)


def embeddings(count: int = 300, features: int = 12) -> torch.Tensor:
    """Of length one, around a mean, with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(features)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    return torch.nn.functional.normalize(x @ turn + 0.3, dim=-1)


def measured(x: torch.Tensor) -> Pca:
    sums = PcaSums(x.shape[1])
    sums.update(x)
    return sums.pca()


class Captions:
    """Stands for a CLIP without its image tower: a caption of n letters is encoded as n random tokens."""

    def __init__(self, dims: ClipDims = DIMS) -> None:
        self.dims = dims

    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        return concat_rows([make_text((len(caption),)) for caption in captions])


class Pictures(Captions):
    """Stands for a CLIP: z_image is a random projection of the picture."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        small = resize_crop(to_pixels(images), 4).flatten(1)
        matrix = torch.randn(small.shape[1], DIMS.embed_dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(small @ matrix, dim=1)


def picture(seed: int, side_px: int = 16) -> torch.Tensor:
    """A smooth random picture, uint8 (1, side, side, 3)."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return to_uint8(resize_crop(coarse, side_px))


def right_half(image: torch.Tensor) -> torch.Tensor:
    """The mask of a picture of which the right half is made anew."""
    mask = torch.zeros(image.shape[:3], dtype=torch.bool)
    mask[:, :, image.shape[2] // 2 :] = True
    return mask


def decoder_inputs(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noised pictures of 8 px, their timesteps, and z_image."""
    generator = torch.Generator().manual_seed(size)
    z_image = F.normalize(torch.randn(size, DIMS.embed_dim, generator=generator), dim=-1)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) * 100, z_image

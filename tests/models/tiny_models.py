"""Tiny networks and captions, shared by the tests of this folder."""

import torch

from models.clip_config import ClipDims
from models.layers.config import UNetConfig
from models.pca import Pca, PcaSums
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


def make_text(lengths: tuple[int, ...], width: int = 7, dims: ClipDims = DIMS) -> TextEncoding:
    """Random captions of ``lengths`` tokens; the same lengths give the same captions."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    hidden = torch.randn(len(lengths), width, dims.text_width, generator=generator)
    pooled = torch.randn(len(lengths), dims.embed_dim, generator=generator)
    tokens = torch.randint(1, 1000, mask.shape, generator=generator) * mask
    return TextEncoding(pooled, hidden, mask, tokens)


def randomise(model: torch.nn.Module) -> None:
    """Random weights in place of those that start at zero, norms apart."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)


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

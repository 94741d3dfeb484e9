"""One training step against DALLE2-pytorch's prior and decoder of the same size, on the CPU in float32.

    python -m benchmarks.train_step_dalle2 --path FOLDER [--rounds 15] [--threads 1]

FOLDER holds dalle2-pytorch and what it imports, installed apart because its pins conflict with the project's:

    uv pip install --no-deps --target FOLDER, with
        dalle2-pytorch coca-pytorch vector-quantize-pytorch einx einops einops-exts rotary-embedding-torch ema-pytorch
        x-clip resize-right kornia kornia-rs clip-anytorch embedding-reader accelerate webdataset pytorch-warmup
        hyper-connections torch-einops-utils frozendict loguru

Its networks differ (SwiGLU, one head of keys and values, cross-attention apart), so sizes are matched by parameters,
and ours are never smaller; the table gives both. Floor: 1.0x.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import make_inputs, randomise
from benchmarks.side_by_side import compare, publish
from benchmarks.train_step import DECODER, DIMS, PRIOR, training_step
from models.decoder.network import Decoder
from models.prior.network import Prior

OUR_PRIOR = replace(PRIOR, mlp_ratio=6)
"""SwiGLU has three matrices where we have two."""


def run(rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """Both comparisons; ``dalle2_pytorch`` must be importable."""
    from dalle2_pytorch.dalle2_pytorch import DiffusionPriorNetwork, Unet  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    batch = make_inputs(DIMS, batch_size, DECODER.image_px)
    prior, decoder = Prior(OUR_PRIOR, DIMS), Decoder(DECODER, DIMS)
    heads, levels = PRIOR.num_heads, DECODER.unet.channel_mults
    their_prior: nn.Module = DiffusionPriorNetwork(
        DIMS.embed_dim,
        num_timesteps=1000,
        max_text_len=DIMS.context_length,
        depth=PRIOR.depth,
        heads=heads,
        dim_head=PRIOR.width // heads,
    )
    their_decoder: nn.Module = Unet(
        DECODER.unet.channels,
        image_embed_dim=DIMS.embed_dim,
        text_embed_dim=DIMS.text_width,
        cond_dim=DECODER.context_width,
        channels_out=6,
        dim_mults=levels,
        num_resnet_blocks=DECODER.unet.num_res_blocks,
        self_attn=(False, True, True),
        attn_dim_head=DECODER.unet.head_channels,
        attn_heads=4,
        cond_on_image_embeds=True,
        cond_on_text_encodings=True,
        max_text_len=DIMS.context_length,
    )
    randomise(prior)
    randomise(decoder)

    def run_prior() -> Tensor:
        return prior(prior.scale(batch.z_image), batch.t, prior.encode_condition(batch.text))

    def run_decoder() -> Tensor:
        return decoder(batch.pictures, batch.t, decoder.encode_condition(batch.z_image, batch.text))

    def run_their_prior() -> Tensor:
        text = batch.text
        return their_prior(batch.z_image, batch.t, text_embed=text.pooled, text_encodings=text.hidden)

    def run_their_decoder() -> Tensor:
        return their_decoder(batch.pictures, batch.t, image_embed=batch.z_image, text_encodings=batch.text.hidden)

    rows: list[dict[str, Any]] = []
    pairs: tuple[tuple[str, nn.Module, Callable[[], Tensor], nn.Module, Callable[[], Tensor]], ...] = (
        ("prior", prior, run_prior, their_prior, run_their_prior),
        ("decoder", decoder, run_decoder, their_decoder, run_their_decoder),
    )
    for name, ours, run_ours, theirs, run_theirs in pairs:
        comparison = compare(
            name, training_step(ours, run_ours), training_step(theirs, run_theirs), rounds=rounds, floor=1.0
        )
        sizes = {"our_parameters": _size(ours), "their_parameters": _size(theirs)}
        rows.append(asdict(comparison) | sizes)
    return rows


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="Folder that holds dalle2-pytorch.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.path.append(arguments.path)
    settings = {name: value for name, value in vars(arguments).items() if name != "path"}
    publish("train_step_dalle2", run(arguments.rounds, arguments.batch_size), settings)


if __name__ == "__main__":
    main()

"""One training step against diffusers' modules of the same shapes, weights and arithmetic, on the CPU in float32.

    python -m benchmarks.train_step [--rounds 15] [--threads 1]

Forward, squared error, backward and a fused AdamW step, alternately. Floors: prior 1.0x, decoder 1.05x.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import DecoderPair, PriorPair, make_inputs
from benchmarks.side_by_side import Comparison, compare, publish
from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.diffusion.config import DiffusionConfig
from models.layers.config import UNetConfig
from models.prior.config import PriorConfig

DIMS = ClipDims(embed_dim=256, text_width=256, context_length=77)
PRIOR = PriorConfig(width=256, depth=6, num_heads=4)
DECODER = DecoderConfig(
    image_px=32,
    context_width=128,
    unet=UNetConfig(
        channels=64,
        channel_mults=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(16, 8),
        head_channels=32,
        dropout=0.0,
    ),
    diffusion=DiffusionConfig(variance="learned_range"),
)


def training_step(network: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """One optimizer step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run(rounds: int, batch_size: int, prior: PriorConfig = PRIOR, decoder: DecoderConfig = DECODER) -> list[Comparison]:
    """Both comparisons."""
    torch.manual_seed(0)
    batch = make_inputs(DIMS, batch_size, decoder.image_px)
    priors, decoders = PriorPair(prior, DIMS), DecoderPair(decoder, DIMS)
    rows: list[Comparison] = []
    for name, pair, floor in (("prior", priors, 1.0), ("decoder", decoders, 1.05)):
        pair.ours.train()
        pair.theirs.train()
        with torch.no_grad():
            torch.testing.assert_close(pair.run_ours(batch), pair.run_theirs(batch), rtol=1e-3, atol=1e-4)
        ours = training_step(pair.ours, lambda pair=pair: pair.run_ours(batch))
        theirs = training_step(pair.theirs, lambda pair=pair: pair.run_theirs(batch))
        rows.append(compare(name, ours, theirs, rounds=rounds, floor=floor))
    return rows


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = run(arguments.rounds, arguments.batch_size)
    publish("train_step", rows, vars(arguments))


if __name__ == "__main__":
    main()

"""Training of the large decoder and prior on a GPU: bf16, compiled, as a share of the FLOP/s of a matrix product there.

    python -m benchmarks.gpu [--batch-size-decoder 192] [--batch-size-prior 256] [--steps 20] [--compile whole]
    python -m benchmarks.gpu --tiny --device cpu        the same path at tiny sizes, to check that it runs

Needs only torch and jaxtyping. FLOPs are those of forward and backward on the meta device, without recomputation. The
peak of each row is measured in the same process, on the best of a few square bf16 products. Floors: decoder (192
channels, 64 px) 45 %, prior (1B parameters) 50 %. The compiler takes four minutes for the decoder.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.diffusion.config import DiffusionConfig
from models.layers.config import UNetConfig
from models.layers.unet import blocks_of
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.text import TextEncoding

PRIOR = PriorConfig(width=2048, depth=20, num_heads=32)
DECODER = DecoderConfig(
    image_px=64, unet=UNetConfig(channels=192, dropout=0.0), diffusion=DiffusionConfig(variance="learned_range")
)
TINY_PRIOR = PriorConfig(width=32, depth=1, num_heads=2)
TINY_DECODER = DecoderConfig(
    image_px=16,
    context_width=16,
    unet=UNetConfig(channels=32, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(8,), head_channels=16),
    diffusion=DiffusionConfig(variance="learned_range"),
)


def make_text(dims: ClipDims, batch_size: int) -> TextEncoding:
    """Captions of full length."""
    length = dims.context_length
    return TextEncoding(
        pooled=torch.randn(batch_size, dims.embed_dim),
        hidden=torch.randn(batch_size, length, dims.text_width),
        mask=torch.ones(batch_size, length, dtype=torch.bool),
        tokens=torch.ones(batch_size, length, dtype=torch.int64),
    )


def prior_loss(config: PriorConfig, dims: ClipDims, batch_size: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The prior and its loss on one batch."""
    network = Prior(config, dims)
    text, x = make_text(dims, batch_size), torch.randn(batch_size, dims.embed_dim)
    t = torch.randint(config.diffusion.num_timesteps, (batch_size,), device="cpu").to(x.device)

    def loss() -> Tensor:
        return network(x, t, network.encode_condition(text)).float().square().mean()

    return network, loss


def decoder_loss(config: DecoderConfig, dims: ClipDims, batch_size: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The decoder and its loss on one batch."""
    network = Decoder(config, dims).to(memory_format=torch.channels_last)
    text = make_text(dims, batch_size)
    x = torch.randn(batch_size, 3, config.image_px, config.image_px)
    z_image = F.normalize(torch.randn(batch_size, dims.embed_dim), dim=-1)
    t = torch.randint(config.diffusion.num_timesteps, (batch_size,), device="cpu").to(x.device)

    def loss() -> Tensor:
        return network(x, t, network.encode_condition(z_image, text)).float().square().mean()

    return network, loss


def count_flops(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> tuple[int, int]:
    """FLOPs of one forward and backward pass, and number of parameters; takes no memory."""
    with torch.device("meta"):
        network, loss = make()
        with FlopCounterMode(display=False) as counter:
            loss().backward()
    return counter.get_total_flops(), sum(parameter.numel() for parameter in network.parameters())


def measure_peak(device: torch.device, sizes: tuple[int, ...]) -> float:
    """FLOP/s of the best of a few square products in bf16."""
    best = 0.0
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind(0)
        best = max(best, 2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device, 20))
    return best


def _seconds(function: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Mean time of a call, after three warm-up calls."""
    for _ in range(3):
        function()
    _wait(device)
    start_s = time.perf_counter()
    for _ in range(steps):
        function()
    _wait(device)
    return (time.perf_counter() - start_s) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    name: str,
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]],
    device: torch.device,
    peak: float,
    steps: int,
    *,
    batch_size: int,
    compiled: str,
) -> dict[str, Any]:
    """One row: time, FLOPs, share of the peak, memory."""
    flops, num_parameters = count_flops(make)
    with device:
        network, loss = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    run = torch.compile(loss, fullgraph=True) if compiled == "whole" else loss
    for block in blocks_of(network) if compiled == "blocks" else ():
        block.compile()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = run()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = _seconds(step, device, steps)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "network": name,
        "batch_size": batch_size,
        "parameters": num_parameters,
        "tflop_a_step": flops / 1e12,
        "step_s": seconds,
        "tflop_s": flops / seconds / 1e12,
        "peak_tflop_s": peak / 1e12,
        "of_measured_peak": flops / seconds / peak,
        "memory_bytes": memory,
    }


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size-decoder", type=int, default=192)
    parser.add_argument("--batch-size-prior", type=int, default=256)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", choices=("blocks", "whole", "none"), default="whole", help="What is compiled.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    arguments = parser.parse_args()
    device, tiny = torch.device(arguments.device), arguments.tiny
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 256  # blocks of one class, for each of their shapes
    dims = ClipDims(embed_dim=16, text_width=16, context_length=8) if tiny else ClipDims()
    prior, decoder = (TINY_PRIOR, TINY_DECODER) if tiny else (PRIOR, DECODER)
    peak = measure_peak(device, (64,) if tiny else (4096, 8192, 16384))
    sizes = {"decoder": arguments.batch_size_decoder, "prior": arguments.batch_size_prior}
    makes = {
        "decoder": lambda: decoder_loss(decoder, dims, sizes["decoder"]),
        "prior": lambda: prior_loss(prior, dims, sizes["prior"]),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    for network, make in makes.items():
        compiled = arguments.compile
        rows.append(measure(network, make, device, peak, arguments.steps, batch_size=sizes[network], compiled=compiled))
        print(json.dumps(rows[-1]), flush=True)
    settings = {"device": name, "compiled": arguments.compile}
    document = {
        "benchmark": "gpu",
        "settings": settings,
        "rows": rows,
        "machine": {"threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

"""State of a training worker at four workers: divided among them (FSDP2) against whole on each (DDP), on the CPU.

    python -m benchmarks.sharding

Four processes train a small decoder by gloo, and count the bytes of weights, gradients, moments and averaged weights
while the optimizer runs; the largest worker counts. Floor: at most 0.30 of DDP's.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.side_by_side import publish
from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.layers.config import UNetConfig
from pipeline.networks.counting import first_steps, full_captions
from pipeline.networks.decoder import DECODER as KIND
from pipeline.recipe.train_sections import TrainConfig, TrainResources
from pipeline.train.sharding import create_mesh, shard
from pipeline.train.state import TrainState, create_state

NUM_WORKERS = 4
DIMS = ClipDims(embed_dim=256, text_width=256, context_length=77)
CONFIG = DecoderConfig(
    image_px=16,
    context_width=128,
    unet=UNetConfig(
        channels=64, channel_mults=(1, 2, 3), num_res_blocks=1, attention_resolutions=(8,), head_channels=32
    ),
)
CPU = torch.device("cpu")


class DecoderLoss(nn.Module):
    """A loss of two samples."""

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> Tensor:
        """Mean square of the output."""
        condition = self.network.encode_condition(torch.randn(2, DIMS.embed_dim), full_captions(DIMS, 2))
        x = torch.randn(2, 3, CONFIG.image_px, CONFIG.image_px)
        return self.network(x, first_steps(2), condition).square().mean()


def state_bytes(num_shards: int) -> dict[str, int]:
    """Bytes of each part of this worker's state after a step."""
    torch.manual_seed(0)
    network, config = Decoder(CONFIG, DIMS), TrainConfig()
    objective: nn.Module = DecoderLoss(network).train()
    mesh = create_mesh(TrainResources(num_workers=NUM_WORKERS, num_shards=num_shards), CPU, NUM_WORKERS)
    if mesh is None:
        state = create_state(network, config, CPU)
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    else:
        sharding = shard(objective, network, KIND.blocks(network), mesh, config, CPU)
        state = create_state(sharding.part, config, CPU, sharding)
    objective().backward()
    state.clip_gradients(1.0)
    gradients = [parameter.grad for parameter in state.network.parameters()]
    state.optimizer.step()
    return _count(state, [gradient for gradient in gradients if gradient is not None])


def _count(state: TrainState, gradients: list[Tensor]) -> dict[str, int]:
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    parts = {
        "weights": state.network.state_dict().values(),
        "gradients": gradients,
        "moments": moments,
        "average": state.ema.state_dict().values(),
    }
    counts: dict[str, int] = {}
    for name, tensors in parts.items():
        storages = {
            storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)
        }
        counts[name] = sum(storages.values())
    return counts


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=NUM_WORKERS)
    torch.save({num_shards: state_bytes(num_shards) for num_shards in (1, 0)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run() -> list[dict[str, Any]]:
    """One row for each way."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.networks.decoder", "pipeline.train.sharding"])
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=_work, args=(rank, folder)) for rank in range(NUM_WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        counts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(NUM_WORKERS)]
    largest = {shards: max((of[shards] for of in counts), key=lambda parts: sum(parts.values())) for shards in (1, 0)}
    alone = sum(largest[1].values())
    return [
        {"way": way, **largest[shards], "of_ddp": sum(largest[shards].values()) / alone, "at_most": most}
        for way, shards, most in (("DDP", 1, None), ("FSDP2", 0, 0.30))
    ]


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    publish("sharding", run(), vars(parser.parse_args()))


if __name__ == "__main__":
    main()

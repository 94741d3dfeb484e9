"""Memory of one decoder training step against diffusers', activations kept or recomputed, on the CPU.

    python -m benchmarks.memory

Counts the bytes of every tensor of forward and backward, from the operator that returns it until it is freed, and
reports the largest sum alive at any time. Weights, gradients and optimizer state, equal for all, are not counted.
Floors, as a share of diffusers' with its activations kept: 1.0 with ours kept, 0.5 with ours recomputed.
"""

import argparse
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers import DecoderPair, make_inputs
from benchmarks.side_by_side import publish
from benchmarks.train_step import DECODER, DIMS
from models.decoder.config import DecoderConfig
from models.layers.unet import set_checkpointing


class AliveBytes(TorchDispatchMode):
    """Bytes of all tensors that a step allocates, forward and backward: now, and the peak so far."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages that it allocates."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def skip_weights(self, network: nn.Module) -> None:
        """Do not count the weights of a network."""
        self._skipped |= {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, num_bytes = storage._cdata, storage.nbytes()
        if place in self._skipped:
            return
        self._skipped.add(place)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place, num_bytes)

    def _free(self, place: int, num_bytes: int) -> None:
        self._skipped.discard(place)
        self.now -= num_bytes


def peak_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Peak bytes of one step, without weights and gradients, which are allocated before."""
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    counter = AliveBytes()
    counter.skip_weights(network)
    with counter:
        forward().square().mean().backward()
    network.zero_grad(set_to_none=True)
    return counter.peak


def run(config: DecoderConfig, batch_size: int) -> list[dict[str, Any]]:
    """One row for ours and theirs, each with activations kept and recomputed."""
    torch.manual_seed(0)
    pair, batch = DecoderPair(config, DIMS), make_inputs(DIMS, batch_size, config.image_px)
    pair.ours.train()
    pair.theirs.train()
    theirs = peak_bytes(pair.theirs, lambda: pair.run_theirs(batch))
    pair.unet.enable_gradient_checkpointing()
    theirs_recomputed = peak_bytes(pair.theirs, lambda: pair.run_theirs(batch))
    ours = peak_bytes(pair.ours, lambda: pair.run_ours(batch))
    set_checkpointing(pair.ours, enabled=True)
    recomputed = peak_bytes(pair.ours, lambda: pair.run_ours(batch))
    rows = (
        ("diffusers, kept", theirs, None),
        ("diffusers, recomputed", theirs_recomputed, None),
        ("ours, kept", ours, 1.0),
        ("ours, recomputed", recomputed, 0.5),
    )
    return [
        {"way": way, "peak_bytes": peak, "of_diffusers_kept": peak / theirs, "at_most": most}
        for way, peak, most in rows
    ]


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    publish("memory", run(DECODER, arguments.batch_size), vars(arguments))


if __name__ == "__main__":
    main()

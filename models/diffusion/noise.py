"""Noise that belongs to one item, so that a sample depends on its seed and not on the batch it is sampled in.

Legend: B items of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for one named stream of draws (for example "prior", "decoder") of a user's seed.

    Without this the stages of a cascade would share their noise: the first numbers of x_T of the decoder
    would be those of the prior.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class NoiseSource:
    """Standard normal draws for a batch: one CPU generator for each item, advanced by that item alone.

    Draws are made on the CPU and then moved, so that they are the same on every device.
    """

    def __init__(self, generators: Iterable[torch.Generator]) -> None:
        self.generators = tuple(generators)

    @classmethod
    def from_seeds(cls, seeds: Sequence[int], stream: str = "") -> NoiseSource:
        """One generator per seed.

        Args:
            seeds: B seeds, one per item; equal seeds give equal noise.
            stream: Name of the stage that samples; other streams of the same seed are independent.
        """
        return cls(torch.Generator().manual_seed(derive_seed(seed, stream)) for seed in seeds)

    def __len__(self) -> int:
        return len(self.generators)

    def __add__(self, other: NoiseSource) -> NoiseSource:
        return NoiseSource(self.generators + other.generators)

    def normal(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Independent standard normal numbers, (B, *shape).

        Args:
            shape: Shape of one item, without the batch.
            device: Where the result goes.
            dtype: Type of the result; the numbers are always sampled in float32, so that they are equal for all types.
        """
        items = [torch.randn(tuple(shape), generator=generator) for generator in self.generators]
        return torch.stack(items).to(device=device, dtype=dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Independent standard normal numbers in the shape, type and device of ``x``, (B, *).

        Raises:
            ValueError: If ``x`` has another number of items than this source.
        """
        if x.shape[0] != len(self):
            raise ValueError(f"{x.shape[0]} items, but noise for {len(self)}: give one seed per item")
        return self.normal(x.shape[1:], device=x.device, dtype=x.dtype)

    def uniform(self, count: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Independent numbers in [0, 1), (B, count) float64: in single precision some tokens could never be sampled."""
        items = [torch.rand(count, generator=generator, dtype=torch.float64) for generator in self.generators]
        return torch.stack(items).to(device)

"""Random numbers of a training step that belong to one sample: functions of (seed, step, sample, stream, place).

A counter-based generator has no state that advances: any worker can compute the numbers of any sample. So a step has
the same numbers whatever the number of workers and the size of the parts in which the batch is worked off. Numbers of
one call are computed together, on the device where they are needed: a generator for each sample would take longer than
the step of a small prior. Legend: B samples, N numbers of each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: steps of it spread evenly (Steele et al., 2014, SplitMix)."""
_WEYL = 0x9E3779B9
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
"""Shifts and factors of triple32 (C. Wellons, 2018): each bit of the input flips each bit of the output half the time,
to within 0.02 %."""
_LAST_SHIFT = 14
_HALF_WORD = 1 << 16

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class SampleRandom:
    """Random numbers of B samples, in streams with names: another name gives independent numbers.

    A stream gives the same numbers each time it is asked.
    """

    keys: Keys
    """(B,), one of each sample in its step."""

    @classmethod
    def of_samples(cls, seed: int, samples: range) -> SampleRandom:
        """The numbers of the samples with these places in the global batch; ``seed`` is that of the step."""
        places = np.arange(samples.start + 1, samples.stop + 1, samples.step, dtype=np.uint64)
        return cls(_mix64(np.uint64(seed % 2**64) + places * np.uint64(_GOLDEN)))

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, part: slice) -> SampleRandom:
        """The same numbers of some of the samples."""
        return SampleRandom(self.keys[part])

    def uniform(self, stream: str, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Numbers in [0, 1), float32, (B, *shape)."""
        words = _words(self.keys_of([stream], device)[0], math.prod(shape))
        return ((words >> 8) & 0xFFFFFF).mul(2.0**-24).view(len(self), *shape)

    def normal(self, stream: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, float32, (B, *shape), by Box and Muller; none is above 5.9."""
        size = math.prod(shape)
        half = (size + 1) // 2
        words = _words(self.keys_of([stream], device)[0], 2 * half)
        units = ((words >> 8) & 0xFFFFFF).mul(2.0**-24).add_(2.0**-25)  # in (0, 1)
        radius = units[:, :half].log().mul_(-2).sqrt_()
        angle = units[:, half:].mul_(2 * math.pi)
        numbers = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return numbers[:, :size].reshape(len(self), *shape)

    def normal_like(self, stream: str, x: Tensor) -> Tensor:
        """Standard normal numbers in the shape, type and place of ``x`` (B, ...)."""
        return self.normal(stream, x.shape[1:], x.device).to(x.dtype)

    def integers(self, stream: str, high: int) -> Tensor:
        """A whole number in 0 .. high - 1 for each sample, int64, (B,), on the CPU."""
        return self.seeds(stream) % high

    def keep(self, stream: str, drop_prob: float, device: torch.device) -> Tensor:
        """False with probability ``drop_prob``, bool, (B,)."""
        return (self.uniform(stream) >= drop_prob).to(device, non_blocking=True)

    def seeds(self, stream: str) -> Tensor:
        """A seed of 63 bits for each sample, for what needs a generator of its own, int64, (B,), on the CPU."""
        words = _mix64(self.keys ^ np.uint64(_stream_key(stream))) >> np.uint64(1)
        return torch.from_numpy(words.astype(np.int64))

    def keys_of(self, streams: Sequence[str], device: torch.device | str) -> Tensor:
        """Two words of each stream and sample, int32 (streams, B, 2), the second odd: what ``keep_mask`` needs."""
        names = np.asarray([_stream_key(stream) for stream in streams], dtype=np.uint64)
        words = _mix64(self.keys[None] ^ names[:, None]) | np.uint64(1 << 32)  # little endian: the odd word is second
        return torch.from_numpy(words.astype("<u8").view(np.int32).reshape(len(streams), len(self), 2)).to(device)


def keep_mask(keys: Tensor, drop_prob: float, num: int) -> Tensor:
    """False with probability ``drop_prob``, to 16 bits, (B, num); a word decides two places.

    Args:
        keys: One stream of ``SampleRandom.keys_of``, (B, 2).
        drop_prob: In [0, 1).
        num: N.
    """
    halves = _words(keys, (num + 1) // 2).view(torch.int16)[:, :num]
    return halves >= round(drop_prob * _HALF_WORD) - _HALF_WORD // 2


def _words(keys: Tensor, num: int) -> Tensor:
    """Words of 32 random bits, int32 (B, num): a function of the keys (B, 2) and the place."""
    places = torch.arange(1, num + 1, dtype=torch.int32, device=keys.device) * _signed(_WEYL)
    words = torch.bitwise_xor(places[None], keys[:, :1]).mul_(keys[:, 1:])
    for shift, factor in _ROUNDS:
        words = _shifted_xor(words, shift).mul_(_signed(factor))
    return _shifted_xor(words, _LAST_SHIFT)


def _shifted_xor(words: Tensor, shift: int) -> Tensor:
    """``words ^ (words >> shift)``; torch's shift of a negative number fills up with ones, which must not stay."""
    return words.bitwise_xor_((words >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _mix64(words: Keys) -> Keys:
    """SplitMix64's finaliser (Steele et al., 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=4096)
def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")

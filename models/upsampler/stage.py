"""An upsampler as a stage: pictures to larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.decoder.inpainting import keep_known
from models.diffusion.noise import NoiseSource
from models.stage import PIXELS, Batch, DiffusionStage
from models.upsampler.network import Upsampler


@dataclass(frozen=True, eq=False)
class UpsamplerStage(DiffusionStage):
    """Enlarges the pictures of the stage before; it has no guidance, as it was never trained without them."""

    network: Upsampler
    number: int = 0
    """Number of the upsampler, from 0: each has its own stream of a seed."""

    has_guidance: ClassVar[bool] = False

    @classmethod
    def of(cls, upsampler: Upsampler, number: int = 0) -> UpsamplerStage:
        """Create the stage with the settings of the network's own configuration."""
        return cls(upsampler, upsampler.config.sampler, f"upsampler_{number + 1}", number)

    @property
    def dims(self) -> None:
        """See ``Stage``."""

    @property
    def low_res_px(self) -> int:
        """See ``Stage``."""
        return self.network.config.low_res_px

    def noise(self, seeds: Sequence[int]) -> NoiseSource:
        """See ``DiffusionStage``."""
        return NoiseSource.from_seeds(seeds, f"upsampler-{self.number}")

    def begin(self, batch: Batch, noise: NoiseSource, *, guided: bool) -> tuple[Tensor, Tensor]:
        """See ``DiffusionStage``."""
        del guided
        return self.network.begin(batch.values[PIXELS], noise)

    def finish(self, batch: Batch, x: Tensor) -> Float[Tensor, "B 3 H W"]:
        """See ``DiffusionStage``."""
        return keep_known(batch.values, x)

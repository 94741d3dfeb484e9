"""The diffusion prior as a stage: captions to z_image; and what it shares with the autoregressive prior.

Legend: B captions; R = B candidates rows, the first candidate of every caption, then the second, and so on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise
from models.prior.network import Prior, PriorCondition
from models.request import SampleRequest
from models.rows import concat_rows
from models.stage import Z_IMAGE, Batch, Chain, DiffusionStage
from models.text import TextEncoding


@dataclass(frozen=True, eq=False)
class CandidateStage:
    """The part of every prior: sample ``num_candidates`` embeddings of each caption and keep the nearest to it."""

    network: Any
    sampler: Any
    name: str
    num_candidates: int = 1

    @classmethod
    def of(cls, prior: Any, name: str = "prior") -> Self:
        """Create the stage with the settings of the network's own configuration."""
        return cls(prior, prior.config.sampler, name, prior.config.num_candidates)

    @property
    def makes(self) -> str:
        """See ``Stage``."""
        return Z_IMAGE

    @property
    def side_px(self) -> None:
        """See ``Stage``."""

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Stage``."""
        return asdict(self.sampler) | {"num_candidates": self.num_candidates}

    def of_request(self, request: SampleRequest | None) -> Self:
        """The stage with as many candidates as a request has."""
        count = request.num_candidates if request else 0
        return replace(self, num_candidates=count) if count else self

    def noise(self, seeds: Sequence[int]) -> NoiseSource:
        """Noise of the first candidate of every seed, then of the second, and so on."""
        noise = NoiseSource(())
        for candidate in range(self.num_candidates):
            noise = noise + NoiseSource.from_seeds(seeds, f"prior-{candidate}")
        return noise

    def repeat(self, captions: TextEncoding) -> TextEncoding:
        """The captions of the first candidates, then of the second, and so on; R rows."""
        return concat_rows([captions] * self.num_candidates)

    def repeat_negative(self, batch: Batch) -> TextEncoding | None:
        """The captions that guidance leads away from, R rows; None: the empty caption."""
        return None if batch.negative is None else self.repeat(batch.negative)

    def keep_nearest(self, candidates: Float[Tensor, "R D"], text: TextEncoding) -> Float[Tensor, "B D"]:
        """The candidate of each caption that has the largest dot product with z_text."""
        candidates = candidates.view(-1, len(text), candidates.shape[1])
        best = (candidates * text.z_text).sum(2).argmax(0)
        return candidates[best, torch.arange(len(text), device=best.device)]


@dataclass(frozen=True, eq=False)
class PriorStage(CandidateStage, DiffusionStage):
    """The diffusion prior, which denoises its candidates together."""

    @property
    def x0_variance(self) -> Tensor | None:
        """See ``DiffusionStage``."""
        return self.network.x0_variance if self.network.x0_variance.any() else None

    def entry_kind(self, batch: Batch) -> tuple[Hashable, ...]:
        """See ``DiffusionStage``."""
        kind = super().entry_kind(batch)
        return (*kind, self.of_request(batch.request).num_candidates) if kind else ()

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``."""
        return DiffusionStage.enter(self.of_request(batch.request), batch, noise)

    def begin(self, batch: Batch, noise: NoiseSource, *, guided: bool) -> tuple[Tensor, PriorCondition]:
        """See ``DiffusionStage``."""
        text = self.repeat(batch.text)
        x = noise.normal((self.network.dims.embed_dim,), device=text.pooled.device)
        return x, self.encode(text, guided=guided, negative=self.repeat_negative(batch))

    def encode(self, text: TextEncoding, *, guided: bool, negative: TextEncoding | None = None) -> PriorCondition:
        """Captions as the prior reads them; if guided, after as many that guidance leads away from (default: empty)."""
        if guided:
            text = concat_rows([self.network.null_text.encoding(len(text)) if negative is None else negative, text])
        return self.network.encode_condition(text, cache=True)

    def finish(self, batch: Batch, x: Tensor) -> Float[Tensor, "B D"]:
        """See ``DiffusionStage``."""
        return self.keep_nearest(self.network.unscale(x), batch.text)


def prior_denoiser(prior: Prior, text: TextEncoding, guidance_scale: float = 1.0) -> Denoise:
    """The prior conditioned on captions, guided unless the scale is 1; the captions are encoded once, here."""
    stage = PriorStage(prior, SamplerConfig(), "prior")
    with torch.no_grad():
        condition = stage.encode(text, guided=guidance_scale != 1.0)
    return stage.denoiser(condition, [guidance_scale] * len(text))

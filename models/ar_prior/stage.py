"""The autoregressive prior as a stage: captions to z_image, one component of it at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import initial_tokens, sample_component
from models.clip_config import ClipDims
from models.diffusion.noise import NoiseSource
from models.prior.stage import candidate_noise, keep_nearest
from models.request import SampleRequest
from models.rows import concat_rows
from models.stage import Z_IMAGE, Batch, Chain, JoinedChains


@dataclass(frozen=True, eq=False)
class ArPriorStage:
    """Samples ``num_candidates`` embeddings of each caption and keeps the one nearest to it."""

    network: ArPrior
    sampler: TokenSamplerConfig
    name: str
    num_candidates: int = 1

    @classmethod
    def of(cls, prior: ArPrior, name: str = "prior") -> ArPriorStage:
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
    def low_res_px(self) -> None:
        """See ``Stage``."""

    @property
    def dims(self) -> ClipDims:
        """See ``Stage``."""
        return self.network.dims

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Stage``."""
        return asdict(self.sampler) | {"num_candidates": self.num_candidates}

    def eval(self) -> None:
        """See ``Stage``."""
        self.network.eval()

    def check(self, request: SampleRequest) -> None:
        """See ``Stage``."""
        self._sampler(request)

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``; a step is a component."""
        text = concat_rows([batch.text] * self.num_candidates)
        noise = candidate_noise(batch.seeds, self.num_candidates) if noise is None else noise
        state = initial_tokens(self.network, text, noise, self._sampler(batch.request))
        return Chain(batch, state, tuple(range(self.network.num_components)))

    def join(self, chains: Sequence[Chain]) -> JoinedChains:
        """See ``Stage``."""
        return _JoinedTokens(self, chains)

    def preview(self, chain: Chain) -> Float[Tensor, "R D"]:
        """See ``Stage``."""
        return self.network.detokenize(chain.state.tokens[:, : chain.position])

    def leave(self, chain: Chain) -> Float[Tensor, "B D"]:
        """See ``Stage``."""
        return keep_nearest(self.network.detokenize(chain.state.tokens), chain.batch.text)

    def _sampler(self, request: SampleRequest | None) -> TokenSamplerConfig:
        if request is None:
            return self.sampler
        if self.name in request.num_steps:
            raise ValueError(f"num_steps: {self.name} always samples {self.network.num_components} components")
        scale = request.guidance_scale.get(self.name)
        return self.sampler if scale is None else replace(self.sampler, guidance_scale=scale)


class _JoinedTokens:
    """Chains of the prior as parts of one state, which each step updates in place."""

    def __init__(self, stage: ArPriorStage, chains: Sequence[Chain]) -> None:
        self.chains = list(chains)
        self._stage = stage
        states = [chain.state for chain in chains]
        self._state = concat_rows(states)
        ends = accumulate(((len(state.dot), len(state.tokens)) for state in states), _add, initial=(0, 0))
        for chain, (begin, end) in zip(chains, pairwise(ends), strict=True):
            chain.state = self._state.part(slice(begin[0], end[0]), slice(begin[1], end[1]))

    def advance(self) -> None:
        """See ``JoinedChains``."""
        sample_component(self._stage.network, self._state, self._stage.sampler)
        for chain in self.chains:
            chain.position += 1


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]

"""The autoregressive prior as a stage: captions to z_image, one component of it at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.sampling import initial_tokens, sample_component
from models.clip_config import ClipDims
from models.diffusion.noise import NoiseSource
from models.prior.stage import CandidateStage
from models.request import SampleRequest
from models.rows import concat_rows
from models.stage import Batch, Chain, JoinedChains


@dataclass(frozen=True, eq=False)
class ArPriorStage(CandidateStage):
    """The autoregressive prior, whose step samples one component of every candidate."""

    @property
    def low_res_px(self) -> None:
        """See ``Stage``."""

    @property
    def dims(self) -> ClipDims:
        """See ``Stage``."""
        return self.network.dims

    def eval(self) -> None:
        """See ``Stage``."""
        self.network.eval()

    def check(self, request: SampleRequest) -> None:
        """See ``Stage``."""
        self._sampler(request)

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``; a step is a component."""
        stage, sampler = self.of_request(batch.request), self._sampler(batch.request)
        noise = stage.noise(batch.seeds) if noise is None else noise
        text, negative = stage.repeat(batch.text), stage.repeat_negative(batch)
        state = initial_tokens(self.network, text, noise, sampler, negative)
        return Chain(batch, state, tuple(range(self.network.num_components)))

    def join(self, chains: Sequence[Chain]) -> JoinedChains:
        """See ``Stage``."""
        return _JoinedTokens(self, chains)

    def preview(self, chain: Chain) -> Float[Tensor, "R D"]:
        """See ``Stage``."""
        return self.network.detokenize(chain.state.tokens[:, : chain.position])

    def leave(self, chain: Chain) -> Float[Tensor, "B D"]:
        """See ``Stage``."""
        return self.keep_nearest(self.network.detokenize(chain.state.tokens), chain.batch.text)

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
        # A chain that was put back to an earlier step says itself where it is; the tokens beyond are sampled anew.
        positions = [chain.position for chain, state in zip(chains, states, strict=True) for _ in state.tokens]
        position = torch.tensor(positions, device=states[0].position.device)
        self._state = replace(concat_rows(states), position=position)
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

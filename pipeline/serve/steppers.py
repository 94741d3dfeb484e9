"""One object for each network of the cascade, which takes pictures through it: what the engine calls in turn.

Diffusion networks go through ``stages.Stepper``; the autoregressive prior draws tokens, and does so here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import TokenState, join_token_states, start, step
from models.cascade import Cascade, CascadeSettings, prior_noise
from pipeline.serve.chains import Picture, Stepper, keep_best, make_stages


class AnyStepper(Protocol):
    """Takes pictures through one network."""

    def advance(self, pictures: Sequence[Picture]) -> None:
        """Take each picture one step further; one that was at its last step leaves the stage."""
        ...


@dataclass
class TokenChain:
    """One picture in the autoregressive prior, one chain for each candidate."""

    state: TokenState
    """A view of the joined chains while it is among them."""
    position: int = 0
    """Components drawn."""


class TokenStepper:
    """Draws one component of each picture at a time, wherever they stand.

    Args:
        prior: The network.
        config: How tokens are drawn.
        num_candidates: Embeddings drawn for each picture, of which the one nearest the caption is kept.
    """

    def __init__(self, prior: ArPrior, config: TokenSamplerConfig, num_candidates: int) -> None:
        self._prior = prior
        self._config = config
        self._num_candidates = num_candidates
        self._members: list[TokenChain] = []
        self._joined: TokenState | None = None

    def advance(self, pictures: Sequence[Picture]) -> None:
        """See ``AnyStepper``."""
        for picture in pictures:
            picture.chain = picture.chain or self._enter(picture)
        chains: list[TokenChain] = [picture.chain for picture in pictures]
        step(self._prior, self._join(chains), self._config)
        for picture, chain in zip(pictures, chains, strict=True):
            chain.position += 1
            if chain.position == self._prior.num_components:
                keep_best(picture, self._prior.detokenize(chain.state.tokens))
                picture.chain = None
                picture.stage += 1
                self._joined = None

    def _enter(self, picture: Picture) -> TokenChain:
        noise = prior_noise([picture.seed], self._num_candidates)
        text = picture.text.repeat_interleave(self._num_candidates)
        return TokenChain(start(self._prior, text, noise, self._config))

    def _join(self, chains: list[TokenChain]) -> TokenState:
        """The chains in one state; copied only when others come together than before."""
        same = len(chains) == len(self._members) and all(a is b for a, b in zip(chains, self._members, strict=True))
        if self._joined is None or not same:
            self._members, self._joined = chains, join_token_states([chain.state for chain in chains])
            for number, chain in enumerate(chains):
                rows = slice(number * self._num_candidates, (number + 1) * self._num_candidates)
                chain.state = self._joined[rows]
        return self._joined


def make_steppers(cascade: Cascade, settings: CascadeSettings) -> list[AnyStepper]:
    """The networks that a picture passes, in order.

    Raises:
        TypeError: If the settings are for the other kind of prior.
    """
    steppers: list[AnyStepper] = [Stepper(stage) for stage in make_stages(cascade, settings)]
    if isinstance(cascade.prior, ArPrior):
        config = settings.prior_as(TokenSamplerConfig)
        steppers.insert(0, TokenStepper(cascade.prior, config, settings.num_candidates))
    return steppers

"""Sampling an embedding from the autoregressive prior, token after token.

Every chain has its own random numbers, sampled before it starts. A token is the one at which the cumulative probability
passes its number: rounding, which differs between batches, can change a token to its neighbour, but not further.
Legend: B chains, R sequences (one of each chain, or two with guidance: [uncond, cond]), K components, V buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.diffusion.noise import NoiseSource
from models.layers.transformer import TokenCache
from models.rows import concat_rows, take_rows
from models.text import TextEncoding


def token_probs(logits: Float[Tensor, "B V"], config: TokenSamplerConfig) -> Float[Tensor, "B V"]:
    """Probabilities from which a token is sampled, float64: temperature, then top-k, then top-p."""
    probs = torch.softmax(logits.double() / config.temperature, dim=-1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    if config.top_k:
        ranked[:, config.top_k :] = 0
        ranked /= ranked.sum(-1, keepdim=True)
    if config.top_p < 1:
        # A token stays if those likelier than it do not reach top_p without it: the likeliest always does.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= config.top_p, 0)
        ranked /= ranked.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, order, ranked)


def sample_tokens(probs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token of each row at which the cumulative probability passes ``uniform`` (float64, in [0, 1))."""
    cumulative = probs.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]  # ends at exactly 1, which no number reaches
    return torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]


def guide_logits(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of logits: uncond + s (cond - uncond), (B, V)."""
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class TokenState:
    """B chains, each at its own component; changed in place by ``sample_component``."""

    cache: TokenCache
    """R sequences."""
    dot: Int[Tensor, " R"]
    """Token of the dot product that each sequence reads."""
    tokens: Int[Tensor, "B K"]
    """Sampled so far; zero beyond."""
    position: Int[Tensor, " B"]
    """Components sampled."""
    uniform: Float[Tensor, "B K"]
    """The chains' random numbers."""
    guidance_scale: Float[Tensor, " B"]
    """float64; 1 where a chain has one sequence."""

    def part(self, sequences: slice, chains: slice) -> TokenState:
        """Some of the chains with their sequences; they share memory, so a token sampled in one is in both."""
        of_chains = (self.tokens, self.position, self.uniform, self.guidance_scale)
        return TokenState(*take_rows((self.cache, self.dot), sequences), *take_rows(of_chains, chains))


def initial_tokens(
    prior: ArPrior,
    text: TextEncoding,
    noise: NoiseSource,
    config: TokenSamplerConfig,
    negative: TextEncoding | None = None,
) -> TokenState:
    """Chains before their first component: the captions are read, and the dot products sampled.

    Args:
        prior: The network.
        text: B captions.
        noise: B sources; each gives one number for the dot product and one for each component.
        config: How to sample; the same for all steps of a chain.
        negative: B captions that guidance leads away from; None: the empty caption.
    """
    device, size, num_dots = text.pooled.device, len(text), prior.config.num_dot_buckets
    uniform = noise.uniform(1 + prior.num_components, device=device)
    # The buckets are equally frequent, so a quantile of the training data is a place among them.
    lowest = config.min_dot_quantile
    dot = ((lowest + (1 - lowest) * uniform[:, 0]) * num_dots).long().clamp(max=num_dots - 1)
    if config.guidance_scale != 1:
        both = concat_rows([prior.null_text.encoding(size) if negative is None else negative, text])
        pairs = torch.arange(2 * size, device=device).view(2, size).T.flatten()
        text, dot = both[pairs], torch.stack([torch.full_like(dot, num_dots), dot], dim=1).flatten()
    with torch.no_grad():
        cache = prior.start(prior.encode_condition(text))
    tokens = dot.new_zeros(size, prior.num_components)
    scale = torch.full((size,), config.guidance_scale, dtype=torch.float64, device=device)
    return TokenState(cache, dot, tokens, dot.new_zeros(size), uniform[:, 1:], scale)


@torch.no_grad()
def sample_component(prior: ArPrior, state: TokenState, config: TokenSamplerConfig) -> None:
    """Sample the next component of every chain, in place; none may be at its end.

    The guidance scale is that of ``state``; the other settings are those of ``config``.
    """
    rows = torch.arange(len(state.tokens), device=state.tokens.device)
    is_guided = (state.guidance_scale != 1).long()
    cond = (1 + is_guided).cumsum(0) - 1  # number of each chain's last sequence
    chain = rows.repeat_interleave(1 + is_guided, output_size=len(state.dot))
    position = state.position[chain]
    before = state.tokens[rows, (state.position - 1).clamp(min=0)]
    last = torch.where(position == 0, state.dot, before[chain])
    logits = prior.next_logits(state.cache, last, position)
    # A chain with one sequence is its own uncond: the difference is zero.
    logits = guide_logits(logits[cond - is_guided], logits[cond], state.guidance_scale[:, None].to(logits))
    state.tokens[rows, state.position] = sample_tokens(token_probs(logits, config), state.uniform[rows, state.position])
    state.position.add_(1)


def iterate_embeddings(
    prior: ArPrior, text: TextEncoding, noise: NoiseSource, config: TokenSamplerConfig
) -> Iterator[Float[Tensor, "B D"]]:
    """One z_image for each caption, of length one, after each component; the last is the sample.

    Args:
        prior: The network.
        text: B captions.
        noise: B sources.
        config: How to sample.
    """
    state = initial_tokens(prior, text, noise, config)
    for done in range(1, prior.num_components + 1):
        sample_component(prior, state, config)
        yield prior.detokenize(state.tokens[:, :done])

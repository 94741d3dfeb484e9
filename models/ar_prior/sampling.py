"""Drawing an embedding from the autoregressive prior, token after token.

Every chain has its own random numbers, drawn before it starts, and a token is the one at which the cumulative
probability passes its number: rounding, which differs from batch to batch, can move it to the next value, not further.
Legend: B chains, R sequences (R = B, or 2 B with guidance: [uncond, cond] of each), K components, V buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.diffusion.noise import NoiseSource
from models.layers.transformer import TokenCache, join_token_caches
from models.text import TextEncoding, concat_text


def token_probs(logits: Float[Tensor, "B V"], config: TokenSamplerConfig) -> Float[Tensor, "B V"]:
    """Probabilities from which a token is drawn, float64: temperature, then top-k, then top-p."""
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


def draw_tokens(probs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token of each row at which the cumulative probability passes ``uniform`` (float64, in [0, 1))."""
    cumulative = probs.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]  # ends at exactly 1, which no number reaches
    return torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]


def guide_logits(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of logits: uncond + s (cond - uncond), (B, V)."""
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class TokenState:
    """B chains, each at its own component; changed in place by ``step``."""

    cache: TokenCache
    """R sequences."""
    dot: Int[Tensor, " R"]
    """Token of the dot product that each sequence is told."""
    tokens: Int[Tensor, "B K"]
    """Drawn so far; zero beyond."""
    position: Int[Tensor, " B"]
    """Components drawn."""
    uniform: Float[Tensor, "B K"]
    """The chains' random numbers."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TokenState:
        """Some of the chains; the same memory."""
        per_chain = len(self.dot) // len(self)
        pair = slice(rows.start * per_chain, rows.stop * per_chain)
        return TokenState(self.cache[pair], self.dot[pair], self.tokens[rows], self.position[rows], self.uniform[rows])


def join_token_states(parts: Sequence[TokenState]) -> TokenState:
    """Chains of several batches in one, copied; all guided, or none."""
    return TokenState(
        join_token_caches([part.cache for part in parts]),
        torch.cat([part.dot for part in parts]),
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.position for part in parts]),
        torch.cat([part.uniform for part in parts]),
    )


def start(prior: ArPrior, text: TextEncoding, noise: NoiseSource, config: TokenSamplerConfig) -> TokenState:
    """Chains before their first component: the captions are read, and the dot products drawn.

    Args:
        prior: The network.
        text: B captions.
        noise: B sources; each gives one number for the dot product and one for each component.
        config: How to draw; the same for all steps of a chain.
    """
    device, size, num_dots = text.pooled.device, len(text), prior.config.num_dot_buckets
    uniform = noise.uniform(1 + prior.num_components, device=device)
    # The buckets are equally frequent, so a quantile of the training data is a place among them.
    lowest = config.min_dot_quantile
    dot = ((lowest + (1 - lowest) * uniform[:, 0]) * num_dots).long().clamp(max=num_dots - 1)
    if config.guidance_scale != 1:
        both = concat_text([prior.null_text.encoding(size), text])
        pairs = torch.arange(2 * size, device=device).view(2, size).T.flatten()
        text, dot = both[pairs], torch.stack([torch.full_like(dot, num_dots), dot], dim=1).flatten()
    with torch.no_grad():
        cache = prior.start(prior.encode_condition(text))
    tokens = dot.new_zeros(size, prior.num_components)
    return TokenState(cache, dot, tokens, dot.new_zeros(size), uniform[:, 1:])


@torch.no_grad()
def step(prior: ArPrior, state: TokenState, config: TokenSamplerConfig) -> None:
    """Draw the next component of every chain, in place; none may be at its end."""
    size, rows = len(state), torch.arange(len(state), device=state.tokens.device)
    per_chain = len(state.dot) // size
    before = state.tokens[rows, (state.position - 1).clamp(min=0)]
    position = state.position.repeat_interleave(per_chain)
    last = torch.where(position == 0, state.dot, before.repeat_interleave(per_chain))
    logits = prior.next_logits(state.cache, last, position)
    if per_chain == 2:
        uncond, cond = logits.view(size, 2, -1).unbind(1)
        logits = guide_logits(uncond, cond, config.guidance_scale)
    drawn = draw_tokens(token_probs(logits, config), state.uniform[rows, state.position])
    state.tokens[rows, state.position] = drawn
    state.position.add_(1)


def iterate_embeddings(
    prior: ArPrior, text: TextEncoding, noise: NoiseSource, config: TokenSamplerConfig
) -> Iterator[Float[Tensor, "B D"]]:
    """One z_image for each caption, of length one, after each component; the last is the sample.

    Args:
        prior: The network.
        text: B captions.
        noise: B sources.
        config: How to draw.
    """
    state = start(prior, text, noise, config)
    for done in range(1, prior.num_components + 1):
        step(prior, state, config)
        yield prior.detokenize(state.tokens[:, :done])

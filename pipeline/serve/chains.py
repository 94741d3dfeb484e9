"""The cascade one step at a time, for pictures that stand at different steps.

models.cascade draws a batch from beginning to end; a server cannot wait for that. Here each picture carries its own
chain, and one call of a network takes any pictures of the same stage one step further, wherever they stand. A picture
comes out as ``Cascade.sample`` would draw it alone with its seed, to the rounding of a batched matrix product.

Legend: a picture has R rows in a stage: the prior draws R candidates for it, every other stage has R = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.cascade import Cascade, CascadeSettings, prior_noise
from models.decoder.network import DecoderCondition, concat_decoder_conditions
from models.diffusion.config import SamplerConfig
from models.diffusion.guidance import classifier_free
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import config_timesteps, make_step
from models.diffusion.steps import SamplerState, join_states, start
from models.prior.network import Prior, PriorCondition, concat_prior_conditions
from models.text import TextEncoding


@dataclass
class Chain:
    """One picture in one stage."""

    state: SamplerState
    """R rows."""
    condition: Any
    """What the network reads, R rows."""
    noise: NoiseSource
    """R sources."""
    position: int = 0
    """Steps taken."""


@dataclass
class Picture:
    """One picture on its way through the cascade."""

    prompt: str
    seed: int
    text: TextEncoding
    """Its caption, one row."""
    stage: int = 0
    """Number of the stage that it is in, or has to enter."""
    chain: Any = None
    """Where it stands there, as that stage's stepper keeps it; None before the first step."""
    z_image: Tensor = field(default_factory=lambda: torch.empty(0))
    """(1, D), once the prior is through."""
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    """(1, 3, H, W) in [-1, 1], of the largest stage that is through."""


class Stage(Protocol):
    """One network of the cascade and how it is sampled."""

    name: str
    config: SamplerConfig
    diffusion: Diffusion
    timesteps: tuple[int, ...]
    """Visited in turn; after the last comes the clean sample."""
    x0_variance: Tensor | None

    def enter(self, picture: Picture) -> Chain:
        """The picture's chain before its first step."""
        ...

    def denoiser(self, conditions: Sequence[Any]) -> Denoise:
        """The network under the conditions of several pictures, guided."""
        ...

    def leave(self, picture: Picture, x: Tensor) -> None:
        """Hand the finished rows to the picture."""
        ...


class PriorStage:
    """Caption to z_image: of the candidates, the one nearest the caption is kept."""

    name = "prior"

    def __init__(self, prior: Prior, settings: CascadeSettings) -> None:
        self.prior = prior
        self.config = settings.prior_as(SamplerConfig)
        self.num_candidates = settings.num_candidates
        self.diffusion = Diffusion(self.prior.config.diffusion)
        self.timesteps = config_timesteps(self.config, self.diffusion)
        self.x0_variance = self.prior.x0_variance if self.prior.x0_variance.any() else None

    def enter(self, picture: Picture) -> Chain:
        """See ``Stage``."""
        noise = prior_noise([picture.seed], self.num_candidates)
        x = noise.normal((self.prior.dims.embed_dim,), device=picture.text.pooled.device)
        text = picture.text.repeat_interleave(self.num_candidates)
        return Chain(start(x, self.diffusion), self.prior.encode_condition(text, cache=True), noise)

    def denoiser(self, conditions: Sequence[PriorCondition]) -> Denoise:
        """See ``Stage``."""
        guided = self.config.guidance_scale != 1.0
        nulls = [self.prior.null_condition(len(one), cache=True) for one in conditions] if guided else []
        condition = concat_prior_conditions([*nulls, *conditions])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.prior(x, t, condition)

        return classifier_free(denoise, self.config.guidance_scale) if guided else denoise

    def leave(self, picture: Picture, x: Tensor) -> None:
        """See ``Stage``."""
        keep_best(picture, self.prior.unscale(x))


class DecoderStage:
    """z_image and caption to the smallest picture."""

    name = "decoder"
    x0_variance: Tensor | None = None

    def __init__(self, cascade: Cascade, settings: CascadeSettings) -> None:
        self.cascade = cascade
        self.decoder = cascade.decoder
        self.config = settings.decoder
        self.diffusion = Diffusion(self.decoder.config.diffusion)
        self.timesteps = config_timesteps(self.config, self.diffusion)

    def enter(self, picture: Picture) -> Chain:
        """See ``Stage``."""
        noise = NoiseSource.from_seeds([picture.seed], "decoder")
        side_px = self.decoder.config.image_px
        x = noise.normal((3, side_px, side_px), device=picture.z_image.device)
        condition = self.decoder.encode_condition(picture.z_image, picture.text)
        return Chain(start(x, self.diffusion), condition, noise)

    def denoiser(self, conditions: Sequence[DecoderCondition]) -> Denoise:
        """See ``Stage``."""
        config, condition = self.config, concat_decoder_conditions(conditions)
        return self.cascade.denoiser(condition, config.guidance_scale, config.clip_guidance_scale)

    def leave(self, picture: Picture, x: Tensor) -> None:
        """See ``Stage``."""
        picture.pixels = x


class UpsamplerStage:
    """A picture to a larger one."""

    x0_variance: Tensor | None = None

    def __init__(self, cascade: Cascade, settings: CascadeSettings, number: int) -> None:
        self.upsampler = cascade.upsamplers[number]
        self.config = settings.upsamplers[number]
        self.name = f"upsampler_{number + 1}"
        self.stream = f"upsampler-{number}"
        self.diffusion = Diffusion(self.upsampler.config.diffusion)
        self.timesteps = config_timesteps(self.config, self.diffusion)

    def enter(self, picture: Picture) -> Chain:
        """See ``Stage``."""
        noise = NoiseSource.from_seeds([picture.seed], self.stream)
        x, condition = self.upsampler.begin(picture.pixels, noise)
        return Chain(start(x, self.diffusion), condition, noise)

    def denoiser(self, conditions: Sequence[Tensor]) -> Denoise:
        """See ``Stage``."""
        condition = torch.cat(list(conditions))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.upsampler(x, t, condition)

        return denoise

    def leave(self, picture: Picture, x: Tensor) -> None:
        """See ``Stage``."""
        picture.pixels = x


def make_stages(cascade: Cascade, settings: CascadeSettings) -> tuple[Stage, ...]:
    """The stages of diffusion that a picture passes, in order; an autoregressive prior is none."""
    prior = [PriorStage(cascade.prior, settings)] if isinstance(cascade.prior, Prior) else []
    upsamplers = [UpsamplerStage(cascade, settings, number) for number in range(len(settings.upsamplers))]
    return (*prior, DecoderStage(cascade, settings), *upsamplers)


def keep_best(picture: Picture, candidates: Tensor) -> None:
    """Give a picture the candidate (R, D) that is nearest its caption."""
    best = int((candidates * picture.text.z_text).sum(1).argmax())
    picture.z_image = candidates[best : best + 1]


class Stepper:
    """Takes pictures through one stage; keeps the joined conditions while the same pictures come again."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._joined: tuple[list[Chain], Denoise] | None = None

    def advance(self, pictures: Sequence[Picture]) -> None:
        """Take each picture one step further; one that was at its last step leaves the stage.

        Args:
            pictures: All in this stage, at any steps.
        """
        stage = self.stage
        for picture in pictures:
            picture.chain = picture.chain or stage.enter(picture)
        chains: list[Chain] = [picture.chain for picture in pictures]
        denoise = self._denoiser(chains)
        state = join_states([chain.state for chain in chains])
        noise = NoiseSource(generator for chain in chains for generator in chain.noise.generators)
        timesteps = (*stage.timesteps, -1)
        rows = [(chain.position, len(chain.noise)) for chain in chains]
        t = _per_row([(timesteps[position], count) for position, count in rows], state.x)
        t_prev = _per_row([(timesteps[position + 1], count) for position, count in rows], state.x)
        step = make_step(stage.config, noise, x0_variance=stage.x0_variance)
        state = step(denoise, state, t, t_prev, stage.diffusion)
        self._hand_out(pictures, chains, state)

    def _hand_out(self, pictures: Sequence[Picture], chains: list[Chain], state: SamplerState) -> None:
        first = 0
        for picture, chain in zip(pictures, chains, strict=True):
            part = slice(first, first + len(chain.noise))
            first = part.stop
            chain.state = SamplerState(state.x[part], state.x0[part], state.t_last[part])
            chain.position += 1
            if chain.position == len(self.stage.timesteps):
                self.stage.leave(picture, chain.state.x)
                picture.chain = None
                picture.stage += 1
                self._joined = None

    def _denoiser(self, chains: list[Chain]) -> Denoise:
        known = self._joined
        if known and len(known[0]) == len(chains) and all(a is b for a, b in zip(known[0], chains, strict=True)):
            return known[1]
        denoise = self.stage.denoiser([chain.condition for chain in chains])
        self._joined = (chains, denoise)
        return denoise


def _per_row(counted: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Each value ``count`` times, (sum of counts,) int64 on the device of ``like``."""
    values = [value for value, count in counted for _ in range(count)]
    return torch.tensor(values, dtype=torch.int64, device=like.device)

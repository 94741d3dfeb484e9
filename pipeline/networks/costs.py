"""What a recipe asks for before anything runs: parameters, arithmetic and memory of each network.

The networks are built and run on torch's meta device, which knows shapes and types and computes nothing: the 3.5B
decoder of the paper is counted in seconds on a laptop. A multiplication and an addition count as two operations; matrix
products, convolutions and attention are counted, element-wise work (a few percent) is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.ar_prior.network import ArPrior
from models.cascade import decoder_denoiser, prior_denoiser
from models.clip_config import ClipDims
from models.decoder.network import Decoder
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import config_timesteps
from models.layers.transformer import TokenCache
from models.noisy_clip.network import NoisyClip
from models.prior.network import Prior
from models.text import TextEncoding
from models.upsampler.network import Upsampler
from pipeline.clip import OpenClip, create_clip, describe_clip
from pipeline.errors import ConfigError
from pipeline.networks.counting import Counter, FlashLikeAttention, Kept
from pipeline.networks.files import build_network
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import (
    NetworkStepConfig,
    NoisyClipStepConfig,
    TrainConfig,
    TrainResources,
)

Json = dict[str, Any]

UTILISATION = 0.4
"""Share of a GPU's peak that a good training reaches: an assumption, for the hours."""
PEAK_FLOPS = {"a100": 312e12, "h100": 989e12}
"""Dense bfloat16 peak of the GPUs that the hours are told for, in operations per second."""
_FLOAT32_BYTES = 4
_COUNTED = 2
"""Samples in the batch that is counted; one would be too few for the batch norms of CLIP's ResNet."""
_OPTIMIZER_STATES = 2
"""AdamW keeps two moments for each parameter."""


@dataclass(frozen=True)
class NetworkCost:
    """What one network costs; bytes are for one worker."""

    name: str
    num_parameters: int
    """Those that are trained (of a frozen CLIP: all)."""
    training_flops: float
    """Forward and backward of one sample; 0 where the network is not trained."""
    num_samples: int
    """Batch times steps; 0 where the network is not trained."""
    sampling_flops: float
    """All network calls for one result: a picture, or an embedding with its candidates. CLIP: one picture embedded."""
    num_calls: int
    """Network calls of one chain; guidance doubles the items of each."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activations_bytes: int
    """Kept for the backward pass for this worker's share of the batch, in float32; under bfloat16 the inputs of matrix
    products take half of it, those of norms do not. The kernels' workspaces come on top."""

    @property
    def training_bytes(self) -> int:
        """All that a worker holds while it trains this network, less the frozen CLIP and the kernels' workspaces."""
        state = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.average_bytes
        return state + self.activations_bytes

    def hours(self, gpu: str) -> float:
        """GPU hours of the whole training at ``UTILISATION``."""
        return self.training_flops * self.num_samples / (PEAK_FLOPS[gpu] * UTILISATION) / 3600

    def to_dict(self) -> Json:
        """All fields, the totals and the hours."""
        hours = {f"{gpu}_hours": self.hours(gpu) for gpu in PEAK_FLOPS}
        return asdict(self) | {"training_bytes": self.training_bytes} | hours


def recipe_costs(recipe: Recipe) -> list[NetworkCost]:
    """Cost of every network of a recipe, in the order of the cascade.

    Raises:
        ConfigError: If the shape of the recipe's pretrained CLIP is not known on this machine.
    """
    with torch.device("meta"), FlashLikeAttention():
        clip = _build_clip(recipe)
        costs = [_clip_cost(recipe, clip)]
        for name, section in (("prior", recipe.prior), ("prior_2", recipe.prior_2)):
            if section is not None:
                costs.append(_prior_cost(name, build_network(section.model, clip.dims), section))
        costs.append(_decoder_cost(recipe, Decoder(recipe.decoder.model, clip.dims)))
        if recipe.noisy_clip is not None:
            costs.append(_noisy_clip_cost(NoisyClip(recipe.noisy_clip.model, clip.dims), recipe.noisy_clip))
        for name, section in (("upsampler_1", recipe.upsampler_1), ("upsampler_2", recipe.upsampler_2)):
            if section is not None:
                costs.append(_upsampler_cost(name, Upsampler(section.model), section))
    return costs


def format_costs(costs: list[NetworkCost]) -> str:
    """The costs as a table for a terminal."""
    names = ("network", "parameters", "training", "samples", "A100 h", "H100 h", "sampling", "state", "activations")
    widths = (11, 12, 12, 9, 9, 9, 12, 10, 12)
    rows = [names, *(_cells(cost) for cost in costs)]
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [
        f"training: forward and backward of one sample; hours: all samples at {UTILISATION:.0%} of the bfloat16 peak.",
        "sampling: all network calls for one result; clip: one picture embedded.",
        "state: weights, gradients, two moments and the average, float32, for each worker; activations: for its share",
        "of the batch, in float32 too. The frozen CLIP and the kernels' workspaces come on top.",
    ]
    return "\n".join(lines)


def _cells(cost: NetworkCost) -> tuple[str, ...]:
    state = cost.training_bytes - cost.activations_bytes
    training = ("frozen", "", "", "")
    if cost.num_samples:
        hours = (f"{cost.hours(gpu):,.3g}" for gpu in PEAK_FLOPS)
        training = (f"{_short(cost.training_flops)}FLOP", _short(cost.num_samples), *hours)
    memory = (f"{_short(state)}B", f"{_short(cost.activations_bytes)}B")
    return (cost.name, _short(cost.num_parameters), *training, f"{_short(cost.sampling_flops)}FLOP", *memory)


def _build_clip(recipe: Recipe) -> OpenClip:
    section = recipe.clip
    if section.source == "train":
        return create_clip(section.model)
    is_folder = Path(section.name).is_dir()
    try:
        return describe_clip(f"local-dir:{section.name}" if is_folder else section.name)
    except ValueError as error:
        raise ConfigError(f"clip.name: {error}") from error


def _clip_cost(recipe: Recipe, clip: OpenClip) -> NetworkCost:
    section = recipe.clip
    images = torch.zeros(1, 3, clip.image_px, clip.image_px)
    tokens = torch.zeros(1, clip.dims.context_length, dtype=torch.int64)
    clip.model.eval()
    embedding = _count(lambda: clip.model.encode_image(images))
    if section.source == "pretrained":
        return _frozen("clip", clip.model, embedding)

    def run(size: int) -> Tensor:
        image, text, *_ = clip.model(images.expand(size, -1, -1, -1), tokens.expand(size, -1))
        return image.sum() + text.sum()

    return _trained("clip", clip.model, run, section.train, section.resources, (embedding, 1))


def _prior_cost(name: str, prior: nn.Module, section: NetworkStepConfig[Any]) -> NetworkCost:
    if isinstance(prior, ArPrior):
        return _ar_prior_cost(name, prior, section)
    assert isinstance(prior, Prior)
    config, dims = prior.config, prior.dims

    def run(size: int) -> Tensor:
        condition = prior.encode_condition(_text(dims, size))
        return prior(torch.zeros(size, dims.embed_dim), _steps(size), condition).sum()

    def denoiser() -> Denoise:
        return prior_denoiser(prior, _text(dims, 1), config.sampler.guidance_scale)

    x = torch.zeros(1, dims.embed_dim)
    flops, calls = _sampling(prior, denoiser, x)
    return _trained(name, prior, run, section.train, section.resources, (flops * config.num_candidates, calls))


def _ar_prior_cost(name: str, prior: ArPrior, section: NetworkStepConfig[Any]) -> NetworkCost:
    """Where the recipe leaves the number of components to the data, all of them are counted."""
    config, calls = prior.config, prior.num_components
    caches: list[TokenCache] = []

    def run(size: int) -> Tensor:
        tokens = torch.zeros(size, calls, dtype=torch.int64)
        return prior(tokens, _steps(size), prior.encode_condition(_text(prior.dims, size))).sum()

    with torch.no_grad():
        before = _count(lambda: caches.append(prior.start(prior.encode_condition(_text(prior.dims, 1)))))
        flops = before + calls * _count(lambda: prior.next_logits(caches[0], _steps(1), _steps(1)))
    sequences = config.num_candidates * (1 if config.sampler.guidance_scale == 1 else 2)
    return _trained(name, prior, run, section.train, section.resources, (flops * sequences, calls))


def _decoder_cost(recipe: Recipe, decoder: Decoder) -> NetworkCost:
    config, dims = decoder.config, decoder.dims
    shape = (3, config.image_px, config.image_px)

    def run(size: int) -> Tensor:
        condition = decoder.encode_condition(torch.zeros(size, dims.embed_dim), _text(dims, size))
        return decoder(torch.zeros(size, *shape), _steps(size), condition).sum()

    def denoiser() -> Denoise:
        z_image = torch.zeros(1, dims.embed_dim)
        return decoder_denoiser(decoder, z_image, _text(dims, 1), config.sampler.guidance_scale)

    sampling = _sampling(decoder, denoiser, torch.zeros(1, *shape))
    section = recipe.decoder
    return _trained("decoder", decoder, run, section.train, section.resources, sampling)


def _noisy_clip_cost(network: NoisyClip, section: NoisyClipStepConfig) -> NetworkCost:
    """``sampling``: one call and its gradient, which every guided step of the decoder adds."""
    side_px = network.config.image_px

    def run(size: int) -> Tensor:
        return network(torch.zeros(size, 3, side_px, side_px), _steps(size)).sum()

    def led() -> None:
        x = torch.zeros(1, 3, side_px, side_px, requires_grad=True)
        torch.autograd.grad(network(x, _steps(1)).sum(), x)

    network.eval().requires_grad_(requires_grad=False)
    flops = _count(led)
    network.requires_grad_(requires_grad=True)
    return _trained("noisy_clip", network, run, section.train, section.resources, (flops, 1))


def _upsampler_cost(name: str, network: Upsampler, section: NetworkStepConfig[Any]) -> NetworkCost:
    config = network.config

    def run(size: int) -> Tensor:
        crops = torch.zeros(size, 3, config.crop_px, config.crop_px)
        return network(crops, _steps(size), crops).sum()

    def denoiser() -> Denoise:
        condition = torch.zeros(1, 3, config.image_px, config.image_px)
        return lambda x, t: network(x, t, condition)

    x = torch.zeros(1, 3, config.image_px, config.image_px)
    sampling = _sampling(network, denoiser, x)
    return _trained(name, network, run, section.train, section.resources, sampling)


def _frozen(name: str, network: nn.Module, flops: float) -> NetworkCost:
    count = sum(parameter.numel() for parameter in network.parameters())
    weights = _FLOAT32_BYTES * count
    return NetworkCost(name, count, 0.0, 0, flops, 1, weights, 0, 0, 0, 0)


def _trained(
    name: str,
    network: nn.Module,
    run: Callable[[int], Tensor],
    train: TrainConfig,
    resources: TrainResources,
    sampling: tuple[float, int],
) -> NetworkCost:
    """Count a network in training.

    Args:
        name: Of its step.
        network: The network.
        run: (number of samples) -> something to differentiate.
        train: Batch, steps and precision.
        resources: Workers that share the batch.
        sampling: Operations of one result, and network calls of its chain.
    """
    count = sum(parameter.numel() for parameter in network.parameters())
    weights = _FLOAT32_BYTES * count
    flops, num_bytes = _training_pass(network, run)
    share = train.batch_size // resources.num_workers
    return NetworkCost(
        name=name,
        num_parameters=count,
        training_flops=flops,
        num_samples=train.batch_size * train.num_steps,
        sampling_flops=sampling[0],
        num_calls=sampling[1],
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_bytes=_OPTIMIZER_STATES * weights,
        average_bytes=weights,
        activations_bytes=round(num_bytes * share),
    )


def _training_pass(network: nn.Module, run: Callable[[int], Tensor]) -> tuple[float, float]:
    """Operations of a forward and a backward pass of one sample, and the bytes kept between them."""
    network.train()
    with Counter() as counter:
        with Kept(network) as kept:
            loss = run(_COUNTED)
        loss.backward()
    network.zero_grad(set_to_none=True)
    return counter.flops / _COUNTED, kept.num_bytes / _COUNTED


def _sampling(network: Prior | Decoder | Upsampler, make: Callable[[], Denoise], x: Tensor) -> tuple[float, int]:
    """Operations of a whole chain, and its network calls."""
    config, diffusion = network.config.sampler, Diffusion(network.config.diffusion)
    network.eval()
    calls = len(config_timesteps(config, diffusion))
    calls = 2 * calls - 1 if config.method == "heun" else calls
    made: list[Denoise] = []
    before = _count(lambda: made.append(make()))
    return before + calls * _count(lambda: made[0](x, _steps(1))), calls


def _count(run: Callable[[], object]) -> float:
    with Counter() as counter:
        run()
    return counter.flops


def _text(dims: ClipDims, size: int) -> TextEncoding:
    """Captions of full length."""
    length = dims.context_length
    return TextEncoding(
        pooled=torch.zeros(size, dims.embed_dim),
        hidden=torch.zeros(size, length, dims.text_width),
        mask=torch.ones(size, length, dtype=torch.bool),
        tokens=torch.zeros(size, length, dtype=torch.int64),
    )


def _steps(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


def _short(count: float) -> str:
    """A count for people: 950, 1.80M, 3.50G."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} "

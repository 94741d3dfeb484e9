"""The trained networks of a recipe, loaded as one cascade."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.ar_prior.network import ArPrior
from models.cascade import Cascade
from models.decoder.network import Decoder
from models.noisy_clip.network import NoisyClip
from models.prior.network import Prior
from models.upsampler.network import Upsampler
from pipeline.errors import DataError
from pipeline.networks.clip import load_text_artifact
from pipeline.networks.files import NetworkConfig, load_network
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import ClipStepConfig
from pipeline.workspace.store import Artifact


def load_cascade(
    artifacts: dict[str, Artifact],
    device: torch.device | str = "cpu",
    wanted: Mapping[str, NetworkConfig] | None = None,
) -> Cascade:
    """Load everything that draws pictures.

    Args:
        artifacts: By step name: ``clip``, ``prior``, ``decoder`` and, where the recipe has them, ``noisy_clip``,
            ``upsampler_1`` and ``upsampler_2``; others are not read.
        device: Where to.
        wanted: By step name, the recipe's configurations (`network_configs`): they say how each is sampled now.

    Raises:
        DataError: If an artifact is missing or damaged, or the networks do not fit together.
    """
    clip = load_text_artifact(artifacts["clip"], device)
    networks = {
        name: load_network(artifacts[name], device, (wanted or {}).get(name))
        for name in ("prior", "decoder", "noisy_clip", "upsampler_1", "upsampler_2")
        if name in artifacts
    }
    prior, decoder = networks.pop("prior"), networks.pop("decoder")
    noisy_clip = networks.pop("noisy_clip", None)
    upsamplers = [network for network in networks.values() if isinstance(network, Upsampler)]
    if not isinstance(prior, Prior | ArPrior) or not isinstance(decoder, Decoder) or len(upsamplers) < len(networks):
        kinds = {name: type(network).__name__ for name, network in networks.items()}
        raise DataError(f"the artifacts are not a cascade: {kinds}")
    try:
        return Cascade(clip, prior, decoder, upsamplers, noisy_clip if isinstance(noisy_clip, NoisyClip) else None)
    except ValueError as error:
        raise DataError(f"the networks do not fit together: {error}; run the recipe again") from error


def network_configs(recipe: Recipe) -> dict[str, NetworkConfig]:
    """The configuration of every network of a recipe but CLIP, by step name."""
    sections = recipe.trained().items()
    return {name: section.model for name, section in sections if not isinstance(section, ClipStepConfig)}


def with_prior(
    cascade: Cascade, artifact: Artifact, device: torch.device | str = "cpu", wanted: NetworkConfig | None = None
) -> Cascade:
    """The same cascade with another prior; the other networks are shared.

    Raises:
        DataError: If the artifact is damaged, no prior, or made for another CLIP.
    """
    prior = load_network(artifact, device, wanted)
    if not isinstance(prior, Prior | ArPrior):
        raise DataError(f"{artifact.uri}: holds a {type(prior).__name__}, not a prior; run the recipe again")
    try:
        return Cascade(cascade.clip, prior, cascade.decoder, cascade.upsamplers, cascade.noisy_clip)
    except ValueError as error:
        raise DataError(f"{artifact.uri}: {error}; run the recipe again") from error

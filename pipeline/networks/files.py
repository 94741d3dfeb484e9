"""Networks in artifacts: ``config.json`` beside ``model.safetensors``, and CLIP in open_clip's own layout.

open_clip takes longer to import than torch; it is imported where a CLIP is, so that upsamplers start without it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from pipeline.errors import DataError
from pipeline.recipe.recipe import SAMPLING, to_dict
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip import FrozenClip, FrozenText, OpenClip

SCHEMA_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"

Network = Prior | ArPrior | Decoder | NoisyClip | Upsampler
NetworkConfig = PriorConfig | ArPriorConfig | DecoderConfig | NoisyClipConfig | UpsamplerConfig
_CONFIGS: dict[str, type[Any]] = {
    "prior": PriorConfig,
    "ar_prior": ArPriorConfig,
    "decoder": DecoderConfig,
    "noisy_clip": NoisyClipConfig,
    "upsampler": UpsamplerConfig,
}


def build_network(config: NetworkConfig, dims: ClipDims) -> Network:
    """A network with random weights (of torch's global generator); an upsampler does not depend on CLIP's widths."""
    if isinstance(config, PriorConfig):
        return Prior(config, dims)
    if isinstance(config, ArPriorConfig):
        return ArPrior(config, dims)
    if isinstance(config, DecoderConfig):
        return Decoder(config, dims)
    if isinstance(config, NoisyClipConfig):
        return NoisyClip(config, dims)
    return Upsampler(config)


def save_network(
    artifact: Artifact, kind: str, config: NetworkConfig, dims: ClipDims | None, state_dict: dict[str, Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``; the same weights give the same bytes.

    Args:
        artifact: Where to.
        kind: ``prior``, ``ar_prior``, ``decoder``, ``noisy_clip`` or ``upsampler``.
        config: The network's configuration.
        dims: CLIP's widths; None for an upsampler.
        state_dict: The weights, on any device.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with artifact.write(WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    described = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": to_dict(config),
        "dims": None if dims is None else to_dict(dims),
    }
    artifact.write_json(CONFIG, described)


def load_network(
    artifact: Artifact, device: torch.device | str = "cpu", wanted: NetworkConfig | None = None
) -> Network:
    """Read what ``save_network`` wrote, in evaluation mode.

    Args:
        artifact: Where it stands.
        device: Where to.
        wanted: The recipe's configuration of it, which says how it is sampled now; None: as when it was trained.

    Raises:
        DataError: If a file is missing, of a newer schema, damaged, or the weights are not those of the configuration.
    """
    described: dict[str, Any] = artifact.read_json(CONFIG)
    where = f"{artifact.uri}/{CONFIG}"
    version, kind = described.get("schema_version"), str(described.get("kind"))
    if version != SCHEMA_VERSION or kind not in _CONFIGS:
        raise DataError(f"{where}: {kind} of schema version {version}; this unclip reads version {SCHEMA_VERSION}")
    try:
        config = TypeAdapter(_CONFIGS[kind]).validate_json(json.dumps(described["config"]))
        dims = TypeAdapter(ClipDims).validate_json(json.dumps(described["dims"] or {}))
        network = build_network(_sampled_as(cast("NetworkConfig", config), wanted), dims)
    except (ValidationError, ValueError, KeyError) as error:
        raise DataError(f"{where}: {error}; train the step again") from error
    path = artifact.path(WEIGHTS)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DataError(f"{path}: not the weights of {where}: {error}; remove {artifact.uri} and run again") from error
    return network.to(device).eval().requires_grad_(requires_grad=False)


def _sampled_as(config: NetworkConfig, wanted: NetworkConfig | None) -> NetworkConfig:
    """The configuration with the other's ways of sampling, where both are of one kind."""
    if type(wanted) is not type(config):
        return config
    names = [field.name for field in fields(config) if field.name in SAMPLING]
    return replace(config, **{name: getattr(wanted, name) for name in names})


def load_initial(network: Network, folder: str) -> None:
    """Give a new network the weights of ``folder``, an artifact or one that ``unclip import`` wrote.

    Raises:
        DataError: If they are not there, or of a network of another kind, shape, schedule or prediction.
    """
    found = load_network(Artifact(folder))
    ours, theirs = network.state_dict(), found.state_dict()
    differs = sorted(name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name))
    if differs:
        raise DataError(
            f"init_from {folder}: a {type(found).__name__} of another shape: {differs[0]} is "
            f"{_shape(theirs, differs[0])} there and {_shape(ours, differs[0])} in the recipe; "
            f"take `model` from {folder}/{CONFIG}"
        )
    meaning, their_meaning = _meaning(network), _meaning(found)
    for name in meaning:
        if meaning[name] != their_meaning[name]:
            raise DataError(
                f"init_from {folder}: was trained with {name} = {their_meaning[name]!r}, "
                f"the recipe says {meaning[name]!r}"
            )
    network.load_state_dict(theirs)


def _meaning(network: Network) -> dict[str, Any]:
    """What weights of the same shape may mean differently."""
    if isinstance(network, ArPrior):
        return {"bucket_range_std": network.config.bucket_range_std}
    process = network.config.diffusion
    names = ("schedule", "prediction", "num_timesteps")
    length = {"image_norm": network.config.image_norm} if isinstance(network, Prior | Decoder) else {}
    return length | {f"diffusion.{name}": getattr(process, name) for name in names}


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def save_clip_artifact(artifact: Artifact, clip: OpenClip) -> None:
    """Write CLIP in open_clip's ``local-dir:`` layout, the configuration last."""
    from pipeline.clip import CONFIG_FILE, WEIGHTS_FILE, save_clip

    with tempfile.TemporaryDirectory(prefix="unclip-") as name:
        folder = Path(name)
        save_clip(clip, folder)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            artifact.write_bytes(file, (folder / file).read_bytes())


def load_clip_artifact(artifact: Artifact, device: torch.device | str = "cpu") -> FrozenClip:
    """Read the frozen CLIP.

    Raises:
        DataError: If it is missing or damaged, or has no image tower.
    """
    from pipeline.clip import NO_IMAGE_TOWER, FrozenClip

    clip = load_text_artifact(artifact, device)
    if not isinstance(clip, FrozenClip):
        raise DataError(f"{artifact.uri}: {NO_IMAGE_TOWER}")
    return clip


def load_text_artifact(artifact: Artifact, device: torch.device | str = "cpu") -> FrozenText:
    """Read the frozen CLIP, with its image tower where it has one.

    Raises:
        DataError: If it is missing or damaged.
    """
    from pipeline.clip import CONFIG_FILE, WEIGHTS_FILE, freeze, load_clip

    config, weights = artifact.path(CONFIG_FILE), artifact.path(WEIGHTS_FILE)
    assert config.parent == weights.parent
    try:
        return freeze(load_clip(config.parent)).to(device)
    except ValueError as error:
        raise DataError(f"{artifact.uri}: {error}; remove it and run again") from error


def num_parameters(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())

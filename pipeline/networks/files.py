"""Networks in artifacts: ``config.json`` beside ``model.safetensors``; CLIP alone has another layout, in clip.py."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from models.clip_config import ClipDims
from pipeline.allocator import is_out_of_memory
from pipeline.errors import DataError
from pipeline.networks.table import kind_named, kind_of
from pipeline.networks.tensor_file import read_tensors, save_tensors
from pipeline.recipe.lineage import exported_weights
from pipeline.recipe.recipe import SAMPLING
from pipeline.recipe.tables import to_dict
from pipeline.workspace.store import Artifact, UserArtifact

SCHEMA_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"

NetworkConfig = Any
"""The configuration of a network: one of the types in table.py."""


def save_network(
    artifact: Artifact, config: NetworkConfig, dims: ClipDims | None, state_dict: dict[str, Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``; the same weights give the same bytes.

    Args:
        artifact: Where to write.
        config: The network's configuration.
        dims: CLIP's widths; None for a network whose shape does not depend on them.
        state_dict: The weights, on any device.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    artifact.write_whole(WEIGHTS, lambda path: save_tensors(tensors, path, {"format": "pt"}))
    artifact.write_json(CONFIG, config_content(config, dims))


def verified_files(artifact: Artifact) -> list[str]:
    """Names of the files that hold a network, after their checksums were compared with its manifest or its export.

    Raises:
        DataError: If one is damaged.
    """
    names = [name for name in artifact.names() if name.endswith((".json", ".safetensors"))]
    names = [name for name in names if "/" not in name and name != "manifest.json"]
    for name in names:
        artifact.verify(name)
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(weights) == 1 and artifact.manifest() is None and (exported := exported_weights(artifact)):
        path = artifact.path(weights[0])
        artifact.verify(weights[0], {"bytes": path.stat().st_size, "sha256": exported})
    return names


def network_content(network: nn.Module) -> dict[str, Any]:
    """What config.json says about a network; empty for one without a configuration."""
    config = getattr(network, "config", None)
    return {} if config is None else config_content(config, getattr(network, "dims", None))


def config_content(config: NetworkConfig, dims: ClipDims | None) -> dict[str, Any]:
    """config.json of a network with this configuration, on CLIP's widths if it depends on them."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind_of(config).name,
        "config": to_dict(config),
        "dims": None if dims is None else to_dict(dims),
    }


def load_network(
    artifact: Artifact, device: torch.device | str = "cpu", requested: NetworkConfig | None = None
) -> nn.Module:
    """Read what ``save_network`` wrote, in evaluation mode.

    Args:
        artifact: Where to read.
        device: Device to load to.
        requested: The recipe's configuration, whose sampler settings are taken; None: those of the training.

    Raises:
        DataError: If a file is missing, of a newer schema, damaged, of another kind than the recipe's, or its
            weights are not those of the configuration.
        MemoryError, RuntimeError: If memory does not suffice; see ``is_out_of_memory``.
    """
    where = f"{artifact.uri}/{CONFIG}"
    network = create_network(artifact.read_json(CONFIG), where, requested)
    path = artifact.path(WEIGHTS)
    try:
        network.load_state_dict(read_tensors(path))
    except (SafetensorError, RuntimeError, FileNotFoundError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{path}: not the weights of {where}: {error}; {artifact.mend()}") from error
    return network.to(device).eval().requires_grad_(requires_grad=False)


def create_network(content: dict[str, Any], where: str, requested: NetworkConfig | None = None) -> nn.Module:
    """A network with random weights, of which config.json says ``content``.

    Args:
        content: See ``network_content``.
        where: Where it stands, for messages.
        requested: See ``load_network``.

    Raises:
        DataError: If it is of a newer schema, damaged, or of another kind than the recipe's.
    """
    version, name = content.get("schema_version"), str(content.get("kind"))
    kind = kind_named(name)
    if version != SCHEMA_VERSION or kind is None:
        raise DataError(f"{where}: {name} of schema version {version}; this unclip reads version {SCHEMA_VERSION}")
    if requested is not None and kind is not kind_of(requested):
        raise DataError(f"{where}: a network of kind {name}, but the recipe's is of kind {kind_of(requested).name}")
    try:
        config = TypeAdapter(kind.config).validate_json(json.dumps(content["config"]))
        dims = TypeAdapter(ClipDims).validate_json(json.dumps(content["dims"] or {}))
        return kind.create(_sampled_as(config, requested), dims)
    except (ValidationError, ValueError, KeyError) as error:
        raise DataError(f"{where}: {error}; use the release that wrote it, or bring it back from a copy") from error


def _sampled_as(config: NetworkConfig, requested: NetworkConfig | None) -> NetworkConfig:
    """``config`` with the sampler settings of ``requested``, if there is one."""
    if requested is None:
        return config
    names = [field.name for field in fields(config) if field.name in SAMPLING]
    return replace(config, **{name: getattr(requested, name) for name in names})


def load_initial(network: nn.Module, folder: str) -> None:
    """Load into a new network the weights of ``folder``, an artifact or a folder that ``unclip import`` wrote.

    Raises:
        DataError: If they are missing, or of a network of another kind, shape, schedule or prediction.
    """
    copy_weights(load_network(UserArtifact(folder)), network, folder)


def copy_weights(other: nn.Module, network: nn.Module, source: str) -> None:
    """Load the weights of a trained network into a new one.

    Args:
        other: Where they are taken from.
        network: Where they are put.
        source: Where ``other`` was read, for messages.

    Raises:
        DataError: See ``load_initial``.
    """
    ours, theirs = network.state_dict(), other.state_dict()
    differs = sorted(name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name))
    if differs:
        raise DataError(
            f"init_from {source}: a {type(other).__name__} of another shape: {differs[0]} is "
            f"{_shape(theirs, differs[0])} there and {_shape(ours, differs[0])} in the recipe; "
            f"take `model` from {CONFIG} there, or from its recipe"
        )
    for name in kind_of(network.config).meaning:
        our_value, their_value = (attrgetter(name)(each.config) for each in (network, other))
        if our_value != their_value:
            raise DataError(
                f"init_from {source}: was trained with {name} = {their_value!r}, the recipe says {our_value!r}"
            )
    network.load_state_dict(theirs)


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def num_parameters(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())

"""The trained networks of a recipe, loaded as one cascade."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from models.cascade import Cascade, TextEncoder
from models.text import NullText
from pipeline.errors import DataError
from pipeline.networks.arithmetic import Arithmetic
from pipeline.networks.clip import load_text_artifact
from pipeline.networks.files import CONFIG, NetworkConfig, create_network, load_network
from pipeline.networks.table import NETWORKS, kind_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.workspace.store import Artifact


def load_cascade(
    artifacts: Mapping[str, Artifact],
    device: torch.device | str = "cpu",
    configs: Mapping[str, NetworkConfig] | None = None,
    clip: TextEncoder | None = None,
    steps: Collection[str] | None = None,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008  (it is frozen)
) -> Cascade:
    """Load all networks of a cascade.

    Args:
        artifacts: Artifacts by step name; those of other steps are not read.
        device: Device to load to.
        configs: The recipe's configurations by step name (`network_configs`), with the present sampler settings.
        clip: The frozen CLIP, if it is already loaded.
        steps: Steps whose networks are sampled here; of the others the shapes are made, and no weights read. None: all.
        arithmetic: How the networks compute; of those that diffuse.

    Raises:
        DataError: If an artifact is missing or damaged, or the networks do not fit together.
    """
    settings = configs or {}

    def load(name: str) -> nn.Module:
        if steps is None or name in steps:
            network = load_network(artifacts[name], device, settings.get(name))
            arithmetic.prepare(network, kind_of(network.config), device)
            return network
        return _shape_of(artifacts[name], settings.get(name), clip if "clip" in steps else None)

    if clip is None:
        clip = load_text_artifact(artifacts["clip"], device if steps is None or "clip" in steps else "meta")
    networks = {name: load(name) for name in CASCADE_STEPS if name in artifacts and name != "clip"}
    kinds = {name: kind_of(network.config) for name, network in networks.items()}
    try:
        # The rows of the table are in the order in which a picture passes their networks.
        order = sorted(networks, key=lambda name: (NETWORKS.index(kinds[name]), name))
        return Cascade(clip, [stage(name, networks) for name in order if (stage := kinds[name].stage) is not None])
    except ValueError as error:
        raise DataError(f"the networks do not fit together: {error}; run the recipe again") from error


def _shape_of(artifact: Artifact, requested: NetworkConfig | None, clip: TextEncoder | None) -> nn.Module:
    """A network without weights, on torch's meta device.

    Args:
        artifact: Its artifact, of which the configuration alone is read.
        requested: See ``load_network``.
        clip: The frozen CLIP, whose empty caption it has: the first stage of an edit reads it. None: it has none.

    Raises:
        DataError: As ``create_network``.
    """
    with torch.device("meta"):
        network = create_network(artifact.read_json(CONFIG), f"{artifact.uri}/{CONFIG}", requested)
    if clip is not None and hasattr(network, "null_text"):
        network.null_text = NullText(clip.dims)
        network.null_text.set(clip.encode_text([""]))
    return network.eval().requires_grad_(requires_grad=False)


def network_configs(recipe: Recipe) -> dict[str, NetworkConfig]:
    """The configuration of every network of a recipe, by step name."""
    return {name: section.model for name, section in recipe.trained().items()}

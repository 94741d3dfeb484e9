"""The table of networks: every kind that a recipe can train, each in the file of its name."""

from __future__ import annotations

from typing import Any

from pipeline.networks.ar_prior import AR_PRIOR
from pipeline.networks.clip import CLIP
from pipeline.networks.decoder import DECODER
from pipeline.networks.kind import AnyKind
from pipeline.networks.noisy_clip import NOISY_CLIP
from pipeline.networks.prior import PRIOR
from pipeline.networks.upsampler import UPSAMPLER

NETWORKS: tuple[AnyKind, ...] = (
    CLIP,
    PRIOR,
    AR_PRIOR,
    DECODER,
    NOISY_CLIP,
    UPSAMPLER,
)
_BY_CONFIG: dict[type[Any], AnyKind] = {kind.config: kind for kind in NETWORKS}
_BY_NAME = {kind.name: kind for kind in NETWORKS}


def kind_of(config: object) -> AnyKind:
    """The row of a configuration, by its type."""
    return _BY_CONFIG[type(config)]


def kind_named(name: str) -> AnyKind | None:
    """The row of ``kind`` in a config.json; None if this release has no such network."""
    return _BY_NAME.get(name)

"""A request to a cascade: one object, passed from the HTTP body to the stages that read it.

This file does not import torch, because the HTTP process builds requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SampleRequest:
    """Pictures of one prompt. Values by stage (prior, decoder, upsampler_1 ...) replace that stage's own settings."""

    prompt: str
    """What the pictures show."""
    seeds: tuple[int, ...]
    """One for each picture."""
    guidance_scale: Mapping[str, float] = field(default_factory=dict[str, float])
    """Classifier-free guidance, by stage; 1 is none."""
    num_steps: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sampler steps, by stage; evenly spaced, even if the stage's own ``respacing`` has sections."""
    negative_prompt: str = ""
    """What the pictures should not show: guidance leads away from this caption instead of the empty one. Stages without
    guidance do not read it."""
    side_px: int = 0
    """The cascade ends at its first stage whose pictures have at least this side, in pixels; 0: at its last stage."""

    def __post_init__(self) -> None:
        """Raise ValueError if there is nothing to sample."""
        if not self.seeds:
            raise ValueError("no seeds: give one for each picture")

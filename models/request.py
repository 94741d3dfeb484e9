"""What somebody asks a cascade for: one object, from the HTTP body to the stage that reads it.

Without torch, because the process that speaks HTTP builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SampleRequest:
    """Pictures of one prompt. What is keyed by stage (prior, decoder, upsampler_1 ...) replaces that stage's own."""

    prompt: str
    """What the pictures show."""
    seeds: tuple[int, ...]
    """One for each picture."""
    guidance_scale: Mapping[str, float] = field(default_factory=dict[str, float])
    """Classifier-free guidance, by stage; 1 is none."""
    num_steps: Mapping[str, int] = field(default_factory=dict[str, int])
    """Steps of the sampler, by stage, evenly strided where the stage's own are listed section by section."""

    def __post_init__(self) -> None:
        """Raise ValueError if there is nothing to sample."""
        if not self.seeds:
            raise ValueError("no seeds: give one for each picture")

"""A request to a cascade: one object, passed from the HTTP body to the stages that read it.

A request that edits pictures carries them as bytes. This file does not import torch or numpy, because the HTTP process
builds requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

WALK_STEPS = 50
"""Steps of an inversion, and of the DDIM that starts from it, unless a request has others."""


class EditError(ValueError):
    """The edit cannot be done with these pictures, texts or networks; says why.

    It stands here, without torch, because it is sent from the networks' process to that of HTTP.
    """


@dataclass(frozen=True)
class RawPicture:
    """A decoded picture."""

    width: int
    height: int
    levels: bytes = field(repr=False)
    """height * width * 3 levels of red, green and blue, row by row."""
    sha256: str = ""
    """Of the file that it was decoded from, for the records."""


@dataclass(frozen=True)
class RawMask:
    """Which pixels of a square picture are resampled."""

    side_px: int
    """Its own side: it may be another than the picture's."""
    cells: bytes = field(repr=False)
    """side_px * side_px bytes, row by row: 1 where the picture is resampled, else 0."""


@dataclass(frozen=True)
class Inpainting:
    """Resample a part of a square picture under the prompt; the rest stays as it is."""

    picture: RawPicture
    mask: RawMask


@dataclass(frozen=True)
class StartPicture:
    """Noise a picture and denoise it under the prompt (SDEdit, arXiv:2108.01073)."""

    picture: RawPicture
    strength: float
    """Share of the decoder's steps that are taken, in [0, 1]; above 0 at least one step. 0 is the picture itself."""


@dataclass(frozen=True)
class Variation:
    """Pictures with the z_image of a picture: arXiv:2204.06125, section 3.1."""

    picture: RawPicture
    eta: float | None = None
    """None: they start from noise of their own. A number: they start from the picture's x_T, and DDIM adds noise to it;
    0 is the reconstruction."""


@dataclass(frozen=True)
class Interpolation:
    """Frames from one picture to another: section 3.2."""

    pictures: tuple[RawPicture, RawPicture]
    shares: tuple[float, ...]
    """Place of each frame, from 0 to 1."""
    noise: Literal["slerp", "fixed"] = "slerp"
    """slerp: x_T is interpolated too, so that the ends are the reconstructions; fixed: x_T is the seed's noise."""


@dataclass(frozen=True)
class TextDiff:
    """Frames in which z_image is rotated from one text towards another: section 3.3."""

    picture: RawPicture
    source: str
    """What the picture shows."""
    target: str
    """What it should show."""
    thetas: tuple[float, ...]
    """Share of the rotation of each frame, from 0 to 1; 0 is the reconstruction."""


@dataclass(frozen=True)
class PcaReconstruction:
    """Frames of more and more principal components of a picture's z_image: section 4."""

    picture: RawPicture
    components: tuple[int, ...]
    """How many of them each frame has."""
    z_image: bytes = field(default=b"", repr=False)
    """The embedding of each frame, len(components) * D numbers of float32; empty until it is known."""


Edit = Inpainting | StartPicture | Variation | Interpolation | TextDiff | PcaReconstruction
Way = Interpolation | TextDiff | PcaReconstruction
"""Edits whose frames have one seed: only the embedding moves."""


def is_walk(edit: Edit | None) -> bool:
    """Whether the decoder is sampled by DDIM: from the noise that makes the picture, or from one noise for all."""
    return isinstance(edit, Way) or (isinstance(edit, Variation) and edit.eta is not None)


def is_untouched(edit: Edit | None) -> bool:
    """Whether a request's own picture is its answer, of which no network has made anything."""
    return isinstance(edit, StartPicture) and edit.strength == 0


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
    num_candidates: int = 0
    """Embeddings that a prior samples of each picture, of which it keeps the nearest to the prompt; 0: as the prior's
    own settings say. Stages without candidates do not read it."""
    edit: Edit | None = None
    """The pictures that it starts from; None: from the prompt alone."""
    timeout_s: float = 0.0
    """Longest time until the pictures are sampled, in seconds; 0: any. No stage reads it."""
    traceparent: str = ""
    """The span of the HTTP request, as W3C Trace Context writes it; empty: nothing is traced. No stage reads it."""

    @property
    def shows(self) -> str:
        """What the pictures are to show, in words: the prompt, or where a text-diff leads."""
        return self.edit.target if isinstance(self.edit, TextDiff) else self.prompt

    def __post_init__(self) -> None:
        """Raise ValueError if there is nothing to sample."""
        if not self.seeds:
            raise ValueError("no seeds: give one for each picture")

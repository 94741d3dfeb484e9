"""Requests that start from pictures: OpenAI's edits and variations, and the edits of the command line.

Each is one row of ``EDITS``: its body, its pictures, and the edit that they make. The body is a form, and the answer
has the form of a generation's (pipeline/serve/generation.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from models.request import (
    Edit,
    Inpainting,
    Interpolation,
    PcaReconstruction,
    StartPicture,
    TextDiff,
    Variation,
)
from pipeline.sampling.edit_options import NUM_COMPONENTS, evenly
from pipeline.serve.images import MAX_IMAGES, MAX_PROMPT_CHARS, PictureOptions, PromptOptions
from pipeline.serve.protocols import PictureModel
from pipeline.serve.uploads import Form, masked_picture, raw_picture
from pipeline.serve.web import ApiError

_STRENGTH = 0.6
_STRENGTH_OF_FIDELITY = {"low": _STRENGTH, "high": 0.4}
_NUM_FRAMES = 5
_MAX_COMPONENTS_CHARS = 100


class EditRequest(PromptOptions):
    """The body of ``POST /v1/images/edits``: with a mask inpainting, without one SDEdit."""

    input_fidelity: Literal["high", "low"] | None = None
    strength: float | None = Field(default=None, ge=0, le=1)


class VariationRequest(PictureOptions):
    """The body of ``POST /v1/images/variations``."""

    eta: float | None = Field(default=None, ge=0, le=1)


class ReconstructionRequest(PictureOptions):
    """The body of ``POST /v1/images/reconstructions``."""


class SdeditRequest(PromptOptions):
    """The body of ``POST /v1/images/sdedits``."""

    strength: float | None = Field(default=None, ge=0, le=1)


class InterpolationRequest(PictureOptions):
    """The body of ``POST /v1/images/interpolations``: frames from the first picture to ``share`` of the way."""

    default_n: ClassVar[int] = _NUM_FRAMES
    share: float | None = Field(default=None, ge=0, le=1)
    noise: Literal["slerp", "fixed"] | None = None


class TextDiffRequest(PictureOptions):
    """The body of ``POST /v1/images/text-diffs``: frames from the picture to a rotation by ``theta``."""

    default_n: ClassVar[int] = _NUM_FRAMES
    source: str = Field(max_length=MAX_PROMPT_CHARS)
    target: str = Field(max_length=MAX_PROMPT_CHARS)
    theta: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _differ(self) -> "TextDiffRequest":
        if self.source == self.target:
            raise ValueError("source and target are the same: there is nothing to change")
        return self


class PcaReconstructionRequest(PictureOptions):
    """The body of ``POST /v1/images/pca-reconstructions``: a frame for each number of components, and one of all."""

    components: str | None = Field(default=None, max_length=_MAX_COMPONENTS_CHARS)

    @field_validator("components")
    @classmethod
    def _are_numbers(cls, components: str) -> str:
        counts = [part.strip() for part in components.split(",")]
        if len(counts) >= MAX_IMAGES:
            raise ValueError(f"{len(counts)} numbers: at most {MAX_IMAGES - 1}, because the last frame has all")
        if not all(count.isdecimal() and int(count) > 0 for count in counts):
            raise ValueError("whole numbers above 0 with commas between them, for example 20,40,80,160")
        return components

    @field_validator("n")
    @classmethod
    def _follows(cls, _: int) -> int:
        raise ValueError("has no meaning here: there is a frame for each number of components, and one of all")

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers; none: the usual ones."""
        return tuple(int(part) for part in self.components.split(",")) if self.components else ()

    @property
    def num_images(self) -> int:
        """See ``PictureOptions``; of the usual ones, the most that there may be."""
        return len(self.counts or NUM_COMPONENTS) + 1


@dataclass(frozen=True)
class EditKind:
    """One route."""

    body: type[PictureOptions]
    edit: Callable[[Any, Form, int], tuple[Edit, list[str]]]
    """As ``edit_of``."""
    num_pictures: int = 1
    """Files of the field ``image``."""
    takes_mask: bool = False
    reads_embeddings: bool = False
    """Whether it takes the training embeddings, which come with an index."""


def edit_of(kind: EditKind, body: PictureOptions, form: Form, side_px: int) -> tuple[Edit, list[str]]:
    """Decode the pictures of a form, and say what is done with them.

    Args:
        kind: The route.
        body: Its checked body.
        form: Its files.
        side_px: Side of the networks' pictures, in pixels.

    Returns:
        The edit, and notes on fields that had no effect.

    Raises:
        ApiError: 400, if a picture is missing, unknown, or cannot be read.
    """
    for name in form.files:
        if name not in {"image", "mask"} or (name == "mask" and not kind.takes_mask):
            raise ApiError(400, f"unknown parameter: {name}", param=name, code="unknown_parameter")
    pictures, masks = (len(form.files.get(name, [])) for name in ("image", "mask"))
    if pictures != kind.num_pictures:
        needed = "one picture is edited" if kind.num_pictures == 1 else f"{kind.num_pictures} pictures are needed"
        message = f"image: {needed}, and {pictures} came as files"
        raise ApiError(400, message, param="image", code="invalid_value" if pictures else "missing_parameter")
    if masks > 1:
        raise ApiError(400, f"mask: {masks} came, and there is one picture", param="mask", code="invalid_value")
    return kind.edit(body, form, side_px)


def _edit(body: EditRequest, form: Form, side_px: int) -> tuple[Edit, list[str]]:
    [data] = form.files["image"]
    [mask_data] = form.files.get("mask", [None])
    picture, mask = masked_picture(data, mask_data, side_px)
    if mask is None:
        usual = _STRENGTH_OF_FIDELITY[body.input_fidelity or "low"]
        strength = usual if body.strength is None else body.strength
        return StartPicture(picture, strength), [f"no mask: the whole picture is edited, with strength {strength:g}"]
    unused = [name for name in ("strength", "input_fidelity") if getattr(body, name) is not None]
    reason = "has no effect with a mask: what is not masked stays as it is"
    return Inpainting(picture, mask), [f"{name}: {reason}" for name in unused]


def _variation(body: VariationRequest, form: Form, _: int) -> tuple[Edit, list[str]]:
    return Variation(raw_picture(form.files["image"][0], "image"), body.eta), []


def _reconstruction(_: ReconstructionRequest, form: Form, __: int) -> tuple[Edit, list[str]]:
    return Variation(raw_picture(form.files["image"][0], "image"), eta=0.0), []


def _sdedit(body: SdeditRequest, form: Form, side_px: int) -> tuple[Edit, list[str]]:
    strength = _STRENGTH if body.strength is None else body.strength
    return StartPicture(raw_picture(form.files["image"][0], "image", side_px), strength), []


def _interpolation(body: InterpolationRequest, form: Form, _: int) -> tuple[Edit, list[str]]:
    first, second = (raw_picture(data, "image") for data in form.files["image"])
    shares = evenly(1.0 if body.share is None else body.share, body.num_images)
    return Interpolation((first, second), shares, body.noise or "slerp"), []


def _text_diff(body: TextDiffRequest, form: Form, _: int) -> tuple[Edit, list[str]]:
    thetas = evenly(0.4 if body.theta is None else body.theta, body.num_images)
    return TextDiff(raw_picture(form.files["image"][0], "image"), body.source, body.target, thetas), []


def _pca_reconstruction(body: PcaReconstructionRequest, form: Form, _: int) -> tuple[Edit, list[str]]:
    return PcaReconstruction(raw_picture(form.files["image"][0], "image"), body.counts), []


async def with_embeddings(edit: PcaReconstruction, model: PictureModel) -> PcaReconstruction:
    """A reconstruction with the embeddings of its frames, in place of its picture's levels.

    Raises:
        ApiError: 400, if there are not so many components.
    """
    picture = edit.picture
    image = np.frombuffer(bytearray(picture.levels), np.uint8).reshape(picture.height, picture.width, 3)
    try:
        components, z_image = await model.reduce_image(image, edit.components)
    except ValueError as error:
        raise ApiError(400, str(error), param="components", code="invalid_value") from None
    picture = replace(picture, levels=b"")
    return replace(edit, picture=picture, components=components, z_image=z_image.astype(np.float32).tobytes())


EDITS = {
    "edits": EditKind(EditRequest, _edit, takes_mask=True),
    "variations": EditKind(VariationRequest, _variation),
    "interpolations": EditKind(InterpolationRequest, _interpolation, num_pictures=2),
    "text-diffs": EditKind(TextDiffRequest, _text_diff),
    "reconstructions": EditKind(ReconstructionRequest, _reconstruction),
    "sdedits": EditKind(SdeditRequest, _sdedit),
    "pca-reconstructions": EditKind(PcaReconstructionRequest, _pca_reconstruction, reads_embeddings=True),
}
"""The routes below ``/v1/images``."""

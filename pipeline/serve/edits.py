"""Requests that start from pictures: OpenAI's edits and variations, and the edits of the command line.

Each is one row of ``EDITS``: its body, its pictures, and the edit that they make. The body is a form, and the answer
has the form of a generation's (pipeline/serve/generation.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from models.request import Edit, Inpainting, Interpolation, StartPicture, TextDiff, Variation
from pipeline.serve.images import MAX_PROMPT_CHARS, PictureOptions, PromptOptions
from pipeline.serve.uploads import Form, masked_picture, raw_picture
from pipeline.serve.web import ApiError

_STRENGTH = 0.6
_STRENGTH_OF_FIDELITY = {"low": _STRENGTH, "high": 0.4}
_NUM_FRAMES = 5


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


@dataclass(frozen=True)
class EditKind:
    """One route."""

    body: type[PictureOptions]
    edit: Callable[[Any, Form, int], tuple[Edit, list[str]]]
    """As ``edit_of``."""
    num_pictures: int = 1
    """Files of the field ``image``."""
    takes_mask: bool = False


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
    shares = _evenly(1.0 if body.share is None else body.share, body.num_images)
    return Interpolation((first, second), shares, body.noise or "slerp"), []


def _text_diff(body: TextDiffRequest, form: Form, _: int) -> tuple[Edit, list[str]]:
    thetas = _evenly(0.4 if body.theta is None else body.theta, body.num_images)
    return TextDiff(raw_picture(form.files["image"][0], "image"), body.source, body.target, thetas), []


def _evenly(last: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from 0 to ``last``; a single one is ``last``."""
    return tuple(last * number / (count - 1) for number in range(count)) if count > 1 else (last,)


EDITS = {
    "edits": EditKind(EditRequest, _edit, takes_mask=True),
    "variations": EditKind(VariationRequest, _variation),
    "interpolations": EditKind(InterpolationRequest, _interpolation, num_pictures=2),
    "text-diffs": EditKind(TextDiffRequest, _text_diff),
    "reconstructions": EditKind(ReconstructionRequest, _reconstruction),
    "sdedits": EditKind(SdeditRequest, _sdedit),
}
"""The routes below ``/v1/images``."""

"""Requests for pictures: the bodies of OpenAI's Images API, with additional fields.

``seed``, and by the names that other servers of diffusion models use: ``negative_prompt``, ``guidance_scale`` and
``num_inference_steps`` of the decoder, ``prior_guidance_scale`` of the prior; docs/http.md lists every field. Bodies of
requests that start from pictures are in pipeline/serve/edits.py, their answers in pipeline/serve/generation.py.
"""

import re
import secrets
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from models.request import WALK_STEPS, Edit, PcaReconstruction, SampleRequest, Way, is_walk
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.deadlines import Timeout
from pipeline.serve.picture_files import Format
from pipeline.serve.web import ApiError

MAX_IMAGES = 10
MAX_PROMPT_CHARS = 4000
MIN_SIDE_PX = 8
MAX_GUIDANCE = 100.0
MAX_STEPS = 1000
MAX_NEIGHBOURS = 20
MAX_CANDIDATES = 16
_MAX_SEED = 2**63 - 1 - MAX_IMAGES
_STEPS_OF_QUALITY = {"low": 0.5, "medium": 1, "standard": 1, "auto": 1, "high": 1.5, "hd": 1.5, "xhigh": 2, "max": 3}
"""Factors of the decoder's steps."""


class PictureOptions(BaseModel):
    """The fields that every request for pictures has; None is the default, as in OpenAI's clients."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    size: str | None = None
    response_format: Literal["b64_json", "url", "file"] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    user: str | None = None
    safety_identifier: str | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    neighbours: int | None = Field(default=None, ge=0, le=MAX_NEIGHBOURS)
    timeout: Timeout = None

    default_n: ClassVar[int] = 1

    @property
    def num_images(self) -> int:
        """Pictures of the answer."""
        return self.n or self.default_n


class PromptOptions(PictureOptions):
    """The fields of a request with a prompt."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARS)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    prior_guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    num_candidates: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty; say what the picture shows")
        return prompt


class GenerationRequest(PromptOptions):
    """The body of ``POST /v1/images/generations``."""

    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None


def require_model(name: str | None, card: ModelCard) -> None:
    """Refuse a model that is not there; None is the one that is.

    Raises:
        ApiError: 404.
    """
    if name not in {None, card.name, *card.aliases}:
        message = f"model {name!r} does not exist; this server has {card.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def check_options(body: PictureOptions, card: ModelCard) -> None:
    """Refuse what a checked body must not combine, before its pictures are decoded.

    Raises:
        ApiError: 404 for another model, 400 for an impossible size or combination of fields.
    """
    require_model(body.model, card)
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images: needs stream = true", param="partial_images", code="invalid_value")
    if body.response_format == "file" and (body.stream or body.num_images > 1):
        message = "response_format: 'file' is one picture (n = 1), and not streamed"
        raise ApiError(400, message, param="response_format", code="invalid_value")
    if body.response_format == "file" and body.neighbours:
        message = "neighbours: response_format 'file' is the picture alone, which has no place for them"
        raise ApiError(400, message, param="neighbours", code="invalid_value")
    side_of(body.size, card.image_px)


def side_of(size: str | None, image_px: int) -> int:
    """The side that ``size`` requests, in pixels.

    Args:
        size: "WxH", "auto" or None.
        image_px: Side of the cascade's pictures, in pixels: the largest possible.

    Raises:
        ApiError: 400, if it is no size, not square, or larger than those of the cascade.
    """
    if size in {None, "auto"}:
        return image_px
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "")
    width, height = (int(match[1]), int(match[2])) if match else (0, 1)
    if width != height or not MIN_SIDE_PX <= width <= image_px:
        message = f"size: {size!r}: pictures are square, from {MIN_SIDE_PX}x{MIN_SIDE_PX} to {image_px}x{image_px}"
        raise ApiError(400, message, param="size", code="invalid_value")
    return width


def sample_request(
    body: PictureOptions,
    side_px: int = 0,
    card: ModelCard | None = None,
    edit: Edit | None = None,
) -> SampleRequest:
    """The request to the cascade; without a seed in the body, the first seed is random.

    Args:
        body: The checked body.
        side_px: Side of the pictures; the cascade ends at the first stage that reaches it.
        card: How each stage is sampled by default, for ``quality``, which multiplies the decoder's steps as far as it
            has that many.
        edit: The pictures that it starts from; the frames of a ``Way`` share one seed.
    """
    first = secrets.randbelow(2**31) if body.seed is None else body.seed
    count = len(edit.components) if isinstance(edit, PcaReconstruction) else body.num_images
    seeds = (first,) * count if isinstance(edit, Way) else tuple(range(first, first + count))
    prompt = body if isinstance(body, PromptOptions) else None
    scales = {"decoder": body.guidance_scale, "prior": prompt.prior_guidance_scale if prompt else None}
    num_steps, factor = body.num_inference_steps, _STEPS_OF_QUALITY[body.quality or "auto"]
    decoder = card.sampling.get("decoder", {}) if card else {}
    usual = WALK_STEPS if is_walk(edit) else decoder.get("num_steps")
    if num_steps is None and factor != 1 and usual and card:
        num_steps = min(card.num_timesteps, max(1, round(factor * usual)))
    return SampleRequest(
        prompt.prompt if prompt else "",
        seeds,
        guidance_scale={stage: scale for stage, scale in scales.items() if scale is not None},
        num_steps={} if num_steps is None else {"decoder": num_steps},
        negative_prompt=(prompt.negative_prompt if prompt else "") or "",
        side_px=side_px,
        num_candidates=(prompt.num_candidates if prompt else 0) or 0,
        edit=edit,
        timeout_s=body.timeout or 0.0,
    )


def note_of_cut(name: str, tokens: int) -> str:
    """What an answer says of a text that is longer than CLIP reads."""
    return f"{name}: CLIP reads {tokens} tokens, start and end included; what follows is cut off"

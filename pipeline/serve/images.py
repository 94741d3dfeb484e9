"""``POST /v1/images/generations`` of OpenAI's Images API, with additional fields.

``seed``, and by the names that other servers of diffusion models use: ``negative_prompt``, ``guidance_scale`` and
``num_inference_steps`` of the decoder, ``prior_guidance_scale`` of the prior.
"""

import asyncio
import base64
import io
import re
import secrets
import time
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from models.request import SampleRequest
from pipeline.serve.protocols import Images, PictureModel
from pipeline.serve.web import ApiError

MAX_IMAGES = 10
MAX_PROMPT_CHARS = 4000
MIN_SIDE_PX = 8
MAX_GUIDANCE = 100.0
MAX_STEPS = 1000
_MAX_SEED = 2**63 - 1 - MAX_IMAGES


class GenerationRequest(BaseModel):
    """The body of a request; None is the default, as in OpenAI's clients."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(max_length=MAX_PROMPT_CHARS)
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    user: str | None = None
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    prior_guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    # Other OpenAI fields: only the values that we support are accepted.
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty; say what the picture shows")
        return prompt


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


async def generate(
    model: PictureModel, body: GenerationRequest, *, name: str, image_px: int, client: str = ""
) -> dict[str, Any]:
    """Answer a request.

    Args:
        model: The networks.
        body: The checked body.
        name: Name of the only model.
        image_px: Side of the cascade's pictures, in pixels.
        client: Who asks; clients get equal shares.

    Raises:
        ApiError: 404 for another model, 400 for what the networks cannot do.
        Overloaded: If too many requests wait.
        NotServing: If no networks are there.
    """
    if body.model not in {None, name}:
        message = f"model {body.model!r} does not exist; this server has {name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    side_px = side_of(body.size, image_px)
    request = sample_request(body, side_px)
    try:
        sampled = await model.sample(request, client)
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    files = await asyncio.to_thread(lambda: [to_png_of_side(image, side_px) for image in sampled.images])
    data: list[dict[str, Any]] = []
    for file, seed in zip(files, request.seeds, strict=True):
        encoded = base64.b64encode(file).decode()
        if body.response_format == "url":
            data.append({"url": f"data:image/png;base64,{encoded}", "seed": seed})
        else:
            data.append({"b64_json": encoded, "seed": seed})
    return {"created": int(time.time()), "data": data}


def sample_request(body: GenerationRequest, side_px: int = 0) -> SampleRequest:
    """The request to the cascade; without a seed in the body, the first seed is random.

    Args:
        body: The checked body.
        side_px: Side of the pictures; the cascade ends at the first stage that reaches it.
    """
    first = secrets.randbelow(2**31) if body.seed is None else body.seed
    scales = {"decoder": body.guidance_scale, "prior": body.prior_guidance_scale}
    return SampleRequest(
        body.prompt,
        tuple(range(first, first + (body.n or 1))),
        guidance_scale={stage: scale for stage, scale in scales.items() if scale is not None},
        num_steps={} if body.num_inference_steps is None else {"decoder": body.num_inference_steps},
        negative_prompt=body.negative_prompt or "",
        side_px=side_px,
    )


def to_png_of_side(image: Images, side_px: int) -> bytes:
    """A picture (H, W, 3) as a PNG file of side ``side_px``; shrunk with antialiasing."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.width != side_px:
        picture = picture.resize((side_px, side_px), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()

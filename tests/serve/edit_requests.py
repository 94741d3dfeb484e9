"""Requests that start from pictures, and what is in their answers."""

import base64
import io
from typing import Any

import httpx
from PIL import Image, PngImagePlugin

from tests.tiny.shards import pixels

STEPS = {"num_inference_steps": "3"}


def post(server: Any, route: str, *pictures: bytes, mask: bytes | None = None, **fields: str) -> httpx.Response:
    files = [("image[]", ("picture.png", data)) for data in pictures]
    files += [("mask", ("mask.png", mask))] if mask else []
    return httpx.post(f"{server.url}/v1/images/{route}", data=STEPS | fields, files=files, timeout=120)


def images(answer: Any) -> list[Any]:
    data = answer.json()["data"] if isinstance(answer, httpx.Response) else [one.to_dict() for one in answer.data]
    return [pixels(base64.b64decode(one["b64_json"])) for one in data]


def png_of(file: bytes) -> PngImagePlugin.PngImageFile:
    picture = Image.open(io.BytesIO(file))
    assert isinstance(picture, PngImagePlugin.PngImageFile)
    return picture

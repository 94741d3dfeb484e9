"""What tests of pictures over HTTP ask, and how they compare what comes."""

from typing import Any

import httpx
import numpy as np

from models.cascade import CascadeResult

PROMPT = "a large red circle on a white background"


def expected(server: Any, prompt: str, seeds: list[int]) -> CascadeResult:
    return server.cascade.sample([prompt] * len(seeds), seeds)


def close_to(picture: Any, reference: Any) -> bool:
    difference = np.abs(picture.astype(int) - reference)
    return bool(difference.mean() < 0.1 and difference.max() < 16)


def post(server: Any, body: Any = None, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60, **arguments)


def post_to(url: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)

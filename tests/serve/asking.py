"""What tests of pictures over HTTP ask, and how they compare what comes."""

from typing import Any

import httpx
import numpy as np

from models.cascade import CascadeResult
from models.edit_phases import edit_phase
from models.editor import Editor
from models.request import SampleRequest

PROMPT = "a large red circle on a white background"


def expected(server: Any, prompt: str, seeds: list[int]) -> CascadeResult:
    return server.cascade.sample([prompt] * len(seeds), seeds)


def run_phases(editor: Editor, request: SampleRequest) -> CascadeResult:
    """The pictures of one request that starts from pictures, sampled alone."""
    phase = edit_phase(editor, request)
    while True:
        result = editor.cascade.run(phase.batch(), phase.stages)
        if phase.then is None:
            return result
        phase = phase.then(result.values)


def close_to(picture: Any, reference: Any) -> bool:
    difference = np.abs(picture.astype(int) - reference)
    return bool(difference.mean() < 0.1 and difference.max() < 16)


def post(server: Any, body: Any = None, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60, **arguments)


def post_to(url: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)

"""Embeddings of texts and pictures, made beside the steps of an engine."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.clip.frozen import FrozenClip
from pipeline.serve.protocols import Images, Vectors

TEXTS_AT_ONCE = 64
"""Captions that are embedded together."""


class Embedder:
    """Makes embeddings one after another, so that their memory is bounded, in a thread that ends with this object.

    Those that wait hold no thread that other work of the process needs, and do not begin if nobody waits for them.

    Args:
        clip: The frozen CLIP.
    """

    def __init__(self, clip: FrozenClip) -> None:
        self._clip = clip
        self._thread = ThreadPoolExecutor(1, "unclip-embed")

    async def texts(self, texts: Sequence[str]) -> Vectors:
        """Embed texts, (B, D); between ``TEXTS_AT_ONCE`` and the next ones, others have their turn."""
        rows: list[Vectors] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            rows.append(await self._run(lambda some=some: self._clip.embed_text(some)))
        return np.concatenate(rows)

    async def image(self, image: Images) -> Vectors:
        """Embed a picture (H, W, 3): (D,)."""
        return await self._run(lambda: self._clip.encode_image(torch.from_numpy(image)[None])[0])

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        """See ``PictureModel``; it needs no network, and does not wait."""
        return await asyncio.to_thread(self._clip.clip.inputs.cut_at, texts)

    async def _run(self, embed: Callable[[], torch.Tensor]) -> Vectors:
        return await asyncio.wrap_future(self._thread.submit(lambda: embed().cpu().numpy()))

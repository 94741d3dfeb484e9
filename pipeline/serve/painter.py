"""The networks in the process that asks for them: what a test calls, and what a replica of Ray Serve holds."""

import asyncio
from collections.abc import Sequence
from typing import cast

import torch

from models.cascade import Cascade
from pipeline.clip import FrozenClip
from pipeline.serve.engine import Engine
from pipeline.serve.protocols import Drawn, Images, Vectors


class LocalPainter:
    """A ``contract.Painter`` around an engine and the cascade's CLIP.

    Args:
        cascade: The trained networks, with the frozen CLIP.
        max_batch_size: Pictures drawn at a time.
        max_waiting: Requests that may wait to be begun.
    """

    def __init__(self, cascade: Cascade, *, max_batch_size: int = 16, max_waiting: int = 64) -> None:
        self._clip = cast("FrozenClip", cascade.clip)
        self._engine = Engine(cascade, max_batch_size=max_batch_size, max_waiting=max_waiting)

    async def draw(self, prompt: str, seeds: Sequence[int]) -> Drawn:
        """See ``contract.Painter``."""
        return await self._engine.draw(prompt, seeds)

    async def embed_text(self, text: str) -> Vectors:
        """See ``contract.Painter``."""
        return await asyncio.to_thread(self._embed_text, text)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``contract.Painter``."""
        return await asyncio.to_thread(self._embed_image, image)

    async def stats(self) -> dict[str, int]:
        """See ``contract.Painter``."""
        return self._engine.stats() if self._engine.alive else {}

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _embed_text(self, text: str) -> Vectors:
        return self._clip.encode_text([text]).z_text[0].cpu().numpy()

    def _embed_image(self, image: Images) -> Vectors:
        return self._clip.encode_image(torch.from_numpy(image)[None])[0].cpu().numpy()

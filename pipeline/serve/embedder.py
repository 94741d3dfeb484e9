"""Embeddings of texts and pictures, made beside the steps of an engine."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch

from models.pca import Pca
from models.request import EditError
from pipeline.clip.frozen import FrozenClip
from pipeline.errors import ConfigError, DataError
from pipeline.sampling.edit_options import shown_components
from pipeline.serve.protocols import Images, NotServing, Vectors

_log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 64
"""Captions that are embedded, or looked at, together: between them, a request that nobody waits for ends."""
_AGAIN_AFTER_S = 60.0
"""How long embeddings that gave no principal components are not read again."""
_END_WAIT_S = 5.0
"""Longest time that the end of an engine waits for the shard that is being read."""

FitPca = Callable[[Callable[[], None]], Pca]
"""Finds principal components; calls its argument between its parts, and ends with what that raises."""


class Embedder:
    """Makes embeddings one after another, so that their memory is bounded, in a thread that ends with this object.

    Those that wait hold no thread that other work of the process needs, and do not begin if nobody waits for them.
    Another thread looks how long texts are, which needs no network.

    Args:
        clip: The frozen CLIP.
        computing: Held while it computes; see ``DeviceMemory``.
    """

    def __init__(self, clip: FrozenClip, computing: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._clip = clip
        self._computing = computing
        self._thread = ThreadPoolExecutor(1, "unclip-embed")
        self._reader = ThreadPoolExecutor(1, "unclip-tokens")
        self.fit_pca: FitPca | None = None
        """Finds the principal components of the training embeddings; None: there are none here."""
        self._fitting: Future[Pca] | None = None
        """What was found, or is being looked for; None before anybody has asked."""
        self._fitter: threading.Thread | None = None
        self._failed_s = 0.0
        """When no components were found."""
        self._closed = threading.Event()

    async def texts(self, texts: Sequence[str]) -> Vectors:
        """Embed texts, (B, D); between ``TEXTS_AT_ONCE`` and the next ones, others have their turn."""
        return np.concatenate([await self._run(partial(self._clip.embed_text, some)) for some in _parts(texts)])

    async def image(self, image: Images) -> Vectors:
        """Embed a picture (H, W, 3): (D,)."""
        return await self._run(lambda: self._clip.encode_image(torch.from_numpy(image)[None])[0])

    async def reduce_image(self, image: Images, components: Sequence[int]) -> tuple[tuple[int, ...], Vectors]:
        """See ``PictureModel``; the components are found when they are first asked for, once for all who ask."""
        if self.fit_pca is None:
            raise EditError("components: this server's networks come without their training embeddings")
        z_image = torch.from_numpy(await self.image(image))[None]
        shown = shown_components(components, z_image.shape[1])
        fitting = self._fitting
        if fitting is None or (fitting.done() and self._may_try_again(fitting.exception())):
            fitting = self._fitting = self._fit(self.fit_pca)
        try:  # others wait for it, if this request is cancelled
            pca = await asyncio.shield(asyncio.wrap_future(fitting))
        except (ConfigError, DataError) as error:
            raise EditError(f"no principal components: {error}") from None
        return (*shown, z_image.shape[1]), pca.reduce(z_image, shown).numpy()

    def close(self) -> None:
        """Give up the search for principal components; an end of the process waits for it only as long as this does."""
        self._closed.set()
        if self._fitter is not None:
            self._fitter.join(_END_WAIT_S)

    def _fit(self, fit_pca: FitPca) -> Future[Pca]:
        fitting = Future[Pca]()

        def fit() -> None:
            try:
                fitting.set_result(fit_pca(self._require_open))
            except Exception as error:  # noqa: BLE001  (whoever asked gets it)
                self._failed_s = time.monotonic()
                if not self._closed.is_set():
                    _log.error("no principal components: %s: %s", type(error).__name__, error)
                fitting.set_exception(error)

        # No thread of an executor: Python waits for those at its end, and a store may be silent for minutes.
        self._fitter = threading.Thread(target=fit, name="unclip-pca", daemon=True)
        self._fitter.start()
        return fitting

    def _may_try_again(self, error: BaseException | None) -> bool:
        """Whether embeddings that gave no components are read anew: what is damaged stays so for a while."""
        is_lasting = isinstance(error, ConfigError | DataError)
        return error is not None and not (is_lasting and time.monotonic() - self._failed_s < _AGAIN_AFTER_S)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise NotServing("the engine is shutting down")

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        """See ``PictureModel``; it waits for no embedding."""
        cuts: list[int] = []
        for some in _parts(texts):
            cuts += await asyncio.wrap_future(self._reader.submit(self._clip.clip.inputs.cut_at, some))
        return cuts

    async def _run(self, embed: Callable[[], torch.Tensor]) -> Vectors:
        def run() -> Vectors:
            with self._computing():
                return embed().cpu().numpy()

        return await asyncio.wrap_future(self._thread.submit(run))


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """``TEXTS_AT_ONCE`` of them at a time."""
    return (texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE))

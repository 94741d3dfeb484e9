"""The engine samples the pictures of many requests together, each at its own step.

This is what is asked of it: requests, which it takes or refuses, embeddings, counts; engine_loop.py is the thread that
works them off. An engine may have some of the cascade's stages alone (served_stages.py); what is left of a request then
goes to another one (work.py).
A picture is a batch of one item: it equals the picture that ``Cascade.sample_request`` samples alone. A request that
starts from pictures may have several phases (models/edit_phases.py); each waits and is admitted as a request does.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import torch

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.clip.frozen import FrozenClip
from pipeline.serve.deadlines import end_of
from pipeline.serve.embedder import Embedder, FitPca
from pipeline.serve.engine_loop import EngineLoop
from pipeline.serve.estimate import PartLoad, estimate_s
from pipeline.serve.fair_queue import is_full
from pipeline.serve.in_progress import Pending
from pipeline.serve.memory import DeviceMemory
from pipeline.serve.metrics import EngineMetrics
from pipeline.serve.protocols import Accepted, Images, NotServing, Overloaded, Preview, TooLittleTime, Vectors
from pipeline.serve.traces import EngineSpans
from pipeline.serve.work import Work

if TYPE_CHECKING:
    from pipeline.serve.otlp import Traces


class Engine(EngineLoop):
    """Samples requests with a cascade; a ``protocols.PictureModel`` in this process.

    Args:
        cascade: The trained networks, on their device.
        max_batch_size: Pictures sampled at a time.
        max_waiting: Requests that may wait to start; further ones are refused, but for ``is_full``.
        steps: Steps of the recipe whose networks this engine has; the others of ``cascade`` have no weights. None: all.
        device: Of its networks.
        traces: Where the spans of requests go; closed with the engine. None: nothing is recorded.
        memory: Of that device, which then bounds how many pictures are taken; None: ``max_batch_size`` alone does.
        metrics: Of all engines of this process, while networks are swapped; None: it is alone.

    Raises:
        StepError: If one picture does not fit into the memory.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        max_batch_size: int = 16,
        max_waiting: int = 64,
        steps: Collection[str] | None = None,
        device: torch.device | str = "cpu",
        traces: "Traces | None" = None,
        memory: DeviceMemory | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        super().__init__(
            cascade,
            max_batch_size=max_batch_size,
            steps=steps,
            device=device,
            traces=traces,
            memory=memory,
            metrics=metrics,
        )
        self._embedder = Embedder(cast("FrozenClip", cascade.clip), self._computing)
        self._max_waiting = max_waiting
        self.start()

    def submit(
        self,
        request: SampleRequest,
        client: str = "",
        *,
        work: Work | None = None,
        num_previews: int = 0,
        show: Callable[[Preview], None] | None = None,
        later: Sequence[PartLoad] = (),
    ) -> Future[Any]:
        """Request pictures, or work for the next engine; cancelling the future drops the request.

        Args:
            request: What to sample.
            client: Who asks; clients get equal shares.
            work: What is left of the request, from the engine before; never refused.
            num_previews: Previews of each picture.
            show: Called with each of them, by the engine's thread.
            later: What the later parts of a chain have to do, in their order.

        Raises:
            ValueError: If the cascade cannot do what is requested.
            Overloaded: If too many requests wait, or ``TooLittleTime``: an engine that has nothing else to do takes
                every request, so that its estimates are renewed.
            NotServing: If the engine is closed.
        """
        phase, is_last = self._stages.phase_of(request, work)
        if self._limits:
            self._limits.require_room(request)
        spans = EngineSpans(self._traces, request.traceparent)
        pending = Pending(
            phase,
            request,
            client,
            num_previews,
            show,
            spans,
            arrived_s=time.monotonic() - (work.taken_s if work else 0.0),
            ends_s=end_of(request.timeout_s),
            num_steps=work.num_steps if work else 0,
        )
        self._begin_phase(pending, phase, is_last=is_last)
        num_beside = self._metrics.num_beside(self)
        with self._changed:
            if self._closed:
                raise NotServing("the engine is shutting down")
            if work is None and (refusal := self._refusal(pending, request, later, num_beside)):
                self._stats.refused += 1
                self._metrics.requests.labels("refused").inc()
                raise refusal
            self._stats.requests += work is None
            self._unended += 1
            pending.future.add_done_callback(self._note_ended)
            pending.future.add_done_callback(spans.end)
            self._waiting.add(pending, client)
            self._changed.notify()
        return pending.future

    async def sample(
        self, request: SampleRequest, client: str = "", work: Work | None = None, later: Sequence[PartLoad] = ()
    ) -> Any:
        """See ``PictureModel``; cancelling the task drops the request. Part of a chain may return ``Work``."""
        return await asyncio.wrap_future(self.submit(request, client, work=work, later=later))

    async def stream(
        self,
        request: SampleRequest,
        client: str = "",
        num_previews: int = 0,
        work: Work | None = None,
        later: Sequence[PartLoad] = (),
    ) -> AsyncGenerator[Any]:
        """See ``PictureModel``; part of a chain may end with ``Work``."""
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def show(preview: Preview) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, preview)

        future = asyncio.wrap_future(
            self.submit(request, client, work=work, num_previews=num_previews, show=show, later=later)
        )
        future.add_done_callback(lambda _: previews.put_nowait(None))
        try:
            if work is None:
                yield Accepted()
            while (preview := await previews.get()) is not None:
                yield preview
            yield await future
        finally:
            future.cancel()

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await self._embedder.texts(texts)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._embedder.image(image)

    def close(self) -> None:
        """See ``EngineLoop``; a search for principal components ends, too."""
        super().close()
        self._embedder.close()

    def use_components(self, fit_pca: FitPca) -> None:
        """Let ``reduce_image`` call ``fit_pca``, once, for the principal components of the training embeddings."""
        self._embedder.fit_pca = fit_pca

    async def reduce_image(self, image: Images, components: Sequence[int]) -> tuple[tuple[int, ...], Vectors]:
        """See ``PictureModel``."""
        return await self._embedder.reduce_image(image, components)

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        """See ``PictureModel``."""
        return await self._embedder.cut_at(texts)

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``; of all engines of this process."""
        return self._metrics.counts() if self.alive else {}

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``; of all engines of this process."""
        return {"": self._metrics.text()}

    def load(self) -> PartLoad:
        """What this engine has to do, and those of before, which take their time of the same device."""
        return self._load(self.num_unfinished() + self._metrics.num_beside(self))

    def _load(self, pictures: float) -> PartLoad:
        loads = {number: load for number, load in enumerate(self._schedule.loads) if self._stages.has(number)}
        return PartLoad(loads, self._max_batch_size, pictures)

    def _refusal(
        self, pending: Pending, request: SampleRequest, later: Sequence[PartLoad], num_beside: int
    ) -> Overloaded | None:
        """Why a new request is not taken, if it is not; call with the lock held."""
        by_client = Counter(waiting.client for waiting in self._waiting if not waiting.future.cancelled())
        if is_full(by_client, pending.client, self._max_waiting):
            return Overloaded(f"{by_client.total()} requests are waiting already", retry_after_s=self._wait_s())
        if not request.timeout_s or not (self._unended or num_beside or any(part.pictures for part in later)):
            return None
        count = pending.num_waiting
        own = {} if request.edit else request.num_steps  # an edit may take a share of them
        numbers = [*map(self._stages.number, pending.phase.stages), *pending.rest]
        steps = {number: own.get(self._stages[number].name, 0) for number in numbers}
        num_ahead = len(self._active) + sum(min(count, waiting.num_waiting) for waiting in self._waiting) + num_beside
        needed_s = estimate_s([self._load(num_ahead), *later], steps, count)
        if needed_s <= request.timeout_s:
            return None
        reason = f"timeout: {request.timeout_s:.3g} s are less than the {needed_s:.3g} s that it would take now"
        return TooLittleTime(reason, retry_after_s=needed_s - request.timeout_s)

    def _wait_s(self) -> float:
        """Estimate of the time until one more request is admitted, in seconds; call with the lock held."""
        num_waiting = sum(pending.num_waiting for pending in self._waiting)
        return self._picture_s * (num_waiting + len(self._active)) / max(1, len(self._waiting))

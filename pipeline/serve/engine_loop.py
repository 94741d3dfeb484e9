"""The loop of an engine: one thread that runs the networks for the pictures of all its requests.

Between two steps it drops the pictures of cancelled requests, admits waiting ones in fair shares (fair_queue.py,
cost.py), and chooses the stage that takes a step next (schedule.py).
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from models.cascade import Cascade, Phase
from models.pixels import to_uint8
from models.request import EditError, SampleRequest
from models.stage import PIXELS, Z_IMAGE, Batch, JoinedChains, enter_each
from pipeline.serve.cost import cost_of
from pipeline.serve.fair_queue import FairQueue
from pipeline.serve.in_progress import Pending, Picture, show_preview
from pipeline.serve.memory import READ_EVERY_S, DeviceMemory, MemoryLimits
from pipeline.serve.metrics import EngineMetrics
from pipeline.serve.protocols import DeadlinePassed, NotServing, SampledPictures
from pipeline.serve.schedule import Schedule
from pipeline.serve.served_stages import ServedStages
from pipeline.serve.work import Work, portable

if TYPE_CHECKING:
    from pipeline.serve.otlp import Traces

_log = logging.getLogger(__name__)

_SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""


@dataclass
class EngineStats:
    """Counts since the start, and the work in progress."""

    requests: int = 0
    """Accepted."""
    refused: int = 0
    """Refused because too many requests waited, or because their time would not suffice."""
    dropped: int = 0
    """Cancelled by their clients before they were finished."""
    expired: int = 0
    """Dropped because their time was up."""
    failed: int = 0
    """Ended by an error of a network."""
    halved: int = 0
    """Steps that failed for several pictures together, which were then tried in halves."""
    pictures: int = 0
    """Finished."""
    steps: int = 0
    """Network steps taken."""
    rows: int = 0
    """Pictures in those steps, summed: rows / steps is the mean batch."""
    waiting: int = 0
    """Requests not started."""
    active: int = 0
    """Pictures in progress."""


class EngineLoop:
    """The thread of an ``Engine``, what it works on, and its end.

    Args:
        cascade: See ``Engine``, as for all others.
        max_batch_size: Pictures sampled at a time.
        steps: Steps of the recipe whose networks it has.
        device: Of its networks.
        traces: Where the spans of requests go.
        memory: Of that device.
        metrics: Of all engines of this process.

    Raises:
        StepError: If one picture does not fit into the memory.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        max_batch_size: int,
        steps: Collection[str] | None,
        device: torch.device | str,
        traces: "Traces | None",
        memory: DeviceMemory | None,
        metrics: EngineMetrics | None,
    ) -> None:
        self._stages = ServedStages(cascade, steps, device)
        self._limits = MemoryLimits(cascade, self._stages, memory, device) if memory else None
        self._computing = memory.computing if memory else nullcontext
        self._stepping = memory.stepping if memory else nullcontext
        self._schedule = Schedule(len(self._stages), max_batch_size)
        self._joined: list[JoinedChains | None] = [None] * len(self._stages)
        """The chains of each stage that took its last step."""
        self._max_batch_size = max_batch_size
        self._stats = EngineStats()
        self._metrics = metrics or EngineMetrics()
        self._traces = traces
        self._waiting: FairQueue[Pending] = FairQueue()
        self._active: list[Picture] = []
        self._unended = 0
        """Requests without an answer; one that enters, or goes to its next phase, neither waits nor is active."""
        self._picture_s = 0.0
        """Running mean of the time between two pictures that end here, while there is work."""
        self._since_s = 0.0
        """When the last picture ended, or the first one came after a pause."""
        self._looked_s = 0.0
        """When it was looked for the room of one picture, or the first one came after a pause."""
        self._changed = threading.Condition()
        self._closed = False
        self._metrics.begin(self)
        self._thread = threading.Thread(target=self._run, name="unclip-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; call it once, when all that it may use is there."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closed

    @property
    def idle(self) -> bool:
        """Whether every request has its answer."""
        return not self._unended

    def counts(self) -> dict[str, int]:
        """``EngineStats`` as plain numbers."""
        with self._changed:
            self._stats.waiting, self._stats.active = len(self._waiting), len(self._active)
            return asdict(self._stats)

    def num_unfinished(self) -> int:
        """Pictures that wait or are in progress."""
        with self._changed:
            return len(self._active) + sum(pending.num_waiting for pending in self._waiting)

    def close(self) -> None:
        """Stop after the current step; unanswered requests fail with ``NotServing``."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        unanswered = self._unanswered()
        self._remove(unanswered)
        for pending in unanswered:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(NotServing("the engine is shutting down"))
        self._metrics.end(self)
        if self._traces is not None:
            self._traces.close()

    def _note_ended(self, _: Future[Any]) -> None:
        with self._changed:
            self._unended -= 1

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._closed or len(self._waiting) or self._active):
                        self._changed.wait()
                        self._since_s = self._looked_s = time.monotonic()
                    if self._closed:
                        return
                    self._drop()
                    entering = self._take_waiting()
                for pending, count in entering:
                    with self._computing():
                        self._guarded([pending], partial(self._enter, pending, count))
                if self._active:
                    by_stage: dict[int, list[Picture]] = {}
                    for picture in self._active:
                        by_stage.setdefault(self._number(picture), []).append(picture)
                    pictures = self._schedule.choose(by_stage)
                    with self._stepping():
                        if self._limits:
                            pictures = self._limits.fitting(self._number(pictures[0]), pictures)
                        with self._computing():
                            self._advance(pictures)
                    self._make_room()

    def _make_room(self) -> None:
        """Look whether one picture has room for its next step: when nobody waits, and else a few times a second."""
        now_s = time.monotonic()
        if self._limits and (not self._active or now_s - self._looked_s > READ_EVERY_S):
            self._looked_s = now_s
            self._limits.make_room()

    def _take_waiting(self) -> list[tuple[Pending, int]]:
        """The next requests, each with the number of pictures for which there is room; call with the lock held."""
        counts: dict[Pending, int] = {}
        active, entering = [picture.pending.request for picture in self._active], list[SampleRequest]()
        while len(self._waiting) and len(active) + len(entering) < self._max_batch_size:
            pending = self._waiting.next()
            entering.append(pending.request)
            if self._limits and (counts or active) and not self._limits.admits(entering, active):
                break
            counts[pending] = counts.get(pending, 0) + 1
            self._waiting.serve(pending, pending.cost)
            if counts[pending] == pending.num_waiting:
                self._waiting.remove(pending)
        return list(counts.items())

    def _enter(self, pending: Pending, count: int) -> None:
        """Admit the next ``count`` pictures of a request."""
        if pending.batch is None:
            if not pending.num_steps:
                self._metrics.queue.observe(time.monotonic() - pending.arrived_s)
            pending.spans.admit()
            with self._metrics.admission.time():
                pending.batch = pending.phase.batch()
        if not pending.phase.stages:  # another engine has them, or there are none: what is there is passed on at once
            is_whole = pending.is_last and not pending.rest
            with self._changed:
                self._waiting.remove(pending)
                self._note_gone(pending.phase.num_items)
                self._note_sampled(pending.phase.num_items if is_whole else 0)
            if is_whole:
                self._answer(pending, [pending.batch.values])
            else:
                self._hand_on(pending, pending.batch)
            return
        first = len(pending.pictures)
        pictures = [Picture(pending, pending.batch[row : row + 1]) for row in range(first, first + count)]
        with self._changed:
            pending.pictures += pictures
            self._active += pictures

    def _advance(self, pictures: Sequence[Picture]) -> None:
        """Take pictures of one stage one step further; if that fails, fewer of them are tried together."""
        number = self._number(pictures[0])
        put_back = [picture.saved() for picture in pictures]
        try:
            started = time.monotonic()
            self._step(number, pictures)
            self._schedule.note_step(number, len(pictures), time.monotonic() - started)
        except Exception as error:  # noqa: BLE001  (any error of a network, often of memory; the server goes on)
            self._joined[number] = None
            self._schedule.note_failure(number, len(pictures))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(pictures) == 1:
                _log.exception("sampling failed")
                self._fail([pictures[0].pending], error)
                return
            _log.warning("a step of %s failed for %d pictures: %s", self._stages[number].name, len(pictures), error)
            for put_one_back in put_back:
                put_one_back()
            with self._changed:
                self._stats.halved += 1

    def _step(self, number: int, pictures: Sequence[Picture]) -> None:
        stage, began_ns = self._stages[number], time.time_ns()
        entering = [picture for picture in pictures if picture.chain is None]
        for picture, chain in zip(entering, enter_each(stage, [one.batch for one in entering]), strict=True):
            picture.chain = chain
        chains = [picture.chain for picture in pictures if picture.chain is not None]
        joined = self._joined[number]
        if joined is None or joined.chains != chains:  # what no step changes is joined once for the same pictures
            joined = self._joined[number] = stage.join(chains)
        with self._metrics.step.labels(stage.name).time():
            joined.advance()
        # All results before anything is noted: if one cannot be computed, the step is taken again.
        results = [stage.leave(chain) for chain in chains if chain.finished]
        self._metrics.batch.labels(stage.name).observe(len(pictures))
        for picture in pictures:
            picture.pending.num_steps += 1
            picture.pending.spans.step(stage.name, began_ns, len(pictures))
            picture.moved_s = time.monotonic()
            self._guarded([picture.pending], partial(show_preview, stage, picture))
        leaving = [picture for picture, chain in zip(pictures, chains, strict=True) if chain.finished]
        if leaving:
            self._schedule.note_left(number, max(len(chain.timesteps) for chain in chains if chain.finished))
            self._joined[number] = None
        for picture, result in zip(leaving, results, strict=True):
            picture.batch = picture.batch.with_values(**{stage.makes: result})
            self._metrics.stage.labels(stage.name).observe(time.monotonic() - picture.arrived_s)
            picture.chain, picture.stage, picture.arrived_s = None, picture.stage + 1, time.monotonic()
            picture.moved_s = picture.arrived_s
        complete = {picture for picture in leaving if picture.finished}
        num_sampled = sum(one.pending.is_last and not one.pending.rest for one in complete)
        with self._changed:
            self._stats.steps += 1
            self._stats.rows += len(pictures)
            self._note_sampled(num_sampled)
            self._active = [picture for picture in self._active if picture not in complete]
            self._note_gone(len(complete))
        for pending in {picture.pending for picture in complete}:
            if pending.finished:
                self._guarded([pending], partial(self._end_phase, pending))

    def _begin_phase(self, pending: Pending, phase: Phase, *, is_last: bool) -> None:
        """Let a request begin with those stages of a phase that come first and are this engine's."""
        pending.phase, pending.rest = self._stages.split(phase)
        stages = {self._stages.number(stage): stage for stage in pending.phase.stages}
        pending.cost = cost_of(stages, pending.request, self._schedule.loads)
        pending.is_last, pending.batch, pending.pictures = is_last, None, []
        pending.spans.wait()

    def _end_phase(self, pending: Pending) -> None:
        """Answer a request, hand it on, or let its next phase wait."""
        values = [picture.batch.values for picture in pending.pictures]
        if pending.is_last and not pending.rest:
            self._answer(pending, values)
            return
        made = {stage.makes for stage in pending.phase.stages}
        assert pending.batch is not None
        batch = pending.batch.with_values(**{name: torch.cat([value[name] for value in values]) for name in made})
        if pending.rest or pending.phase.then is None:
            self._hand_on(pending, batch)
            return
        phase = pending.phase.then(batch.values)
        with self._changed:
            self._begin_phase(pending, phase, is_last=phase.then is None)
            self._waiting.add(pending, pending.client)

    def _hand_on(self, pending: Pending, batch: Batch) -> None:
        """End a request here: another engine does what is left."""
        step = self._stages.step_of(pending.rest[0]) if pending.rest else ""
        sent = portable(batch, [self._stages[number] for number in pending.rest])
        taken_s = time.monotonic() - pending.arrived_s
        if pending.future.set_running_or_notify_cancel():
            pending.future.set_result(Work(sent, pending.rest, step, pending.is_last, pending.num_steps, taken_s))
        else:
            self._count_dropped({pending})

    def _answer(self, pending: Pending, values: Sequence[Mapping[str, torch.Tensor]]) -> None:
        images = to_uint8(torch.cat([value[PIXELS] for value in values])).cpu().numpy()
        z_image = (
            torch.cat([value[Z_IMAGE] for value in values]).float().cpu().numpy() if Z_IMAGE in values[0] else None
        )
        if pending.future.set_running_or_notify_cancel():
            self._metrics.requests.labels("answered").inc()
            self._metrics.sampling.observe(time.monotonic() - pending.arrived_s)
            pending.future.set_result(SampledPictures(images, z_image, pending.num_steps))
        else:  # its client left after the last step
            self._count_dropped({pending})
        pending.pictures = []  # they refer to it: an edit's pictures would stay until the next search for such circles

    def _note_sampled(self, count: int) -> None:
        self._stats.pictures += count
        self._metrics.pictures.inc(count)

    def _note_gone(self, count: int) -> None:
        """Update the mean time between two pictures that make room for others: answered, or in another engine now."""
        if count:
            now = time.monotonic()
            taken_s = (now - self._since_s) / count
            self._picture_s += (taken_s - self._picture_s) * (_SMOOTHING if self._picture_s else 1.0)
            self._since_s = now

    def _number(self, picture: Picture) -> int:
        """Number of the stage in which a picture is."""
        return self._stages.number(picture.pending.phase.stages[picture.stage])

    def _guarded(self, requests: Sequence[Pending], act: Callable[[], None]) -> None:
        """Run a part of the loop; an error fails its requests, and the loop continues."""
        try:
            act()
        except Exception as error:  # noqa: BLE001  (it fails the request, not the server)
            if not isinstance(error, EditError):
                _log.exception("sampling failed")
            self._fail(requests, error)

    def _fail(self, requests: Iterable[Pending], error: Exception) -> None:
        failed = {pending for pending in requests if not pending.future.done()}  # a cancelled one is dropped
        for pending in failed:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(error)
        with self._changed:
            self._stats.failed += len(failed)
            self._count_lost("failed", failed)
            self._remove(failed)

    def _drop(self) -> None:
        """Drop requests that were cancelled, or whose time is up; call with the lock held."""
        now_s = time.monotonic()
        dropped = {pending for pending in self._unanswered() if pending.future.cancelled() or pending.ends_s <= now_s}
        for pending in dropped:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(DeadlinePassed())
        self._count_dropped(dropped)
        self._remove(dropped)

    def _count_dropped(self, requests: set[Pending]) -> None:
        """Count requests that nobody waits for: whoever waits gives up, too, when the time is up."""
        now_s = time.monotonic()
        expired = {pending for pending in requests if pending.ends_s <= now_s}
        with self._changed:
            self._stats.expired += len(expired)
            self._stats.dropped += len(requests) - len(expired)
            self._count_lost("expired", expired)
            self._count_lost("cancelled", requests - expired)

    def _count_lost(self, outcome: str, requests: set[Pending]) -> None:
        self._metrics.requests.labels(outcome).inc(len(requests))
        self._metrics.wasted_steps.labels(outcome).inc(sum(pending.num_steps for pending in requests))

    def _unanswered(self) -> set[Pending]:
        return {*self._waiting, *(picture.pending for picture in self._active)}

    def _remove(self, requests: set[Pending]) -> None:
        if requests:
            for pending in requests:
                self._waiting.remove(pending)
            self._active = [picture for picture in self._active if picture.pending not in requests]
            self._joined = [None] * len(self._stages)

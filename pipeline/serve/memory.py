"""How many pictures of each stage fit into a device's memory: measured when an engine starts, asked before every step.

A few steps of each stage with one picture, and with more, give a line: what a step takes, and what each picture adds.
How much is free changes while a server runs (pictures in progress, another engine on the same GPU), so it is read each
time.
"""

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from models.cascade import Cascade
from models.request import SampleRequest
from models.stage import PIXELS, Z_IMAGE, Batch, Stage
from models.text import TextEncoding
from pipeline.allocator import return_freed_memory
from pipeline.clip.frozen import FrozenClip
from pipeline.errors import StepError
from pipeline.machine import free_memory_bytes, own_memory_bytes
from pipeline.serve.cost import candidates
from pipeline.serve.embedder import TEXTS_AT_ONCE
from pipeline.serve.in_progress import Picture
from pipeline.serve.served_stages import ServedStages

_COUNTS = (1, 2, 4)
"""Pictures that are measured, as far as they fit; the fewest and the most give the line."""
_STEPS = 2
"""Steps of each: samplers of second order keep more after the first one."""
_GUIDED = 2.0
_USABLE = 0.9
"""Share of the free memory that is used: the allocator cannot fill every gap."""
READ_EVERY_S = 0.1
_KERNELS = 1.25
"""What a process takes of a CPU's memory, in what torch allocates: kernels allocate something by themselves, at the
demo's sizes up to a fifth more."""
_SILENT = "6"  # else each start of the profiler is a line on stderr
_BYTES_PER_GB = 1e9


class DeviceMemory(Protocol):
    """The memory of a device."""

    can_refuse: bool
    """Whether to ask for too much is an error, and not the end of the process."""

    def computing(self) -> AbstractContextManager[None]:
        """Held by whoever computes, so that a measurement sees its own memory alone."""
        ...

    def stepping(self) -> AbstractContextManager[object]:
        """Held by an engine from asking what is free to the end of the step that takes it."""
        ...

    def free_bytes(self) -> int:
        """What can be allocated now."""
        ...

    def make_room(self) -> None:
        """Give up what is kept for later steps and does not count as free."""
        ...

    def measure(self, act: Callable[[], object]) -> tuple[int, int]:
        """What ``act`` allocates at most, and what its result keeps, in bytes; MemoryError if that is not free."""
        ...


class Quiet:
    """Lets any number of threads compute together, or one measure alone: it waits for those that compute already."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_computing = 0
        self._is_measuring = False

    @contextmanager
    def computing(self) -> Generator[None]:
        """For whoever computes."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_measuring)
            self._num_computing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_computing -= 1
                self._changed.notify_all()

    @contextmanager
    def measuring(self) -> Generator[None]:
        """For whoever measures."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_measuring)
            self._is_measuring = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._num_computing)
            yield
        finally:
            with self._changed:
                self._is_measuring = False
                self._changed.notify_all()


class GpuMemory:
    """The memory of this process's GPU.

    Args:
        share: Of the GPU, if other processes have the rest: its allocator takes no more.
    """

    can_refuse = True
    _quiet = Quiet()
    """Of all engines of this process: networks that a swap loads are measured beside those that work."""

    def __init__(self, share: float = 1.0) -> None:
        self._share = min(1.0, share)
        torch.cuda.set_per_process_memory_fraction(self._share)

    def computing(self) -> AbstractContextManager[None]:
        """See ``DeviceMemory``."""
        return self._quiet.computing()

    def stepping(self) -> AbstractContextManager[object]:
        """See ``DeviceMemory``: a step for which there is no memory is an error, and tried in halves."""
        return nullcontext()

    def free_bytes(self) -> int:
        """See ``DeviceMemory``."""
        free, total = torch.cuda.mem_get_info()
        allocated = torch.cuda.memory_allocated()
        return min(free + torch.cuda.memory_reserved() - allocated, int(self._share * total) - allocated)

    def make_room(self) -> None:
        """See ``DeviceMemory``: what the allocator keeps counts as free."""

    def measure(self, act: Callable[[], object]) -> tuple[int, int]:
        """See ``DeviceMemory``."""
        with self._quiet.measuring():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                result = act()
                torch.cuda.synchronize()
                peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from None
            del result
        return peak - before, max(0, kept - before)


class HostMemory:
    """The memory of this machine, within the limits of its container.

    What a step takes is counted as torch allocates it, because a process that takes too much is killed and not refused.

    Args:
        most_bytes: Of this process, which may share the machine with others that see the same free memory.
    """

    can_refuse = False
    _profiles = threading.Lock()
    """torch has one profiler; it records the allocations of its own thread alone."""
    _turns = threading.Lock()
    """Of all engines of this process, while networks are swapped: each would take all that is free."""

    def __init__(self, most_bytes: float = math.inf) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
        self._most_bytes = most_bytes
        self._free_bytes = 0
        self._read_at = self._made_at = float("-inf")

    def computing(self) -> AbstractContextManager[None]:
        """See ``DeviceMemory``; others may compute while one measures."""
        return nullcontext()

    def stepping(self) -> AbstractContextManager[object]:
        """See ``DeviceMemory``."""
        return self._turns

    def free_bytes(self) -> int:
        """See ``DeviceMemory``; read a few times a second, since steps of small networks take no longer than that."""
        now = time.monotonic()
        if now - self._read_at > READ_EVERY_S:
            left = self._most_bytes - own_memory_bytes()
            self._free_bytes, self._read_at = int(max(0, min(free_memory_bytes(), left))), now
        return self._free_bytes

    def make_room(self) -> None:
        """See ``DeviceMemory``; as often as ``free_bytes`` reads.

        What a step has freed stays with the process, up to 1 GiB (``use_cores``). It is no room for every step: blocks
        of another size, or of another thread, do not fit.
        """
        now = time.monotonic()
        if now - self._made_at > READ_EVERY_S:
            return_freed_memory()
            self._made_at, self._read_at = now, float("-inf")

    def measure(self, act: Callable[[], object]) -> tuple[int, int]:
        """See ``DeviceMemory``."""
        profile: Any = torch.autograd.profiler.profile(profile_memory=True)
        with self._profiles, profile:
            result = act()
        del result
        events = profile.kineto_results.events()
        sizes = (event.nbytes() for event in events if event.name() == "[memory]")  # negative of what is freed
        taken = list(itertools.accumulate(sizes, initial=0))
        return int(_KERNELS * max(taken)), taken[-1]


@dataclass(frozen=True)
class _Line:
    """Memory of a step, in bytes."""

    fixed: float
    each: float

    def most(self, free: float) -> float:
        """Pictures that fit into ``free`` bytes; below 1 if none does."""
        return (free - self.fixed) / max(self.each, 1.0)


class MemoryLimits:
    """How many pictures an engine may take, by what is free.

    Args:
        cascade: The trained networks.
        stages: Those that the engine has.
        memory: Of its device.
        device: Its name.

    Raises:
        StepError: If one picture of a stage does not fit.
    """

    def __init__(
        self, cascade: Cascade, stages: ServedStages, memory: DeviceMemory, device: torch.device | str
    ) -> None:
        self._memory = memory
        self._stages = stages
        self._lines: dict[str, _Line] = {}
        """By the step of the recipe whose network it is; edits have other stages of the same networks."""
        self._measured: list[tuple[Stage, _Line]] = []
        self._kept = 0.0
        """What a picture in progress keeps between its steps, in bytes."""
        for stage in cascade.stages:
            if stages.has(stages.number(stage)):
                self._measure(stage, cascade, device)
        self._reserved = self._clip_bytes(cascade.clip) if stages.has_clip else 0
        self._most_free = 0.0
        """The most that was ever free, in bytes: at the start, networks that a swap replaces may be there as well."""
        self._memory.make_room()
        self._free_bytes()

    def fitting(self, number: int, pictures: Sequence[Picture]) -> list[Picture]:
        """Those of ``pictures`` that may take a step together now, at least one: the nearest to their end.

        One alone with as many candidates as usual takes its step in any case, so what is free is not read before it:
        somebody waits. ``make_room`` looks after its room.
        """
        stage, line = self._stages[number], self._line(number)
        if len(pictures) == 1 and _weight(stage, pictures[0].pending.request) <= 1:
            return list(pictures)
        needed = line.fixed + line.each * sum(_weight(stage, picture.pending.request) for picture in pictures)
        most = line.most(self._room_for(needed))
        fitting, taken = list[Picture](), 0.0
        for picture in sorted(pictures, key=lambda picture: picture.position, reverse=True):
            taken += _weight(stage, picture.pending.request)
            if fitting and taken > most:
                break
            fitting.append(picture)
        return fitting

    def make_room(self) -> None:
        """Give up what steps have left behind if a step of one picture, of any stage, would not fit beside it."""
        self._room_for(max((line.fixed + line.each for _, line in self._measured), default=0.0))

    def admits(self, entering: Sequence[SampleRequest], active: Sequence[SampleRequest]) -> bool:
        """Whether pictures may begin beside those in progress, so that one of any stage can still take a step.

        Args:
            entering: The request of each picture that would begin.
            active: That of each in progress.
        """
        steps = (
            line.fixed + line.each * _weight(stage, one)
            for stage, line in self._measured
            for one in (*entering, *active)
        )
        kept = self._kept * sum(
            max((_weight(stage, one) for stage, _ in self._measured), default=0) for one in entering
        )
        needed = max(steps, default=0.0) + kept
        return needed <= self._room_for(needed)

    def require_room(self, request: SampleRequest) -> None:
        """Refuse a picture that does not fit alone.

        Raises:
            ValueError: If the request asks for more candidates than there was ever memory for.
        """
        larger = [(stage, line) for stage, line in self._measured if _weight(stage, request) > 1]
        if larger:  # else it cannot be refused, and whoever asks is kept from the networks' next answer
            self._free_bytes()
        for stage, line in larger:
            most = max(1.0, line.most(self._most_free))
            if _weight(stage, request) > most:
                count = int(most * getattr(stage, "num_candidates", 1))
                message = f"this server has memory for {count} candidates of a picture at most"
                raise ValueError(f"num_candidates = {request.num_candidates}: {message}")

    def _line(self, number: int) -> _Line:
        return self._lines[self._stages.step_of(number)]

    def _room_for(self, needed: float) -> float:
        """What is free, in bytes; if ``needed`` is more than that, with what was kept for later steps."""
        free = self._free_bytes()
        if needed <= free:
            return free
        self._memory.make_room()
        return self._free_bytes()

    def _free_bytes(self) -> float:
        free = _USABLE * self._memory.free_bytes() - self._reserved
        self._most_free = max(self._most_free, free)
        return free

    def _measure(self, stage: Stage, cascade: Cascade, device: torch.device | str) -> None:
        usual = getattr(stage, "num_candidates", 1)
        peaks, keeps = dict[float, int](), dict[float, float]()
        # A picture with one candidate is a part of one with as many as usual.
        sizes = {1 / usual: (1, 1)} | {float(count): (count, usual) for count in _COUNTS}
        # The first one is measured twice: what a stage makes once, such as its tables, is no part of a step.
        for size in (min(sizes), *sizes):
            count, num_candidates = sizes[size]
            request = SampleRequest("", tuple(range(count)), num_candidates=num_candidates)
            if count > 1 and not self._memory.can_refuse and count * peaks[1.0] > _USABLE * self._memory.free_bytes():
                break
            try:
                peaks[size], kept = self._memory.measure(lambda: _try(stage, cascade, request, device))  # noqa: B023
            except MemoryError:
                if size <= 1:
                    free_gb = self._memory.free_bytes() / _BYTES_PER_GB
                    raise StepError(
                        f"serve: one picture of {stage.name} does not fit into the {free_gb:.2f} GB that are free on "
                        "this device; give each replica a larger share of one (serve.gpus_per_replica; in a chain that "
                        "of its part, such as serve.decoder.gpus_per_replica)"
                    ) from None
                break
            keeps[size] = kept / count
        self._kept = max(self._kept, *keeps.values())
        (first, peak), (last, highest) = min(peaks.items()), max(peaks.items())
        each = max(0.0, (highest - peak) / (last - first)) if last > first else peak
        line = self._lines[self._stages.step_of(self._stages.number(stage))] = _Line(peak - each * first, each)
        self._measured.append((stage, line))

    def _clip_bytes(self, clip: Any) -> int:
        """What embeddings take, which are made beside the steps."""
        texts, _ = self._memory.measure(lambda: clip.encode_text(["a picture " * 40] * TEXTS_AT_ONCE))
        if not isinstance(clip, FrozenClip):
            return texts
        picture = torch.zeros(1, clip.image_px, clip.image_px, 3, dtype=torch.uint8)
        return max(texts, self._memory.measure(lambda: clip.encode_image(picture))[0])


def _weight(stage: Stage, request: SampleRequest) -> float:
    """Rows of a picture, in those that were measured, which were guided."""
    return max(1.0, candidates(stage, request))


def _try(stage: Stage, cascade: Cascade, request: SampleRequest, device: torch.device | str) -> object:
    """A few steps of a request's pictures, guided if they can be; the chain that they leave."""
    dims, count = cascade.clip.dims, len(request.seeds)
    shape = (count, dims.context_length)
    text = TextEncoding(
        torch.zeros(count, dims.embed_dim, device=device),
        torch.zeros(*shape, dims.text_width, device=device),
        torch.ones(shape, dtype=torch.bool, device=device),
        torch.zeros(shape, dtype=torch.long, device=device),
    )
    values = {Z_IMAGE: F.normalize(torch.ones(count, dims.embed_dim, device=device), dim=-1)}
    if stage.low_res_px is not None:
        values[PIXELS] = torch.zeros(count, 3, stage.low_res_px, stage.low_res_px, device=device)
    guided = replace(request, guidance_scale={stage.name: _GUIDED})
    try:
        stage.check(guided)
        request = guided
    except ValueError:  # it has no guidance
        pass
    with torch.inference_mode():
        chain = stage.enter(Batch(text, request.seeds, values, request))
        joined = stage.join([chain])
        for _ in range(min(_STEPS, len(chain.timesteps))):
            joined.advance()
        stage.preview(chain)
        return chain

"""Batches that fit into memory; a device that counts the rows of each call of a network stands for a GPU."""

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.errors import StepError
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.loading import load_engine
from pipeline.runtime.parts import write_tables
from pipeline.serve import memory as memory_module
from pipeline.serve.engine import Engine
from pipeline.serve.memory import GpuMemory, HostMemory, MemoryLimits, Quiet
from pipeline.serve.served_stages import ServedStages
from tests.serve.test_engine import wait_until
from tests.tiny.networks import make_cascade, save_cascade

_FIXED, _EACH = 1000, 100


class Device:
    """Has room for calls of so many rows, in bytes; a call of a network takes ``_FIXED`` and ``_EACH`` a row."""

    can_refuse = True

    def __init__(self, room: int, kept: int = 0) -> None:
        self.room = room
        self.kept = kept
        self.held = 0
        """Rows for which it has room once it gives up what it keeps for later steps."""
        self.peak = 0
        self.num_readings = 0
        self.rows: dict[str, int] = {}
        """Most rows of a call, by the class of the network."""

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def free_bytes(self) -> int:
        self.num_readings += 1
        return math.ceil((_FIXED + self.room * _EACH) / 0.9)

    def make_room(self) -> None:
        self.room, self.held = self.room + self.held, 0

    def measure(self, act: Callable[[], object]) -> tuple[int, int]:
        self.peak = 0
        result: Any = act()
        self.rows.clear()
        return self.peak, self.kept * len(getattr(result, "batch", ()))

    def note_call(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = max(len(one) for one in inputs if isinstance(one, Tensor))
        self.peak = max(self.peak, _FIXED + _EACH * rows)
        if rows > self.room:
            raise MemoryError(f"{rows} rows")
        self.rows[type(network).__name__] = max(rows, self.rows.get(type(network).__name__, 0))


@pytest.fixture
def use(cascade: Cascade) -> Iterator[Callable[[Device], Device]]:
    hooks = list[Any]()

    def attach(device: Device) -> Device:
        hooks.extend(stage.network.register_forward_pre_hook(device.note_call) for stage in cascade.stages)  # pyright: ignore[reportAttributeAccessIssue]
        return device

    yield attach
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("has_limits", [True, False])
def test_no_step_needs_more_memory_than_there_is(
    make_engine: Callable[..., Engine], use: Callable[[Device], Device], has_limits: bool
) -> None:
    device = use(Device(6))
    engine = make_engine(max_batch_size=8, memory=device if has_limits else None)
    requests = [SampleRequest("a", (seed,), guidance_scale={"decoder": 2.0}) for seed in range(8)]
    requests.append(SampleRequest("a", (9,), num_candidates=3))
    for future in [engine.submit(request) for request in requests]:
        future.result(60)
    counts = engine.counts()
    assert (counts["failed"], counts["pictures"]) == (0, 9)
    assert (counts["halved"] == 0) == has_limits  # else it learns by failing
    if has_limits:
        assert device.rows == {"Prior": 6, "Decoder": 6, "Upsampler": 6}  # guided pictures are two rows


def test_measured_pictures_have_guidance_and_more_candidates_count_as_more(
    cascade: Cascade, use: Callable[[Device], Device]
) -> None:
    use(device := Device(40))
    limits = MemoryLimits(cascade, ServedStages(cascade, None, "cpu"), device, "cpu")
    lines = {name: (line.fixed, line.each) for name, line in limits._lines.items()}
    # Guided pictures are two rows, and this prior samples two candidates.
    assert lines == {"prior": (1000, 400), "decoder": (1000, 200), "upsampler_1": (1000, 100)}


def test_what_a_network_makes_once_is_no_part_of_its_steps(
    cascade: Cascade, use: Callable[[Device], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, first = use(Device(40, kept=500)), list[bool]()
    measure = device.measure

    def measure_cold(act: Callable[[], object]) -> tuple[int, int]:
        peak, kept = measure(act)
        first.append(not first)
        return peak + 300 * first[-1], kept + 300 * first[-1]

    monkeypatch.setattr(device, "measure", measure_cold)
    limits = MemoryLimits(cascade, ServedStages(cascade, ["upsampler_1"], "cpu"), device, "cpu")
    line = limits._lines["upsampler_1"]
    assert (line.fixed, line.each, limits._kept) == (1000, 100, 500)


def test_pictures_wait_for_the_memory_that_those_in_progress_keep(
    cascade: Cascade, use: Callable[[Device], Device]
) -> None:
    use(device := Device(40, kept=500))
    limits = MemoryLimits(cascade, ServedStages(cascade, None, "cpu"), device, "cpu")
    usual, several = SampleRequest("a", (0,)), SampleRequest("a", (0,), num_candidates=6)
    # 5,000 bytes are free, a step of one picture takes up to 1,400, with three times as many candidates 2,200.
    assert limits.admits([usual] * 7, [usual] * 3)
    assert not limits.admits([usual] * 8, [usual] * 3)
    assert limits.admits([usual] * 5, [several])
    assert not limits.admits([usual] * 6, [several])
    assert limits.admits([several, usual, usual], [])  # which keeps as much as three, too
    assert not limits.admits([several, several], [])
    device.room = 2
    assert not limits.admits([usual], [usual] * 3)


def test_what_is_kept_for_later_steps_is_given_up_for_a_picture_that_would_have_to_wait(
    cascade: Cascade, use: Callable[[Device], Device]
) -> None:
    use(device := Device(40))
    limits = MemoryLimits(cascade, ServedStages(cascade, None, "cpu"), device, "cpu")
    usual = SampleRequest("a", (0,))
    device.room, device.held = 4, 36
    assert limits.admits([usual], [usual])
    assert (device.room, device.held) == (4, 36)  # which fits as it is
    device.room = 3
    assert limits.admits([usual], [usual])
    assert (device.room, device.held) == (39, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_a_large_step_leaves_as_much_room_as_there_was() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _STEP_OF_600_MB]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before < 200
    assert after > 600


# The step is of a thread that is not the main one, as an engine's; free is 700 MB, without what the process takes.
_STEP_OF_600_MB = """
import threading
import psutil
import torch
from pipeline.networks.cores import use_cores
from pipeline.serve import memory

def step():
    blocks = [torch.ones(2 << 20) for _ in range(75)]

use_cores(1)
process = psutil.Process()
most = process.memory_info().rss + 700_000_000
memory.free_memory_bytes = lambda: most - process.memory_info().rss
thread = threading.Thread(target=step)
thread.start()
thread.join()
host = memory.HostMemory()
print(host.free_bytes() // 10**6)
host.make_room()
print(host.free_bytes() // 10**6)
"""


def test_more_candidates_than_there_is_memory_for_are_refused_before_they_wait(
    make_engine: Callable[..., Engine], use: Callable[[Device], Device]
) -> None:
    engine = make_engine(memory=use(Device(13)))
    with pytest.raises(ValueError, match="num_candidates = 7: this server has memory for 6 candidates of a picture"):
        engine.submit(SampleRequest("a", (0,), num_candidates=7))
    assert engine.submit(SampleRequest("a", (0,), num_candidates=6)).result(60).images.shape == (1, 32, 32, 3)
    assert engine.counts()["requests"] == 1


def test_memory_is_read_only_for_requests_that_may_be_refused(
    cascade: Cascade, use: Callable[[Device], Device]
) -> None:
    use(device := Device(40))
    limits = MemoryLimits(cascade, ServedStages(cascade, None, "cpu"), device, "cpu")
    device.num_readings = 0
    for num_candidates in (0, 1, 2):
        limits.require_room(SampleRequest("a", (0,), num_candidates=num_candidates))
    assert device.num_readings == 0
    limits.require_room(SampleRequest("a", (0,), num_candidates=3))
    assert device.num_readings == 1


def test_a_picture_alone_waits_for_no_reading_and_the_next_one_finds_room(
    cascade: Cascade, make_engine: Callable[..., Engine], use: Callable[[Device], Device]
) -> None:
    engine, readings = make_engine(memory=(device := use(Device(40)))), list[int]()
    prior: Any = cascade.stages[0]
    hook = prior.network.register_forward_pre_hook(lambda *_: readings.append(device.num_readings))
    device.num_readings, device.room, device.held = 0, 2, 36  # one picture has no room as it is measured, with guidance
    engine.submit(SampleRequest("a", (0,), guidance_scale={"prior": 1.0})).result(60)
    hook.remove()
    assert readings[0] == 0
    wait_until(lambda: not device.held)


def test_what_was_loaded_beside_other_networks_takes_as_many_candidates_as_alone_once_they_are_gone(
    cascade: Cascade, use: Callable[[Device], Device]
) -> None:
    use(device := Device(8))
    limits = MemoryLimits(cascade, ServedStages(cascade, None, "cpu"), device, "cpu")
    request = SampleRequest("a", (0,), num_candidates=6)
    with pytest.raises(ValueError, match="this server has memory for 4 candidates"):
        limits.require_room(request)
    device.room = 13  # the others are gone
    limits.require_room(request)
    device.room = 4  # pictures in progress keep the rest for a while
    limits.require_room(request)


def test_whoever_measures_is_alone_and_those_who_compute_are_not() -> None:
    quiet, log, may_end = Quiet(), list[str](), threading.Event()

    def compute(name: str) -> None:
        with quiet.computing():
            log.append(f"{name} begins")
            may_end.wait(60)
            log.append(f"{name} ends")

    def measure() -> None:
        with quiet.measuring():
            log.append("measured")
            time.sleep(0.05)
            log.append("over")

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(compute, name) for name in ("one", "two")]
        wait_until(lambda: len(log) == 2)  # together
        running.append(threads.submit(measure))
        time.sleep(0.1)
        running.append(threads.submit(compute, "late"))
        time.sleep(0.1)
        assert len(log) == 2
        may_end.set()
        for one in running:
            one.result()
    assert log[4:] == ["measured", "over", "late begins", "late ends"]


def test_steps_captions_and_embeddings_are_all_computed_where_a_measurement_waits_for_them(
    cascade: Cascade,
    make_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Device], Device],
) -> None:
    device, names, is_held = use(Device(40)), list[tuple[str, bool]](), threading.local()

    @contextmanager
    def computing() -> Iterator[None]:
        is_held.value = True
        yield
        is_held.value = False

    def watch(name: str) -> None:
        act = getattr(cascade.clip, name)

        def noted(*some: Any) -> Any:
            names.append((name, getattr(is_held, "value", False)))
            return act(*some)

        monkeypatch.setattr(cascade.clip, name, noted)

    monkeypatch.setattr(device, "computing", computing)
    engine = make_engine(memory=device)
    decoder: Any = cascade.stages[1]
    steps = decoder.network.register_forward_pre_hook(lambda *_: names.append(("step", is_held.value)))
    for name in ("encode_text", "embed_text", "encode_image"):
        watch(name)
    engine.submit(SampleRequest("a", (0,))).result(60)
    asyncio.run(engine.embed_texts(["a"]))
    asyncio.run(engine.embed_image(np.zeros((8, 8, 3), np.uint8)))
    steps.remove()
    assert {*names} == {("step", True), ("encode_text", True), ("embed_text", True), ("encode_image", True)}


def test_a_picture_that_does_not_fit_is_said_at_the_start(cascade: Cascade, use: Callable[[Device], Device]) -> None:
    with pytest.raises(StepError, match=r"one picture of prior does not fit into the 0\.00 GB ") as refused:
        Engine(cascade, memory=use(Device(1)))
    assert "serve.gpus_per_replica" in str(refused.value)
    for table in ({"gpus_per_replica": 0.5}, {"mode": "chain", "decoder": {"gpus_per_replica": 0.5}}):
        parse_recipe({"serve": table})  # the fields that the error names
    use(device := Device(1))  # one fits, two do not
    limits = MemoryLimits(cascade, ServedStages(cascade, ["upsampler_1"], "cpu"), device, "cpu")
    assert limits._lines["upsampler_1"].each == _FIXED + _EACH


def test_a_share_of_a_gpu_is_all_that_is_free_and_a_full_one_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's questions to the driver and to its allocator, answered by numbers of a test."""
    allocated, fractions = [300, 900, 400], list[float]()
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert GpuMemory(2.0).free_bytes() == 5000 + 1000 - 300  # what the allocator keeps is free for it
    half = GpuMemory(0.5)
    assert (half.free_bytes(), fractions) == (5000 - 300, [1.0, 0.5])

    def act() -> None:
        allocated[0] = allocated[2]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated[1])
    assert half.measure(act) == (600, 100)

    def fail() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        half.measure(fail)
    with half.computing():  # a measurement that failed keeps nobody from it
        pass


def test_memory_of_a_machine_is_counted_by_tensors_without_the_weights() -> None:
    network = nn.Linear(1000, 1000)
    inputs = torch.ones(10, 1000)

    def act() -> Tensor:
        with torch.inference_mode():
            return network(inputs).relu()[:1]  # a view: what it is part of stays

    assert HostMemory().measure(act) == (1.25 * 2 * inputs.nbytes, inputs.nbytes)


def test_a_server_on_cpus_takes_what_fits_into_the_machine(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    free, own = 1 << 40, 10**9
    monkeypatch.setattr(memory_module, "free_memory_bytes", lambda: free)
    monkeypatch.setattr(memory_module, "own_memory_bytes", lambda: own)
    limits = MemoryLimits(cascade, ServedStages(cascade, None, "cpu"), HostMemory(), "cpu")
    assert all(line.each > 0 for line in limits._lines.values())
    line = limits._lines["upsampler_1"]
    little = int((12 * line.each + line.fixed + limits._reserved) / 0.9)

    counts, rows = list[int](), list[int]()
    upsampler: Any = cascade.stages[2]
    hook = upsampler.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for memory, left in ((None, little), (HostMemory(), little), (HostMemory(own + little), free)):
        free = left
        engine = make_engine(max_batch_size=32, memory=memory)
        rows.clear()
        for future in [engine.submit(SampleRequest("a", (seed,))) for seed in range(32)]:
            future.result(60)
        counts.append(max(rows))
        assert engine.counts()["failed"] == 0
    hook.remove()
    assert counts[0] > 12  # the first may be a step ahead of the others
    assert all(1 < count <= 12 for count in counts[1:])


def test_a_copy_on_cpus_has_what_its_recipe_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "own_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(memory_module, "free_memory_bytes", lambda: 10**12)
    save_cascade(make_cascade(), tmp_path)
    free = list[int]()
    for gigabytes in (1.5, 0.5, 0):
        recipe = load_recipe(tmp_path, [f"serve.memory_gb_per_replica={gigabytes}"])
        engine = load_engine(write_tables(recipe, finished_artifacts(recipe, CASCADE_STEPS)))
        engine.close()
        assert engine._limits is not None
        free.append(engine._limits._memory.free_bytes())
    assert free == [5 * 10**8, 0, 10**12]


def test_engines_of_a_process_take_their_steps_in_turns_on_cpus(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may take all that is free, while a swap has two of them."""
    monkeypatch.setattr(memory_module, "free_memory_bytes", lambda: 1 << 40)
    engines = [make_engine(memory=HostMemory()) for _ in range(2)]
    decoder: Any = cascade.stages[1]
    together, inside, most = threading.Event(), list[int](), 0

    def come_in(*_: Any) -> None:
        nonlocal most
        inside.append(threading.get_ident())
        most = max(most, len(set(inside)))
        if most > 1:
            together.set()
        elif not waited.is_set():
            waited.set()
            together.wait(1)  # long enough for the other engine, if nothing kept it out

    waited = threading.Event()
    hooks = [
        decoder.network.register_forward_pre_hook(come_in),
        decoder.network.register_forward_hook(lambda *_: inside.remove(threading.get_ident())),
    ]
    try:
        for future in [engine.submit(SampleRequest("a", (0,))) for engine in engines]:
            future.result(60)
    finally:
        for hook in hooks:
            hook.remove()
    assert (waited.is_set(), most) == (True, 1)


def test_more_pictures_are_not_measured_where_they_would_end_the_process(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list[int]()
    upsampler: Any = cascade.stages[2]
    hook = upsampler.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(memory_module, "free_memory_bytes", lambda: 1000)
    MemoryLimits(cascade, ServedStages(cascade, ["upsampler_1"], "cpu"), HostMemory(), "cpu")
    hook.remove()
    assert {*rows} == {1}

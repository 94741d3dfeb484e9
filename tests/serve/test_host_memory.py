"""The memory of a machine, and of a GPU: what is free, what a step takes, and who may compute meanwhile."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.loading import load_engine
from pipeline.runtime.parts import write_tables
from pipeline.serve import memory as memory_module
from pipeline.serve.engine import Engine
from pipeline.serve.memory import GpuMemory, HostMemory, MemoryLimits, Quiet
from pipeline.serve.served_stages import ServedStages
from tests.serve.test_engine import wait_until
from tests.tiny.networks import make_cascade, save_cascade


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

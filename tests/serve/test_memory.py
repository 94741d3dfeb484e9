"""Batches that fit into memory; a device that counts the rows of each call of a network stands for a GPU."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.errors import StepError
from pipeline.recipe.recipe import parse_recipe
from pipeline.serve.engine import Engine
from pipeline.serve.memory import MemoryLimits
from pipeline.serve.served_stages import ServedStages
from tests.serve.test_engine import wait_until

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

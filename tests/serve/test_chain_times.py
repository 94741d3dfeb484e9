"""The time of a request in a chain: what is left of it for each part, and whether it will suffice."""

import asyncio
import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.runtime.remote_model import RemoteModel
from pipeline.runtime.replicas import Hop
from pipeline.serve.engine import Engine
from pipeline.serve.estimate import PartLoad, StageLoad, estimate_s
from pipeline.serve.protocols import DeadlinePassed, Overloaded, SampledPictures, TooLittleTime
from pipeline.serve.step_times import StepTimes


def test_each_part_of_a_chain_gets_the_time_that_is_left() -> None:
    times_s = list[float]()

    class Part:
        """Stands for Ray's handle."""

        async def remote(self, _served: str, request: SampleRequest, _client: str, hop: Hop | None, _later: Any) -> Any:
            times_s.append(request.timeout_s)
            await asyncio.sleep(0.1)
            return Hop("decoder", None) if hop is None else SampledPictures(np.zeros((1, 2, 2, 3), np.uint8), None)

    handle: Any = type("Handle", (), {"sample": Part(), "broadcast": Mock(side_effect=TimeoutError)})()
    model = RemoteModel({"prior": handle, "decoder": handle}, "one")
    asyncio.run(model.sample(SampleRequest("a", (1,), timeout_s=5)))
    first_s, second_s = times_s
    assert 4 < second_s <= first_s - 0.1 < 5
    with pytest.raises(DeadlinePassed):
        asyncio.run(model.sample(SampleRequest("a", (1,), timeout_s=0.05)))
    assert len(times_s) == 3  # the second part was not asked
    assert not any(map(math.isinf, times_s))


def test_a_full_chain_says_when_one_of_its_requests_is_likely_to_leave() -> None:
    may_end = asyncio.Event()

    class Part:
        """Stands for Ray's handle."""

        async def remote(self, _served: str, request: SampleRequest, *_: Any) -> Any:
            await (asyncio.sleep(0.4) if request.prompt == "first" else may_end.wait())
            return SampledPictures(np.zeros((1, 2, 2, 3), np.uint8), None)

    handle: Any = type("Handle", (), {"sample": Part()})()

    async def fill() -> float:
        model = RemoteModel({"prior": handle}, "one", most=4)
        await model.sample(SampleRequest("first", (1,)))
        open_ones = [asyncio.create_task(model.sample(SampleRequest("a", (seed,)))) for seed in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="4 requests are under way already") as refused:
            await model.sample(SampleRequest("a", (9,)))
        may_end.set()
        await asyncio.gather(*open_ones)
        return refused.value.retry_after_s

    assert 0.1 <= asyncio.run(fill()) < 0.4  # of four that take 0.4 s each, one leaves every 0.1 s


def part_load(number: int, step_s: float, pictures: float, num_engines: int = 1) -> PartLoad:
    """A part with one stage of ten steps, each of which takes as long whatever it holds; up to 4 pictures."""
    times = StepTimes()
    for count in (1, 4):
        times.add(count, step_s)
    return PartLoad({number: StageLoad(4, times, steps=10)}, 4, pictures, num_engines)


def test_a_request_passes_every_part_and_waits_where_most_has_to_be_done() -> None:
    quick, slow = part_load(0, 0.01, 0), part_load(1, 0.1, 0)
    assert estimate_s([quick], {0: 0}, 1) == pytest.approx(0.1)
    assert estimate_s([quick, slow], {0: 0, 1: 0}, 1) == pytest.approx(1.1)
    assert estimate_s([quick, slow], {0: 0, 1: 20}, 1) == pytest.approx(2.1)
    assert estimate_s([quick, slow], {0: 0}, 1) == pytest.approx(0.1)  # it ends at the first one
    # Seven pictures ahead of one fill the slow part twice, wherever they are now; two engines share them.
    for quick_has, slow_has in ((0, 7), (7, 0)):
        busy = [part_load(0, 0.01, quick_has), part_load(1, 0.1, slow_has)]
        assert estimate_s(busy, {0: 0, 1: 0}, 1) == pytest.approx(2.1)
    shared = [quick, part_load(1, 0.1, 6, num_engines=2)]
    assert estimate_s(shared, {0: 0, 1: 0}, 1) == pytest.approx(1.1)


def test_the_first_part_of_a_chain_refuses_what_the_others_cannot_do_in_time(cascade: Cascade) -> None:
    engine = Engine(cascade, steps={"clip", "prior"})
    try:
        decoder = engine._stages.number(cascade.stages[1])
        busy, idle = (part_load(decoder, 1.0, pictures) for pictures in (4, 0))
        request = SampleRequest("a", (0,), timeout_s=15)
        with pytest.raises(TooLittleTime, match="15 s are less than the 12") as refused:
            engine.submit(SampleRequest("a", (0,), num_steps={"decoder": 100}, timeout_s=15), later=[busy])
        assert 100 < refused.value.retry_after_s < 130
        assert engine.submit(request, later=[busy]).result(60).step == "decoder"
        with pytest.raises(TooLittleTime):
            engine.submit(request, later=[part_load(decoder, 1.0, 12)])
        assert engine.submit(SampleRequest("a", (0,), timeout_s=9), later=[idle]).result(60).step == "decoder"
    finally:
        engine.close()


def test_the_parts_of_a_chain_are_asked_what_they_have_to_do_once_a_second() -> None:
    later_loads, calls = list[Any](), list[str]()

    class First:
        """Stands for Ray's handle."""

        async def remote(self, _served: str, _request: SampleRequest, _client: str, _hop: Any, later: Any) -> Any:
            later_loads.append(later)
            return SampledPictures(np.zeros((1, 2, 2, 3), np.uint8), None)

    def later_part(part: str, *engines: Any) -> Any:
        def broadcast(method: str) -> Any:
            calls.append(f"{part}: {method}")
            return Mock(results=Mock(return_value=[*engines]))

        return Mock(broadcast=broadcast)

    new, old = part_load(1, 0.0, 2), part_load(1, 0.5, 3)
    new.stages[1].times.num_steps = 0
    model = RemoteModel(
        {
            "prior": Mock(sample=First()),
            "decoder": later_part("decoder", new, old, RuntimeError("it starts")),
            "upsampler_1": later_part("upsampler_1"),
            "neighbours": later_part("neighbours"),
        },
        "one",
    )

    async def ask() -> None:
        await model.sample(SampleRequest("a", (1,)))
        assert not calls
        for _ in range(3):
            await model.sample(SampleRequest("a", (1,), timeout_s=5))
            await asyncio.sleep(0.1)

    asyncio.run(ask())
    assert calls == ["decoder: load", "upsampler_1: load"]
    assert [len(later) for later in later_loads] == [0, 0, 1, 1]
    [decoder] = later_loads[-1]
    assert (decoder.pictures, decoder.num_engines, decoder.stages[1].times.time_s) == (5, 2, 0.5)

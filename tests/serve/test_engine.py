import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.cascade import Cascade
from models.request import SampleRequest
from models.stage import Chain
from pipeline.serve import engine_loop as loop_module
from pipeline.serve.engine import Engine
from pipeline.serve.protocols import NotServing, Overloaded
from tests.tiny.pictures import almost_equal

PROMPTS = ["a red circle", "a large blue square above a small green star", "two", "a red circle"]
SEEDS = [1, 2, 3, 4]
GUIDED = ("prior", "decoder")
REQUESTS = [SampleRequest(prompt, (seed,)) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_engine_samples_alone_what_the_cascade_samples_to_the_bit(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine()
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        sampled, expected = engine.submit(SampleRequest(prompt, (seed,))).result(60), cascade.sample([prompt], [seed])
        assert np.array_equal(sampled.images, expected.images.numpy())
        assert np.array_equal(sampled.z_image, expected.z_image.numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": {"decodr": 2.0}}, "no stage decodr; this cascade has prior, decoder, upsampler_1"),
        ({"guidance_scale": {"upsampler_1": 2.0}}, "upsampler_1 has no guidance"),
        ({"guidance_scale": {"decoder": -1.0}}, "guidance_scale = -1.0"),
        ({"num_steps": {"decoder": 0}}, "num_steps = 0"),
        ({"num_steps": {"decoder": 1001}}, "num_steps = 1001 is above"),
    ],
)
def test_engine_refuses_what_the_stages_cannot_do(
    make_engine: Callable[..., Engine], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine().submit(SampleRequest("a", (0,), **changes))


def test_engine_gives_each_request_its_own_pictures_in_the_order_of_its_seeds(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(max_batch_size=3)
    futures = [
        engine.submit(SampleRequest(prompt, (seed, seed + 10))) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    for prompt, seed, future in zip(PROMPTS, SEEDS, futures, strict=True):
        sampled = future.result(60)
        expected = cascade.sample([prompt, prompt], [seed, seed + 10])
        assert almost_equal(sampled.images, expected.images.numpy())
        np.testing.assert_allclose(sampled.z_image, expected.z_image.numpy(), atol=1e-3)
    stats = engine.counts()
    assert (stats["requests"], stats["pictures"], stats["failed"], stats["active"]) == (4, 8, 0, 0)


def test_engine_lets_a_late_request_join_those_under_way(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=8)
    first = engine.submit(SampleRequest("a", (0,)))
    wait_until(lambda: engine.counts()["steps"] >= 2)
    second = engine.submit(SampleRequest("b", (0,)))
    first.result(60), second.result(60)
    stats = engine.counts()
    assert stats["rows"] == 2 * (6 + 7 + 4)  # every step of both was taken once
    assert stats["steps"] < stats["rows"]  # and some of them together


def test_engine_keeps_within_its_batch_and_still_finishes_a_larger_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=2)
    future = engine.submit(SampleRequest("a", tuple(range(5))))
    most = 0
    while not future.done():
        most = max(most, engine.counts()["active"])
    assert most == 2
    assert future.result().images.shape == (5, 32, 32, 3)


def test_a_request_that_is_encoded_is_not_idle(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_go, encode = threading.Event(), threading.Event(), cascade.clip.encode_text

    def slow(texts: list[str]) -> Any:
        has_begun.set()
        assert may_go.wait(20)
        return encode(texts)

    monkeypatch.setattr(cascade.clip, "encode_text", slow)
    engine = make_engine()
    assert engine.idle
    future = engine.submit(SampleRequest("a", (1,)))
    assert has_begun.wait(20)
    counts = engine.counts()
    assert (counts["waiting"], counts["active"], engine.idle) == (0, 0, False)
    may_go.set()
    future.result(60)
    wait_until(lambda: engine.idle)
    cancelled = engine.submit(SampleRequest("a", (1,)))
    cancelled.cancel()
    wait_until(lambda: engine.idle)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[SampleRequest, float, float | None]:
    """A request, how long after the one before it comes, and how long after that it is cancelled, if it is; in seconds."""
    first = draw(st.integers(0, 99))
    request = SampleRequest(
        draw(st.sampled_from(PROMPTS)),
        tuple(range(first, first + draw(st.integers(1, 3)))),
        guidance_scale={stage: draw(st.sampled_from((1.0, 2.5))) for stage in draw(st.sets(st.sampled_from(GUIDED)))},
        num_steps={"decoder": draw(st.integers(1, 7))},
        negative_prompt=draw(st.sampled_from(("", "a blue star"))),
        side_px=draw(st.sampled_from((8, 32))),
        num_candidates=draw(st.sampled_from((0, 2))),
    )
    return request, draw(st.sampled_from((0.0, 0.01, 0.05))), draw(st.sampled_from((None, None, 0.0, 0.02)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests=st.lists(arrivals(), min_size=2, max_size=8), max_batch_size=st.integers(1, 6))
def test_requests_of_all_kinds_that_come_and_go_get_their_own_pictures(
    cascade: Cascade, requests: list[tuple[SampleRequest, float, float | None]], max_batch_size: int
) -> None:
    with closing(Engine(cascade, max_batch_size=max_batch_size)) as engine:
        futures: list[Future[Any]] = []
        for request, wait_s, leaves_s in requests:
            time.sleep(wait_s)
            futures.append(engine.submit(request, client=request.prompt))
            if leaves_s is not None:
                threading.Timer(leaves_s, futures[-1].cancel).start()
        for (request, _, leaves_s), future in zip(requests, futures, strict=True):
            try:
                sampled = future.result(60)
            except CancelledError:
                assert leaves_s is not None
                continue
            assert almost_equal(sampled.images, cascade.sample_request(request).images.numpy())
        wait_until(lambda: engine.idle and not engine.counts()["active"])
        counts = engine.counts()
    assert (counts["waiting"], counts["failed"], counts["refused"]) == (0, 0, 0)
    assert counts["dropped"] == sum(future.cancelled() for future in futures)


def test_engine_refuses_more_than_may_wait_and_takes_more_once_there_is_room(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_batch_size=1, max_waiting=2)
    under_way = engine.submit(SampleRequest("a", (0,)))
    wait_until(lambda: engine.counts()["active"] == 1)
    waiting = [engine.submit(SampleRequest("b", (0,))), engine.submit(SampleRequest("c", (0,)))]
    with pytest.raises(Overloaded, match="2 requests are waiting already"):
        engine.submit(SampleRequest("d", (0,)))
    waiting[1].cancel()
    last = engine.submit(SampleRequest("e", (0,)))
    for future in (under_way, waiting[0], last):
        assert future.result(60).images.shape == (1, 32, 32, 3)
    assert engine.counts()["refused"] == 1


def test_a_client_that_leaves_after_the_last_step_is_counted(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_size=1)
    futures: list[Future[Any]] = []
    convert = loop_module.to_uint8

    def leave(images: Any) -> Any:
        futures[0].cancel()
        return convert(images)

    monkeypatch.setattr(loop_module, "to_uint8", leave)
    futures.append(engine.submit(SampleRequest("a", (0,))))
    wait_until(lambda: engine.counts()["dropped"] == 1)
    assert futures[0].cancelled()


def test_engine_drops_a_request_that_nobody_waits_for(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=4)

    async def ask_and_leave() -> None:
        task = asyncio.create_task(engine.sample(SampleRequest("a", (0, 1, 2, 3))))
        while engine.counts()["active"] < 4:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(ask_and_leave())
    wait_until(lambda: engine.counts()["dropped"] == 1)
    stats = engine.counts()
    assert (stats["active"], stats["pictures"]) == (0, 0)
    assert stats["rows"] < 4 * (6 + 7 + 4)
    assert engine.submit(SampleRequest("b", (0,))).result(60).images.shape == (1, 32, 32, 3)


def test_engine_outlives_a_network_that_fails(cascade: Cascade, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=4)
    hook = cascade.stages[2].network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    try:
        with pytest.raises(MemoryError, match="full"):
            engine.submit(SampleRequest("a", (0,))).result(60)
    finally:
        hook.remove()
    assert engine.submit(SampleRequest("a", (0,))).result(60).images.shape == (1, 32, 32, 3)
    assert engine.alive
    assert engine.counts()["failed"] == 1


def test_a_step_that_fails_for_many_is_tried_in_halves_and_only_its_cause_fails(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    """A step of the upsampler has memory for three pictures, and none at all for one of them."""
    engine = make_engine(max_batch_size=8)
    low_res = upsampler_condition(cascade, "poison")

    def fail(_network: Any, arguments: tuple[Any, ...]) -> None:
        condition = arguments[2]
        if len(condition) > 3:
            raise MemoryError("too many")
        if any(torch.allclose(row, low_res, atol=1e-3) for row in condition):
            raise MemoryError("this one")

    hook = cascade.stages[2].network.register_forward_pre_hook(fail)
    try:
        futures = [engine.submit(SampleRequest("a", (seed,))) for seed in range(7)]
        failing = engine.submit(SampleRequest("poison", (0,)))
        with pytest.raises(MemoryError, match="this one"):
            failing.result(60)
        pictures = [future.result(60).images for future in futures]
    finally:
        hook.remove()
    for seed, picture in enumerate(pictures):
        assert almost_equal(picture, cascade.sample(["a"], [seed]).images.numpy())
    counts = engine.counts()
    assert counts["failed"] == 1
    assert counts["halved"] >= 2


def upsampler_condition(cascade: Cascade, prompt: str) -> torch.Tensor:
    """What the upsampler's network reads of the picture of a prompt and seed 0."""
    conditions: list[torch.Tensor] = []
    hook = cascade.stages[2].network.register_forward_pre_hook(lambda _, inputs: conditions.append(inputs[2][0]))
    try:
        cascade.sample([prompt], [0])
    finally:
        hook.remove()
    return conditions[0]


def test_a_result_that_cannot_be_computed_moves_no_picture_on(cascade: Cascade) -> None:
    """Two pictures end their last stage in one step, and there is no memory for the second result, once."""

    class Last:
        def __init__(self, stage: Any) -> None:
            self.stage, self.calls = stage, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stage, name)

        def leave(self, chain: Chain) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                raise MemoryError("no room for a result")
            return self.stage.leave(chain)

    engine = Engine(Cascade(cascade.clip, [*cascade.stages[:-1], Last(cascade.stages[-1])]), max_batch_size=2)
    try:
        sampled = engine.submit(SampleRequest("a", (0, 1))).result(60)
        assert almost_equal(sampled.images, cascade.sample(["a", "a"], [0, 1]).images.numpy())
        assert engine.submit(SampleRequest("b", (2,))).result(60).images.shape == (1, 32, 32, 3)
        assert engine.counts()["halved"] == 1
    finally:
        engine.close()


def test_a_preview_or_an_answer_that_fails_ends_its_request_alone(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_size=4)

    def fail(*_: Any) -> None:
        raise RuntimeError("nobody listens")

    shown = engine.submit(SampleRequest("a", (0,)), num_previews=1, show=fail)
    other = engine.submit(SampleRequest("b", (1,)))
    with pytest.raises(RuntimeError, match="nobody listens"):
        shown.result(60)
    assert almost_equal(other.result(60).images, cascade.sample(["b"], [1]).images.numpy())
    engine = make_engine(max_batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.serve.engine_loop.to_uint8", fail)
        with pytest.raises(RuntimeError, match="nobody listens"):
            engine.submit(SampleRequest("a", (0, 1))).result(60)
    assert engine.submit(SampleRequest("b", (1,))).result(60).images.shape == (1, 32, 32, 3)
    assert engine.alive


def test_late_pictures_catch_up_and_share_the_steps_of_those_ahead(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_size=8)
    engine.submit(SampleRequest("warm", (0,))).result(60)  # the engine learns how long the stages take
    before, note_step, futures = engine.counts(), engine._schedule.note_step, list[Future[Any]]()

    def note_and_ask(*step: Any) -> None:
        note_step(*step)
        if len(futures) < 6:  # one more request after each step, however long steps take
            futures.append(engine.submit(SampleRequest("a", (len(futures),))))

    monkeypatch.setattr(engine._schedule, "note_step", note_and_ask)
    futures.append(engine.submit(SampleRequest("a", (0,))))
    wait_until(lambda: len(futures) == 6)
    for future in futures:
        future.result(60)
    counts = engine.counts()
    assert (counts["rows"] - before["rows"]) == 6 * (6 + 7 + 4)
    assert (counts["rows"] - before["rows"]) / (counts["steps"] - before["steps"]) > 1.5  # one by one it is 1


def test_clients_and_requests_share_equally(make_engine: Callable[..., Engine]) -> None:
    """One picture behind ten requests of ten is among the first that are admitted."""
    engine = make_engine(max_batch_size=2)
    futures = [engine.submit(SampleRequest("many", tuple(range(10))), client="one") for _ in range(4)]
    late = engine.submit(SampleRequest("single", (0,)), client="another")
    late.result(60)
    assert engine.counts()["pictures"] <= 8
    same = engine.submit(SampleRequest("single", (1,)), client="one")
    before = engine.counts()["pictures"]
    same.result(60)
    assert engine.counts()["pictures"] - before <= 8
    assert not any(future.done() for future in futures)


@pytest.mark.parametrize("steps", [None, {"clip", "prior"}])
def test_a_full_engine_says_when_to_come_back(cascade: Cascade, steps: set[str] | None) -> None:
    """The estimate is near the time until one more may wait; that of a part of a chain, too."""
    networks = [stage.network for stage in cascade.stages]  # pyright: ignore[reportAttributeAccessIssue]
    hooks = [network.register_forward_pre_hook(lambda *_: time.sleep(0.02)) for network in networks]
    try:
        with closing(Engine(cascade, max_batch_size=2, max_waiting=2, steps=steps)) as engine:
            engine.submit(SampleRequest("a", tuple(range(6)))).result(60)
            futures = [engine.submit(SampleRequest("a", (0, 1)))]
            wait_until(lambda: engine.counts()["active"] == 2)
            futures += [engine.submit(SampleRequest("a", (seed, seed + 1))) for seed in (2, 4)]
            with pytest.raises(Overloaded) as caught:
                engine.submit(SampleRequest("a", (6,)))
            started_s = time.monotonic()
            wait_until(lambda: engine.counts()["waiting"] < 2)
            waited_s = time.monotonic() - started_s
            for future in futures:
                future.result(60)
    finally:
        for hook in hooks:
            hook.remove()
    assert waited_s / 4 < caught.value.retry_after_s < 4 * waited_s


def test_a_smaller_side_ends_at_the_first_stage_that_reaches_it(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine()
    small = engine.submit(SampleRequest("a", (0,), side_px=8)).result(60).images
    assert np.array_equal(small, cascade.sample(["a"], [0]).pictures["decoder"].numpy())
    assert engine.counts()["rows"] == 6 + 7
    assert engine.submit(SampleRequest("a", (0,), side_px=9)).result(60).images.shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="side_px = 33: this cascade ends at 32 px"):
        engine.submit(SampleRequest("a", (0,), side_px=33))


def test_engine_tells_those_who_wait_that_it_closes(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=1)
    futures = [engine.submit(SampleRequest("a", (seed,))) for seed in range(3)]
    engine.close()
    assert not engine.alive
    assert any(isinstance(future.exception(5), NotServing) for future in futures)
    with pytest.raises(NotServing, match="shutting down"):
        engine.submit(SampleRequest("b", (0,)))


def test_a_request_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no seeds"):
        SampleRequest("a", ())

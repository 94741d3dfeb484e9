"""Steps that fail for some pictures together: nothing of them is lost, and their stage learns how many it can take."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.stage import ArPriorStage
from models.cascade import Cascade
from models.request import SampleRequest
from models.stage import Chain
from pipeline.serve.engine import Engine
from pipeline.serve.protocols import Preview
from pipeline.serve.schedule import Schedule
from tests.models.tiny_models import randomise, with_stages
from tests.serve.test_engine import wait_until
from tests.tiny.pictures import almost_equal

OWN_STEPS = 6 + 7 + 4
"""Of a picture, in all stages."""


def test_pictures_that_do_not_fit_together_take_each_of_many_steps_once(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    """The decoder has memory for two pictures of four, and more steps than those after which it is trusted with more again."""
    engine, rows = make_engine(max_batch_size=4), list[int]()

    def count(_network: Any, inputs: tuple[Any, ...]) -> None:
        rows.append(len(inputs[0]))
        if rows[-1] > 2 * 2:  # guided pictures are two rows
            raise MemoryError("too many")

    requests = [SampleRequest("a", (seed,), num_steps={"decoder": 75}) for seed in range(4)]
    hook = cascade.stages[1].network.register_forward_pre_hook(count)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        sampled = [future.result(30) for future in [engine.submit(request) for request in requests]]
    finally:
        hook.remove()
    for request, one in zip(requests, sampled, strict=True):
        assert one.num_steps == 6 + 75 + 4
        assert almost_equal(one.images, cascade.sample_request(request).images.numpy())
    counts = engine.counts()
    assert counts["rows"] == 4 * (6 + 75 + 4)
    assert counts["halved"] == sum(count > 4 for count in rows) == 2  # four pictures, and three


class Unsteady:
    """A stage of which one step, or the first result, fails when everything has been computed."""

    def __init__(self, stage: Any, failing: str) -> None:
        self._stage, self._failing = stage, failing
        self._num_steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def join(self, chains: Sequence[Chain]) -> Any:
        joined = self._stage.join(chains)
        return SimpleNamespace(chains=joined.chains, advance=lambda: self._advance(joined))

    def _advance(self, joined: Any) -> None:
        joined.advance()
        self._num_steps += 1
        if self._failing == "step" and self._num_steps == 3:
            raise MemoryError("after the step")

    def leave(self, chain: Chain) -> torch.Tensor:
        if self._failing == "result":
            self._failing = ""
            raise MemoryError("no room for a result")
        return self._stage.leave(chain)


@pytest.mark.parametrize("failing", ["step", "result"])
@pytest.mark.parametrize("has_tokens", [False, True])
def test_a_step_that_failed_is_taken_again_with_the_same_noise(
    cascade: Cascade, failing: str, has_tokens: bool
) -> None:
    if has_tokens:
        torch.manual_seed(1)
        config = ArPriorConfig(width=16, depth=2, num_heads=2, num_components=9, num_buckets=16)
        randomise(prior := ArPrior(config, cascade.clip.dims))
        cascade = with_stages(cascade, ArPriorStage.of(prior))
    unsteady = Cascade(cascade.clip, [Unsteady(stage, failing) for stage in cascade.stages])
    with closing(Engine(unsteady, max_batch_size=2)) as engine:
        sampled = engine.submit(SampleRequest("a", (1, 2))).result(60)
    expected = cascade.sample(["a", "a"], [1, 2])
    torch.testing.assert_close(torch.from_numpy(sampled.z_image), expected.z_image, atol=1e-3, rtol=1e-3)
    assert almost_equal(sampled.images, expected.images.numpy())
    counts = engine.counts()
    assert (counts["halved"], counts["failed"]) == (3, 0)
    assert counts["rows"] == sampled.num_steps == 2 * (OWN_STEPS + 3 * has_tokens)


def test_a_preview_is_shown_once_although_a_later_step_fails(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    engine, shown, num_calls = make_engine(max_batch_size=2), list[Preview](), list[None]()

    def fail(*_: Any) -> None:
        num_calls.append(None)
        if len(num_calls) == 12:
            raise MemoryError("once")

    hook = cascade.stages[1].network.register_forward_pre_hook(fail)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        request = SampleRequest("a", (1, 2), num_steps={"decoder": 20})
        engine.submit(request, num_previews=3, show=shown.append).result(60)
    finally:
        hook.remove()
    assert engine.counts()["halved"] == 1
    assert sorted((one.index, one.number) for one in shown) == [
        (index, place) for index in (0, 1) for place in range(3)
    ]


def test_a_request_whose_previews_all_fail_ends_alone(cascade: Cascade, make_engine: Callable[..., Engine]) -> None:
    engine, shown = make_engine(max_batch_size=4), list[Preview]()

    def fail(preview: Preview) -> None:
        shown.append(preview)
        raise RuntimeError("nobody listens")

    failing = engine.submit(SampleRequest("a", (0, 1)), num_previews=1, show=fail)
    other = engine.submit(SampleRequest("b", (1,)))
    with pytest.raises(RuntimeError, match="nobody listens"):
        failing.result(60)
    assert almost_equal(other.result(60).images, cascade.sample(["b"], [1]).images.numpy())
    counts = engine.counts()
    assert (counts["failed"], counts["halved"], len(shown)) == (1, 0, 1)


def test_a_client_that_left_before_its_step_failed_is_counted_once(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    engine, futures, has_future = make_engine(), list[Future[Any]](), threading.Event()

    def leave_and_fail(*_: Any) -> None:
        assert has_future.wait(20)
        futures[0].cancel()
        raise MemoryError("full")

    hook = cascade.stages[1].network.register_forward_pre_hook(leave_and_fail)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        futures.append(engine.submit(SampleRequest("a", (0,))))
        has_future.set()
        wait_until(lambda: engine.idle and not engine.counts()["active"])
    finally:
        hook.remove()
    assert (engine.counts()["dropped"], engine.counts()["failed"]) == (1, 0)


def picture(position: int) -> Any:
    return SimpleNamespace(position=position, moved_s=0.0)


def test_a_stage_with_a_limit_takes_the_pictures_nearest_to_their_end_and_of_equal_ones_the_first() -> None:
    schedule = Schedule(1, 16)
    schedule.note_failure(0, 8)
    pictures = [picture(position) for position in (3, -1, 5, 3, 5, 3, 3)]
    assert schedule.choose({0: pictures}) == [pictures[place] for place in (2, 4, 0, 3)]


def take_steps(schedule: Schedule, count: int, most: int) -> int:
    """Take full steps of which those of more than ``most`` pictures fail; how many fail."""
    failed = 0
    for _ in range(count):
        size = schedule.loads[0].limit
        if size > most:
            schedule.note_failure(0, size)
            failed += 1
        else:
            schedule.note_step(0, size, 0.1)
    return failed


@pytest.mark.parametrize("most", [1, 7, 8, 15])
def test_a_stage_finds_how_many_pictures_it_can_take_and_tries_more_only_much_later(most: int) -> None:
    schedule = Schedule(1, 16)
    assert take_steps(schedule, 1000, most) <= 5
    assert schedule.loads[0].limit == most
    assert take_steps(schedule, 3000, most) == 0
    assert take_steps(schedule, 2000, 16) == 0  # memory is free again
    assert schedule.loads[0].limit == 16


def test_small_steps_do_not_say_that_large_ones_succeed_and_a_picture_that_fails_alone_was_the_cause() -> None:
    schedule = Schedule(1, 16)
    schedule.note_failure(0, 8)
    for _ in range(10_000):
        schedule.note_step(0, 3, 0.1)
    assert schedule.loads[0].limit == 4
    for size in (4, 2, 1):
        schedule.note_failure(0, size)
    assert schedule.loads[0].limit == 16

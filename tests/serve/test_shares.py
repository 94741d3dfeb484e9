"""Clients get equal shares of the work: a picture counts by its steps and by the rows of each."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.serve.cost import cost_of
from pipeline.serve.engine import Engine
from pipeline.serve.estimate import StageLoad
from pipeline.serve.fair_queue import FairQueue
from pipeline.serve.protocols import Overloaded
from tests.serve.test_engine import wait_until


def test_whoever_has_been_served_least_is_next_and_portions_count_by_their_cost() -> None:
    queue, costs, order = FairQueue[str](), {"large": 5.0, "small": 1.0, "other": 1.0}, list[str]()
    queue.add("large", "one")
    for item in ("small", "other"):
        queue.add(item, "two")
    for _ in range(14):
        order.append(queue.next())
        queue.serve(order[-1], costs[order[-1]])
    assert [order.count(item) for item in costs] == [3, 6, 5]
    assert order[:6] == ["large", "small", "other", "small", "other", "small"]


def test_a_picture_costs_its_steps_times_its_rows(cascade: Cascade) -> None:
    stages = dict(enumerate(cascade.stages))  # of 6, 7 and 4 steps; two candidates, and guidance in the first two
    loads = [StageLoad(8) for _ in stages]

    def cost(*numbers: int, **settings: Any) -> float:
        return cost_of({number: stages[number] for number in numbers}, SampleRequest("a", (1,), **settings), loads)

    assert cost(0, 1, 2) == 6 + 7 + 4
    assert cost(0, 1) == 6 + 7
    assert cost(0, 1, 2, num_steps={"decoder": 70}) == 6 + 70 + 4
    assert cost(0, 1, 2, num_candidates=16) == 8 * 6 + 7 + 4
    assert cost(0, 1, 2, guidance_scale={"decoder": 1.0}) == 6 + 7 / 2 + 4
    assert cost() == 1  # CLIP's part of a chain
    for number, step_s in ((0, 0.1), (2, 0.3)):  # measured so far
        loads[number].times.add(8, step_s)
    assert cost(0, 1, 2) == pytest.approx(0.5 * 6 + 7 + 1.5 * 4)


def test_a_client_whose_pictures_take_more_steps_gets_fewer_of_them(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go, encode, order = threading.Event(), cascade.clip.encode_text, list[str]()

    def note(texts: list[str]) -> Any:
        order.append(texts[0])
        assert may_go.wait(20)
        return encode(texts)

    monkeypatch.setattr(cascade.clip, "encode_text", note)
    engine = make_engine(max_batch_size=1)
    first = engine.submit(SampleRequest("first", (0,)))
    long: list[Future[Any]] = []
    short: list[Future[Any]] = []
    for seed in range(5):  # all of them wait before the first picture has taken a step
        long.append(engine.submit(SampleRequest("long", (seed,), num_steps={"decoder": 60}), client="one"))
        quick = {"prior": 2, "decoder": 2}
        short.append(engine.submit(SampleRequest("short", (seed,), num_steps=quick, side_px=8), client="another"))
    may_go.set()
    for future in (first, *short):
        future.result(60)
    for future in long:
        future.cancel()
    assert order[:8] == ["first", "long", *["short"] * 5, "long"][: len(order[:8])]
    assert order.count("short") == 5


def test_a_client_that_fills_the_queue_leaves_others_their_shares_of_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=1, max_waiting=4)
    future = engine.submit(SampleRequest("a", (0,), num_steps={"prior": 1000}), "a")
    wait_until(lambda: engine.counts()["active"] == 1)

    def num_taken(client: str) -> int:
        """Of five more requests."""
        taken = list[Future[Any]]()
        for seed in range(5):
            with suppress(Overloaded):
                taken.append(engine.submit(SampleRequest("a", (seed,)), client))
        return len(taken)

    assert [num_taken(client) for client in "abacde"] == [4, 2, 0, 1, 1, 0]
    assert engine.counts()["waiting"] == 8
    assert not future.done()

"""The replicas of the networks: what they load, keep and answer."""

import asyncio
import gc
import pickle
import threading
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

import pipeline.runtime.replicas as replicas_module
from models.request import SampleRequest
from models.stage import Batch
from models.text import TextEncoding
from pipeline.runtime.parts import digest_of
from pipeline.runtime.replicas import Hop, ModelReplica
from pipeline.runtime.turns import Turns
from pipeline.serve.protocols import Accepted, NotServing, OtherNetworks, SampledPictures
from pipeline.serve.work import Work


class FakeEngine:
    """Answers with its own number once it may."""

    alive = True

    def __init__(self, number: int, metrics: Any = None) -> None:
        self.number = number
        self.metrics = metrics
        """Where it is counted."""
        self.may_answer = asyncio.Event()
        self.num_active = 0
        self.is_closed = False

    async def sample(self, _request: SampleRequest, _client: str, _work: None, _later: Any) -> SampledPictures:
        self.num_active += 1
        await self.may_answer.wait()
        self.num_active -= 1
        return SampledPictures(np.full((1, 1, 1, 3), self.number, np.uint8), None)

    async def embed_texts(self, _texts: Any) -> int:
        return self.number

    async def embed_image(self, _image: Any) -> int:
        return self.number

    async def cut_at(self, _texts: Any) -> list[int]:
        return [self.number]

    async def stream(self, *_: Any) -> AsyncGenerator[Accepted]:
        for _ in range(self.number):
            yield Accepted()

    @property
    def idle(self) -> bool:
        return not self.num_active

    def close(self) -> None:
        assert not self.num_active
        self.is_closed = True


def tables(number: int, drain_s: float = 0.0, **others: Any) -> dict[str, Any]:
    """Of what is served, as far as a replica reads it; the engine has this number."""
    return {"number": number, "recipe": {"serve": {"drain_s": drain_s}}, **others}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[int, FakeEngine]:
    """The engines that were loaded, by the number in their tables."""
    loaded: dict[int, FakeEngine] = {}

    def load(tables: Any, metrics: Any) -> FakeEngine:
        if tables["number"] < 0:
            raise OSError("no such file")
        loaded[tables["number"]] = FakeEngine(tables["number"], metrics)
        return loaded[tables["number"]]

    monkeypatch.setattr(replicas_module, "load_engine", load)
    monkeypatch.setattr(replicas_module, "_IDLE_POLL_S", 0.01)
    monkeypatch.setattr(replicas_module, "_LEAST_KEEP_S", 0.0)
    return loaded


def test_a_request_is_answered_by_the_networks_that_it_means(engines: dict[int, FakeEngine]) -> None:
    """Also those that come before the server turns to the networks that a replica has loaded already."""
    old, new = digest_of(tables(1)), digest_of(tables(2))

    async def swap() -> list[SampledPictures]:
        replica, request = ModelReplica(), SampleRequest("a", (1,))
        with pytest.raises(OtherNetworks):
            await replica.sample(old, request)
        await replica.reconfigure(tables(1))
        first = asyncio.ensure_future(replica.sample(old, request))
        await asyncio.sleep(0.01)
        await replica.reconfigure(tables(2))
        assert engines[1].metrics is engines[2].metrics is not None
        assert (await replica.serves(old), await replica.serves(new)) == (True, True)
        second = asyncio.ensure_future(replica.sample(old, request))  # others load
        await asyncio.sleep(0.05)
        assert not engines[1].is_closed
        await replica.turn_to(new)
        third = asyncio.ensure_future(replica.sample(new, request))
        engines[2].may_answer.set()
        await third
        assert not engines[1].is_closed
        engines[1].may_answer.set()
        pictures = [await one for one in (first, second, third)]
        while not engines[1].is_closed:
            await asyncio.sleep(0.01)
        with pytest.raises(OtherNetworks):
            await replica.sample(old, request)
        assert not engines[2].is_closed
        return pictures

    pictures = asyncio.run(asyncio.wait_for(swap(), 30))
    assert [one.images.max() for one in pictures] == [1, 1, 2]


def test_embeddings_and_streams_are_of_the_networks_that_they_mean(engines: dict[int, FakeEngine]) -> None:
    async def ask() -> None:
        replica = ModelReplica()
        for number in (1, 2):
            await replica.reconfigure(tables(number))
        for number in (1, 2):
            served = digest_of(tables(number))
            assert await replica.embed_texts(served, ["a"]) == number
            assert await replica.embed_image(served, np.zeros((1, 1, 3), np.uint8)) == number
            assert await replica.cut_at(served, ["a"]) == [number]
            assert [event async for event in replica.stream(served, SampleRequest("a", (1,)))] == [Accepted()] * number
        with pytest.raises(OtherNetworks):
            await replica.embed_texts(digest_of(tables(3)), ["a"])

    asyncio.run(ask())


def test_a_replica_that_was_not_told_of_a_swap_learns_of_it_by_a_request(engines: dict[int, FakeEngine]) -> None:
    async def swap() -> None:
        replica = ModelReplica()
        await replica.reconfigure(tables(1))
        await replica.reconfigure(tables(2))
        engines[2].may_answer.set()
        answer = await replica.sample(digest_of(tables(2)), SampleRequest("a", (1,)))
        assert answer.images.max() == 2  # of the new networks
        while not engines[1].is_closed:
            await asyncio.sleep(0.01)
        assert not engines[2].is_closed

    asyncio.run(asyncio.wait_for(swap(), 30))


def test_a_request_waits_for_networks_that_are_loading(
    engines: dict[int, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a replica that takes requests before it has what they mean; without its own it would look idle."""
    may_load, load = threading.Event(), replicas_module.load_engine

    def slowly(tables: Any, metrics: Any) -> Any:
        if tables["number"] != 1:
            assert may_load.wait(30)
        return load(tables, metrics)

    monkeypatch.setattr(replicas_module, "load_engine", slowly)

    async def swap() -> None:
        replica, served = ModelReplica(), digest_of(tables(2))
        await replica.reconfigure(tables(1))
        loading = asyncio.ensure_future(replica.reconfigure(tables(2)))
        await asyncio.sleep(0.05)
        answer = asyncio.ensure_future(replica.embed_texts(served, ["a"]))
        assert await replica.embed_texts(digest_of(tables(1)), ["a"]) == 1
        with pytest.raises(OtherNetworks):
            await replica.embed_texts(digest_of(tables(3)), ["a"])
        assert not answer.done()
        may_load.set()
        assert await answer == 2
        await loading
        may_load.clear()
        loading = asyncio.ensure_future(replica.reconfigure(tables(-1)))
        await asyncio.sleep(0.05)
        answer = asyncio.ensure_future(replica.embed_texts(digest_of(tables(-1)), ["a"]))
        await asyncio.sleep(0.05)
        may_load.set()
        with pytest.raises(OtherNetworks):
            await answer
        await loading

    asyncio.run(asyncio.wait_for(swap(), 30))


def test_networks_of_before_stay_while_requests_of_them_are_in_other_parts(
    engines: dict[int, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_s, now_s = 10.0, 0.0
    monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=lambda: now_s))

    async def swap() -> None:
        nonlocal now_s
        replica, old, new = ModelReplica(), digest_of(tables(1, keep_s)), digest_of(tables(2, keep_s))
        for number in (1, 2):
            await replica.reconfigure(tables(number, keep_s))
        await replica.turn_to(new)
        for _ in range(3):
            now_s += 0.9 * keep_s
            await replica.keep(old)
            await replica.keep(new)  # which nothing ends
            await asyncio.sleep(0.05)
        assert not engines[1].is_closed
        assert await replica.embed_texts(old, ["a"]) == 1
        now_s += 1.1 * keep_s
        while not engines[1].is_closed:
            await asyncio.sleep(0.01)
        await replica.keep(old)
        with pytest.raises(OtherNetworks):
            await replica.embed_texts(old, ["a"])

    asyncio.run(asyncio.wait_for(swap(), 30))


def test_a_process_says_which_networks_its_requests_still_need() -> None:
    calls, open_requests = list[tuple[str, str]](), {"a": 1, "b": 0, "c": 1}

    def broadcast(method: str, served: str) -> Any:
        calls.append((method, served))
        return SimpleNamespace(results=lambda **_: [None])

    def look(**settings: bool) -> list[tuple[str, str]]:
        calls.clear()
        turns.look(**settings)
        return sorted(calls)

    handle: Any = SimpleNamespace(broadcast=broadcast)
    turns = Turns({"prior": handle})
    for served in ("a", "b", "c"):
        turns.turn_to(served, lambda served=served: open_requests[served])
    assert calls == [("turn_to", "a"), ("turn_to", "b"), ("turn_to", "c")]
    assert look() == [("keep", "a")]
    assert look(is_behind=True) == [("keep", "a"), ("keep", "c")]
    open_requests["a"] = 0
    assert look() == []
    open_requests["c"] = 5
    turns.turn_to("a", lambda: 1)
    assert look() == [("keep", "c")]


def test_networks_of_a_swap_that_was_given_up_end_and_those_of_before_go_on(engines: dict[int, FakeEngine]) -> None:
    async def swap() -> None:
        replica = ModelReplica()
        for number in (1, 2, 1):
            await replica.reconfigure(tables(number, drain_s=60))
        while not engines[2].is_closed:
            await asyncio.sleep(0.01)
        engines[1].may_answer.set()
        assert (await replica.sample(digest_of(tables(1, 60)), SampleRequest("a", (1,)))).images.max() == 1

    asyncio.run(asyncio.wait_for(swap(), 30))


def test_networks_that_cannot_be_loaded_leave_the_old_ones_and_the_same_are_not_loaded_again(
    engines: dict[int, FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Serve would end a replica whose ``reconfigure`` raises; ``unclip serve`` has to learn of the error."""
    old, bad = digest_of(tables(1)), digest_of(tables(-1))

    async def swap() -> None:
        replica = ModelReplica()
        with pytest.raises(OSError, match="no such file"):
            await replica.reconfigure(tables(-1))  # nothing is served that could go on
        await replica.reconfigure(tables(1))
        loaded = engines[1]
        await replica.reconfigure(tables(1))
        assert engines[1] is loaded
        with pytest.raises(OSError, match="no such file"):
            await replica.prepare(tables(-1))
        assert not caplog.messages
        await replica.reconfigure(tables(-1))
        assert caplog.messages == ["not swapped, what was served before goes on: OSError: no such file"]
        assert (await replica.serves(old), await replica.serves(bad)) == (True, False)
        loaded.may_answer.set()
        assert (await replica.sample(old, SampleRequest("a", (1,)))).images.max() == 1
        await replica.check_health()

    asyncio.run(swap())


def test_a_replica_is_replaced_if_requests_mean_what_it_could_not_load(engines: dict[int, FakeEngine]) -> None:
    """The others have loaded it: this one would take requests, and answer none."""
    bad = digest_of(tables(-1))

    async def swap() -> None:
        replica = ModelReplica()
        await replica.reconfigure(tables(1))
        await replica.reconfigure(tables(-1))
        with pytest.raises(OtherNetworks):
            await replica.embed_texts(digest_of(tables(2)), ["a"])  # of a swap long ago
        await replica.check_health()
        with pytest.raises(OtherNetworks):
            await replica.embed_texts(bad, ["a"])
        with pytest.raises(RuntimeError, match="could not load"):
            await replica.check_health()
        await replica.reconfigure(tables(3))
        await replica.check_health()
        await replica.reconfigure(tables(-1))
        await replica.turn_to(bad)
        with pytest.raises(RuntimeError, match="could not load"):
            await replica.check_health()

    asyncio.run(swap())


def test_networks_that_are_served_again_end_only_after_they_are_left_again(
    engines: dict[int, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap back and forth, while a part of a chain still keeps its networks for the requests under way."""
    keep_s = 0.2

    async def turn_to(replica: ModelReplica, number: int) -> None:
        await replica.reconfigure(tables(number, keep_s, part="decoder"))
        await replica.turn_to(digest_of(tables(number, keep_s)))

    async def swap() -> None:
        errors = list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        replica = ModelReplica()
        await turn_to(replica, 1)
        await turn_to(replica, 2)
        await asyncio.sleep(keep_s / 2)
        await turn_to(replica, 1)
        await turn_to(replica, 2)
        await asyncio.sleep(0.75 * keep_s)  # the time of the first swap is over, that of the last one is not
        assert not engines[1].is_closed
        while not engines[1].is_closed:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        gc.collect()
        assert (list(replica._engines), errors) == ([replica._served], [])

    asyncio.run(asyncio.wait_for(swap(), 30))


def test_a_request_whose_networks_end_while_its_work_comes_ends_with_them(
    engines: dict[int, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that it came from has died, or has said nothing for ``serve.drain_s``."""

    async def hop() -> None:
        replica = ModelReplica()
        await replica.reconfigure(tables(1))
        served = digest_of(tables(1))
        work = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(replicas_module, "ObjectRef", asyncio.Future)
        continued = asyncio.ensure_future(replica._continued(served, Hop("decoder", work)))
        await asyncio.sleep(0)
        await replica.reconfigure(tables(2))
        await replica.turn_to(digest_of(tables(2)))
        while not engines[1].is_closed:
            await asyncio.sleep(0.01)
        work.set_result(pickle.dumps("work"))
        engine, _ = await continued
        assert engine is engines[1]  # which raises NotServing: these networks do not come back

    asyncio.run(asyncio.wait_for(hop(), 30))


@pytest.mark.ray
@pytest.mark.usefixtures("engines", "local_ray")
def test_what_is_left_of_a_request_goes_by_reference_if_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pass_on() -> None:
        replica, served = ModelReplica(), digest_of(tables(1))
        await replica.reconfigure(tables(1))
        batch = Batch(TextEncoding(*(torch.zeros(1, 1) for _ in range(4))), (0,))
        small, large = (
            Work(batch.with_values(pixels=torch.zeros(1, size)), (1,), "decoder", is_last=True, num_steps=2)
            for size in (1000, 1 << 20)
        )
        hops = [await replicas_module._sent(work) for work in (small, large)]
        assert [type(hop.work) for hop in hops] == [bytes, ray.ObjectRef]
        for work, hop in zip((small, large), hops, strict=True):
            _, left = await replica._continued(served, hop)
            assert left is not None
            assert torch.equal(left.batch.values["pixels"], work.batch.values["pixels"])
        lost = asyncio.get_running_loop().create_future()
        lost.set_exception(ray.exceptions.ObjectLostError("ab", "", ""))
        monkeypatch.setattr(replicas_module, "ObjectRef", asyncio.Future)
        with pytest.raises(NotServing, match="the replica before this one has died"):
            await replica._continued(served, Hop("decoder", lost))

    asyncio.run(asyncio.wait_for(pass_on(), 60))

"""The calls that reach the replicas: begun again, waiting, or ended with an error."""

import asyncio
import gc
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
from fastapi import FastAPI
from ray.serve.handle import DeploymentBroadcastResponse
from starlette.testclient import TestClient

import pipeline.runtime.remote_model as remote_module
from models.request import SampleRequest
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.parts import NEIGHBOURS
from pipeline.runtime.remote_model import RemoteModel
from pipeline.serve.protocols import Accepted, NotServing, OtherNetworks, Overloaded, Preview, SampledPictures
from pipeline.serve.upkeep import Upkeep
from pipeline.serve.web import install_error_handlers


def test_a_chain_refuses_more_requests_than_it_may_hold(recipe: Recipe) -> None:
    never = SimpleNamespace(sample=SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future()))
    model = RemoteModel({"prior": never}, "one", most=1)  # pyright: ignore[reportArgumentType]

    async def ask() -> None:
        first = asyncio.ensure_future(model.sample(SampleRequest("a", (1,))))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="1 requests are under way"):
            await model.sample(SampleRequest("b", (1,)))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not model._open

    asyncio.run(ask())


def test_a_client_that_fills_a_chain_leaves_others_their_shares() -> None:
    never = SimpleNamespace(sample=SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future()))
    model = RemoteModel({"prior": never}, "one", most=4)  # pyright: ignore[reportArgumentType]

    async def ask(client: str) -> asyncio.Task[SampledPictures]:
        task = asyncio.create_task(model.sample(SampleRequest("a", (1,)), client))
        await asyncio.sleep(0)
        return task

    async def fill() -> list[bool]:
        tasks = [await ask(client) for client in ("a", "a", "a", "a", "a", "b", "b", "b", "a")]
        refused = [task.done() and isinstance(task.exception(), Overloaded) for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return refused

    assert asyncio.run(fill()) == [False] * 4 + [True, False, False, True, True]


def test_a_request_whose_replica_dies_is_begun_once_more() -> None:
    pictures, calls = SampledPictures(np.zeros((1, 1, 1, 3), np.uint8), None), list[str]()

    async def answer(outcomes: list[Any]) -> SampledPictures:
        def remote(_served: str, request: SampleRequest, *_: object) -> asyncio.Future[Any]:
            calls.append(request.prompt)
            future = asyncio.get_running_loop().create_future()
            outcome = outcomes.pop(0)
            (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)
            return future

        handle: Any = SimpleNamespace(sample=SimpleNamespace(remote=remote))
        return await RemoteModel({"networks": handle}, "one").sample(SampleRequest("a", (1,)))

    died = [ray.exceptions.ActorDiedError() for _ in range(2)]
    assert asyncio.run(answer([died[0], pictures])) is pictures
    with pytest.raises(NotServing, match="no replica is ready"):
        asyncio.run(answer(list(died)))
    assert calls == ["a"] * 4


class Streaming:
    """A handle of replicas that stream; an error among the events is a replica's death."""

    def __init__(self, *streams: list[Any]) -> None:
        self.streams = list(streams)
        self.num_cancelled = 0
        self.stream = SimpleNamespace(remote=lambda *_: Events(self, self.streams.pop(0)))

    def options(self, **_: bool) -> "Streaming":
        return self


class Events:
    def __init__(self, handle: Streaming, events: list[Any]) -> None:
        self.handle = handle
        self.events = iter(events)

    async def __anext__(self) -> Any:
        try:
            event = next(self.events)
        except StopIteration:
            raise StopAsyncIteration from None
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.handle.num_cancelled += 1


def test_a_stream_whose_replica_dies_goes_on_where_it_was() -> None:
    image, upkeep = np.zeros((1, 1, 3), np.uint8), Upkeep()
    previews = [Preview(0, number, image) for number in range(3)]
    pictures = SampledPictures(image[None], None)

    async def events(handle: Any) -> list[Any]:
        model = RemoteModel({"networks": handle}, "one", upkeep=upkeep)
        received = list[Any]()
        try:
            async for event in model.stream(SampleRequest("a", (1,)), num_previews=3):
                received.append(event)
        except NotServing as error:
            received.append(error)
        return received

    died = [Accepted(), *previews[:2], ray.exceptions.ActorDiedError()]
    handle = Streaming(died, [Accepted(), *previews, pictures])
    assert asyncio.run(events(handle)) == [Accepted(), *previews, pictures]
    assert (handle.num_cancelled, upkeep.begun_again._value.get()) == (2, 1)
    *sent, error = asyncio.run(events(Streaming(list(died), list(died))))
    assert (sent, type(error)) == ([Accepted(), *previews[:2]], NotServing)


class Turning:
    """A handle of replicas of which the first ones that answer have other networks."""

    def __init__(self, num_others: int) -> None:
        self.num_others = num_others
        self.served = set[str]()
        self.preferred = list[str]()
        """Networks that the router is asked to look for."""
        self.sample = SimpleNamespace(remote=self._sample)
        self.stream = SimpleNamespace(remote=self._stream)

    def options(self, multiplexed_model_id: str = "", **_: bool) -> "Turning":
        self.preferred += [multiplexed_model_id] * bool(multiplexed_model_id)
        return self

    def broadcast(self, method: str, served: str) -> Any:
        assert method == "serves"
        self.served.add(served)
        return SimpleNamespace(results=lambda **_: [False, self.num_others < 0])

    def _has_others(self, served: str) -> bool:
        self.served.add(served)
        self.num_others -= 1
        return self.num_others >= 0

    def _sample(self, served: str, *_: object) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        if self._has_others(served):
            answer.set_exception(OtherNetworks("others"))
        else:
            answer.set_result(SampledPictures(np.zeros((1, 1, 1, 3), np.uint8), None))
        return answer

    def _stream(self, served: str, *_: object) -> Events:
        handle: Any = SimpleNamespace(num_cancelled=0)
        return Events(handle, [OtherNetworks("others")] if self._has_others(served) else [Accepted()])


def test_a_request_looks_for_a_replica_that_has_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_TURN_POLL_S", 0.01)
    upkeep = Upkeep()

    async def sample(handle: Any) -> None:
        await RemoteModel({"networks": handle}, "one", upkeep=upkeep).sample(SampleRequest("a", (1,)))

    async def stream(handle: Any) -> None:
        model = RemoteModel({"networks": handle}, "one", upkeep=upkeep)
        assert [event async for event in model.stream(SampleRequest("a", (1,)))] == [Accepted()]

    for ask in (sample, stream):
        handle = Turning(5)
        asyncio.run(ask(handle))
        assert (handle.num_others, handle.served, handle.preferred) == (-1, {"one"}, ["one"] * 5)
        monkeypatch.setattr(remote_module, "_LONGEST_TURN_S", 0.05)
        never = Turning(1000)
        with pytest.raises(OtherNetworks):
            asyncio.run(ask(never))
        assert never.num_others > 900  # it is not begun again
        monkeypatch.setattr(remote_module, "_LONGEST_TURN_S", 10)
    assert upkeep.begun_again._value.get() == 0


def test_a_request_whose_networks_are_gone_does_not_wait_for_them() -> None:
    upkeep = Upkeep()

    async def ask() -> int:
        handle: Any = Turning(1000)
        with pytest.raises(OtherNetworks):
            await RemoteModel({"networks": handle}, "one", upkeep=upkeep).sample(SampleRequest("a", (1,)))
        return 1000 - handle.num_others

    upkeep.served = "another"
    assert asyncio.run(ask()) == 2  # one replica may not have been told yet
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/")
    def fail() -> None:
        raise OtherNetworks("others")

    answer = TestClient(app).get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_a_request_of_what_is_served_waits_for_a_replica_that_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_TURN_POLL_S", 0.001)
    upkeep = Upkeep()
    upkeep.served = "one"
    handle: Any = Turning(6)
    sampling = RemoteModel({"networks": handle}, "one", upkeep=upkeep).sample(SampleRequest("a", (1,)))
    assert asyncio.run(sampling).images.shape == (1, 1, 1, 3)


def test_texts_are_embedded_once_more_if_a_replica_dies() -> None:
    outcomes: list[Any] = [ray.exceptions.ActorDiedError(), np.ones((1, 2), np.float32)]

    def remote(*_: object) -> asyncio.Future[Any]:
        future, outcome = asyncio.get_running_loop().create_future(), outcomes.pop(0)
        (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)
        return future

    async def embed() -> Any:
        handle: Any = SimpleNamespace(embed_texts=SimpleNamespace(remote=remote))
        return await RemoteModel({"networks": handle}, "one").embed_texts(["a"])

    assert asyncio.run(embed()).shape == (1, 2)


def test_a_client_that_leaves_leaves_no_complaint_behind() -> None:
    """Ray Serve's answers raise an error of their own when they are cancelled."""
    complaints, cancelled = list[Any](), list[bool]()

    class Response:
        def __await__(self) -> Any:
            try:
                yield from asyncio.Event().wait().__await__()
            except asyncio.CancelledError:
                raise RuntimeError("cancelled") from None

        def cancel(self) -> None:
            cancelled.append(True)

    async def ask_and_leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        handle: Any = SimpleNamespace(sample=SimpleNamespace(remote=lambda *_: Response()))
        asking = asyncio.ensure_future(RemoteModel({"networks": handle}, "one").sample(SampleRequest("a", (1,))))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.01)
        del asking
        gc.collect()

    asyncio.run(ask_and_leave())
    assert (cancelled, complaints) == ([True], [])


def test_requests_do_not_wait_without_end_for_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_ABSENCE_POLL_S", 0.01)
    monkeypatch.setattr(remote_module, "_LONGEST_ABSENCE_S", 0.1)
    monkeypatch.setattr(remote_module, "_LONGEST_ABSENCE_OF_INDEX_S", 0.05)
    upkeep, cancelled = Upkeep(), list[str]()

    class Never(asyncio.Future[Any]):
        def cancel(self, msg: Any = None) -> bool:
            cancelled.append("future")
            return super().cancel(msg)

    async def ask() -> None:
        never = SimpleNamespace(remote=lambda *_: Never())
        handle: Any = SimpleNamespace(sample=never, ask=never)
        model = RemoteModel({"networks": handle, NEIGHBOURS: handle}, "one", upkeep=upkeep)
        upkeep.note_running({"networks": 0})
        with pytest.raises(NotServing, match=r"no replica of networks has been running for 0\.1 s"):
            await model.sample(SampleRequest("a", (1,)))
        assert cancelled
        assert upkeep.begun_again._value.get() == 0
        upkeep.note_running({"networks": 1, NEIGHBOURS: 0})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.sample(SampleRequest("a", (1,))), 0.3)
        with pytest.raises(NotServing, match=r"no replica of neighbours has been running for 0\.05 s"):
            await model.ask(NEIGHBOURS, "ask", "uri", "search")

    asyncio.run(ask())


def test_requests_end_with_ray_and_are_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_ABSENCE_POLL_S", 0.01)
    upkeep, calls = Upkeep(), list[str]()

    async def ask() -> None:
        def remote(_served: str, request: SampleRequest, *_: object) -> asyncio.Future[Any]:
            calls.append(request.prompt)
            return asyncio.Future()

        handle: Any = SimpleNamespace(sample=SimpleNamespace(remote=remote))
        request = asyncio.ensure_future(
            RemoteModel({"networks": handle}, "one", upkeep=upkeep).sample(SampleRequest("a", (1,)))
        )
        await asyncio.sleep(0.1)
        assert not request.done()
        upkeep.has_ended = True
        with pytest.raises(NotServing, match="the server has ended"):
            await asyncio.wait_for(request, 5)

    asyncio.run(ask())
    assert calls == ["a"]


class Answer:
    """What Ray Serve holds of one replica's answer; ``None`` never comes."""

    def __init__(self, value: dict[str, int] | None) -> None:
        self.value = value

    def get(self, timeout_s: float) -> dict[str, int]:
        if self.value is None:
            time.sleep(timeout_s)
            raise TimeoutError
        return self.value

    async def get_async(self) -> dict[str, int]:
        return await asyncio.to_thread(self.get, 0.5)


def test_one_slow_replica_hides_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_STATS_TIMEOUT_S", 0.05)

    async def answers() -> Any:
        return [Answer({"requests": 1}), Answer(None), Answer({"requests": 2})]

    handle: Any = SimpleNamespace(broadcast=lambda _method: DeploymentBroadcastResponse(answers(), None))
    assert asyncio.run(RemoteModel({"networks": handle}, "one").stats()) == {"requests": 3}


def test_however_many_ask_for_the_counts_the_replicas_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_STATS_FRESH_S", 1e6)
    calls, may_answer = list[str](), threading.Event()

    def results(**_: Any) -> list[dict[str, int]]:
        assert may_answer.wait(30)
        return [{"requests": len(calls)}]

    def broadcast(method: str) -> Any:
        calls.append(method)
        return SimpleNamespace(results=results)

    handle: Any = SimpleNamespace(broadcast=broadcast)
    model = RemoteModel({"networks": handle}, "one")

    async def ask() -> None:
        first, *others = [asyncio.ensure_future(model.stats()) for _ in range(50)]
        await asyncio.sleep(0)
        first.cancel()  # the others still get the answer
        may_answer.set()
        assert await asyncio.gather(*others) == [{"requests": 1}] * 49
        assert await model.stats() == {"requests": 1}
        monkeypatch.setattr(remote_module, "_STATS_FRESH_S", -1.0)
        assert await model.stats() == {"requests": 2}

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert calls == ["stats"] * 2


def test_answers_of_replicas_are_awaited_in_threads_of_their_own() -> None:
    """The others make files of pictures; whoever asks how the replicas are must not take them."""
    threads = list[str]()

    def results(**_: Any) -> list[dict[str, int]]:
        threads.append(threading.current_thread().name)
        return [{}]

    handle: Any = SimpleNamespace(broadcast=lambda _: SimpleNamespace(results=results))
    asyncio.run(RemoteModel({"networks": handle}, "one").stats())
    assert [name.rpartition("_")[0] for name in threads] == ["unclip-asking"]

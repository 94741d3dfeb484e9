"""The replicas of the networks, and the calls that reach them."""

import asyncio
import base64
import gc
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentBroadcastResponse
from starlette.testclient import TestClient

import pipeline.runtime.remote_model as remote_module
import pipeline.runtime.replicas as replicas_module
from models.request import SampleRequest
from pipeline.errors import DataError
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.front import Front
from pipeline.runtime.parts import NEIGHBOURS, digest_of, most_requests, part_tables, parts_of, write_tables
from pipeline.runtime.remote_model import RemoteModel
from pipeline.runtime.replicas import Hop, ModelReplica
from pipeline.runtime.served import served_artifacts
from pipeline.runtime.turns import Turns
from pipeline.serve.protocols import Accepted, NotServing, OtherNetworks, Overloaded, Preview, SampledPictures
from pipeline.serve.upkeep import Upkeep
from pipeline.serve.web import install_error_handlers
from tests.tiny.collector import Collector, collecting
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import served_workspace


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
        assert engines[1].metrics is engines[2].metrics
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


def test_networks_with_a_flipped_bit_are_not_served(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    weights = artifacts["decoder"].path("model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(damaged)
    chain = chained(recipe)
    tables = write_tables(chain, artifacts)
    for own in (write_tables(recipe, artifacts), part_tables(chain, tables, "decoder")):
        with pytest.raises(DataError, match=r"decoder.*/model\.safetensors: does not match its checksum"):
            asyncio.run(ModelReplica().reconfigure(own))
    asyncio.run(ModelReplica().reconfigure(part_tables(chain, tables, "prior")))  # these weights are not its own


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
        work.set_result("work")
        engine, _ = await continued
        assert engine is engines[1]  # which raises NotServing: these networks do not come back

    asyncio.run(asyncio.wait_for(hop(), 30))


def chained(recipe: Recipe, **serve: Any) -> Recipe:
    return replace(recipe, serve=replace(recipe.serve, mode="chain", **serve))


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collecting() as one:
        yield one


def test_a_chain_of_deployments_samples_what_the_cascade_does(recipe: Recipe, collector: Collector) -> None:
    """In Ray Serve's local mode; each part has the weights of its own networks alone."""
    artifacts, _ = served_artifacts(recipe)
    chain, handles = chained(recipe, traces=collector.url), dict[str, Any]()
    tables = write_tables(chain, artifacts)
    assert parts_of(chain) == {"prior": ("clip", "prior"), "decoder": ("decoder",), "upsampler_1": ("upsampler_1",)}
    for part in parts_of(chain):
        deployment: Any = serve.deployment(ModelReplica, name=part, user_config=part_tables(chain, tables, part))
        handles[part] = serve.run(deployment.bind(), name=part, route_prefix=None, _local_testing_mode=True)
        while handles[part].broadcast("reconfigure", part_tables(chain, tables, part)).results() != [None]:
            pass
    front = Front(chain.serve)
    front.open(chain, artifacts, RemoteModel(handles, digest_of(tables), most_requests(chain.serve)))
    client = TestClient(front, base_url="http://127.0.0.1")
    body = {"prompt": "a", "seed": 3, "n": 2}
    trace_id = "1" * 32
    headers = {"traceparent": f"00-{trace_id}-{'2' * 16}-01"}
    data = client.post("/v1/images/generations", json=body, headers=headers).json()["data"]
    spans = collector.wait_for(trace_id, 8)
    assert [one.name for one in collector.spans(trace_id)].count("queue") == 3  # one in each part
    assert spans.keys() == {"POST /v1/images/generations", "queue", "prior", "decoder", "upsampler_1", "encode"}
    assert {one.parent_id for one in spans.values()} == {"2" * 16, spans["POST /v1/images/generations"].span_id}
    expected = load_cascade(artifacts).sample(["a", "a"], [3, 4]).images.numpy()
    for image, picture in zip(data, expected, strict=True):
        assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - picture).mean() < 0.1
    lines = client.post("/v1/images/generations", json=body | {"stream": True, "partial_images": 2}).text.splitlines()
    kinds = [line.removeprefix("event: image_generation.") for line in lines if line.startswith("event: ")]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    files = {"image": plain_picture("red")}
    answer = client.post("/v1/images/text-diffs", data={"source": "a red circle", "target": "a star"}, files=files)
    assert answer.status_code == 200, answer.text
    small = client.post("/v1/images/generations", json=body | {"size": "16x16"}).json()
    assert pixels(base64.b64decode(small["data"][0]["b64_json"])).shape == (16, 16, 3)
    stats = client.get("/healthz").json()
    assert (stats["requests"], stats["active"], stats["waiting"]) == (4, 0, 0)
    decoder, upsampler = (handles[part].broadcast("load").results()[0] for part in ("decoder", "upsampler_1"))
    assert (decoder.pictures, upsampler.pictures) == (0, 0)
    assert not decoder.stages.keys() & upsampler.stages.keys()
    passed = [load for part in (decoder, upsampler) for load in part.stages.values() if load.steps]
    assert len(passed) >= 2
    assert all(load.times.time_s > 0 for load in passed)
    stale: Any = {**tables, "artifacts": {**tables["artifacts"], "embed": "elsewhere"}}
    handles["decoder"].broadcast("reconfigure", {**stale, "part": "decoder", "steps": ["decoder"]}).results()
    assert client.post("/v1/images/generations", json=body).status_code == 200  # the older engine ends what it began


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
        assert not model._num_open

    asyncio.run(ask())


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

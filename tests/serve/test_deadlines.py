"""Requests with a timeout: refused if it cannot be kept, and dropped when it is over, whatever works on them."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import openai
import pytest
import torch
from starlette.testclient import TestClient

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.recipe.picture_card import ModelCard
from pipeline.retrieve.retriever import Conditions
from pipeline.runtime.remote_model import RemoteModel
from pipeline.runtime.replicas import Hop
from pipeline.serve import deadlines, generation
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.deadlines import NotWanted
from pipeline.serve.embeddings import EmbeddingRequest, embed
from pipeline.serve.engine import Engine
from pipeline.serve.estimate import PartLoad, StageLoad, estimate_s
from pipeline.serve.generation import Generation
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards
from pipeline.serve.images import GenerationRequest
from pipeline.serve.keys import Meter
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.protocols import Accepted, DeadlinePassed, Overloaded, SampledPictures, TooLittleTime, Vectors
from pipeline.serve.step_times import StepTimes
from pipeline.serve.web import ApiError
from tests.serve.test_engine import wait_until
from tests.serve.test_metrics import values
from tests.tiny.shards import plain_picture

LONG = {"decoder": 1000}
"""Steps of a request that nobody waits for to its end."""


def test_pictures_whose_time_is_up_leave_at_the_next_step_and_their_neighbours_stay(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_batch_size=2)
    other = engine.submit(SampleRequest("a", (0,)))
    late = engine.submit(SampleRequest("a", (1,), num_steps=LONG, timeout_s=0.2))
    waiting = engine.submit(SampleRequest("a", (2,), num_steps={"prior": 1000}))
    never = engine.submit(SampleRequest("a", (3, 4, 5), timeout_s=0.2))
    for request in (late, never):
        with pytest.raises(DeadlinePassed):
            request.result(60)
    assert other.result(60).images.shape == (1, 32, 32, 3)
    waiting.cancel()
    wait_until(lambda: engine.counts()["dropped"] == 1)
    counts = engine.counts()
    assert (counts["expired"], counts["dropped"], counts["active"], counts["waiting"]) == (2, 1, 0, 0)
    counts = values(asyncio.run(engine.metrics())[""])
    assert (counts["unclip_requests_total", "expired"], counts["unclip_requests_total", "cancelled"]) == (2, 1)
    assert 0 < counts["unclip_wasted_steps_total", "expired"] < 1000


def test_a_busy_engine_refuses_what_it_cannot_do_in_time(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=2)
    engine.submit(SampleRequest("a", (0, 1))).result(60)  # from which it learns
    started_s = time.monotonic()
    engine.submit(SampleRequest("a", (0, 1))).result(60)
    alone_s = time.monotonic() - started_s
    under_way = [engine.submit(SampleRequest("a", tuple(range(6)), num_steps={"prior": 1000})) for _ in range(2)]
    with pytest.raises(
        TooLittleTime, match=r"timeout: 0\.001 s are less than the .* s that it would take now"
    ) as short:
        engine.submit(SampleRequest("a", (0,), timeout_s=0.001))
    with pytest.raises(TooLittleTime) as longer:
        engine.submit(SampleRequest("a", (0,), num_steps=LONG, timeout_s=0.001))
    assert 0 < short.value.retry_after_s < 20 * alone_s
    assert longer.value.retry_after_s > 5 * short.value.retry_after_s
    assert engine.counts()["refused"] == 2
    in_time = engine.submit(SampleRequest("b", (0,), timeout_s=600))
    for request in under_way:
        request.cancel()
    in_time.result(60)
    wait_until(lambda: engine.idle)
    with pytest.raises(DeadlinePassed):  # an idle engine tries, so that its estimates do not grow old
        engine.submit(SampleRequest("a", (0,), timeout_s=0.001)).result(60)


def test_openais_client_is_told_once_that_time_is_up(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    before = server.engine.counts()
    extra = {"timeout": 0.1, "num_inference_steps": 1000}
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a", extra_body=extra)
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (504, "deadline_exceeded", "timeout")
    with pytest.raises(openai.APIError, match="timeout: the time of the request was up"):
        list(client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=extra))
    counts = server.engine.counts()
    assert counts["requests"] - before["requests"] == 2  # none was sent again
    assert counts["expired"] - before["expired"] == 2
    for wrong in (0, -1, 3601, "soon"):
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a", "timeout": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout")


class Networks:
    """Networks that never answer, say at once that the time is too short, or sample at once ("quick")."""

    def __init__(self) -> None:
        self.times_s = list[float]()

    async def sample(self, request: SampleRequest, _client: str = "") -> SampledPictures:
        self.times_s.append(request.timeout_s)
        if request.prompt == "short":
            raise TooLittleTime("timeout: too short", retry_after_s=7)
        if request.prompt != "quick":
            await never()
        return SampledPictures(np.zeros((1, 16, 16, 3), np.uint8), None)

    async def stream(self, request: SampleRequest, client: str = "", _num_previews: int = 0) -> Any:
        yield Accepted()
        yield await self.sample(request, client)

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        if texts != ["quick"]:
            await never()
        return np.eye(2, dtype=np.float32)[:1]

    async def embed_image(self, _image: Any) -> Vectors:
        return np.eye(2, dtype=np.float32)[0]

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        return [0] * len(texts)

    async def metrics(self) -> dict[str, str]:
        return {}


class Index:
    """An index that never answers."""

    async def near_copy(self) -> None:
        return

    async def search(self, *_: Any, **__: Any) -> Any:
        await never()

    async def rows(self, _ids: Any) -> Any:
        await never()


async def never() -> None:
    """Wait, and note that it is not waited for any more."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        CANCELLED.append(None)
        raise
    raise AssertionError("it was waited for")


CANCELLED = list[None]()


def test_the_recipe_bounds_the_time_and_hung_networks_are_not_waited_for() -> None:
    networks, metrics = Networks(), HttpMetrics()
    behind: Any = GuardedModel(networks, 16, Meter())  # pyright: ignore[reportArgumentType]
    app = create_app(behind, None, ApiSettings(ModelCard("tiny", 16), metrics=metrics, longest_s=0.1))
    client = TestClient(Guards(app, metrics=metrics), base_url="http://127.0.0.1")

    def post(**fields: Any) -> Any:
        return client.post("/v1/images/generations", json={"prompt": "a"} | fields)

    answers = [post(), post(timeout=0.05), post(timeout=500)]
    assert [answer.status_code for answer in answers] == [504] * 3
    assert [answer.headers["X-Should-Retry"] for answer in answers] == ["false"] * 3
    assert '"code": "deadline_exceeded"' in post(stream=True).text
    refused = post(prompt="short")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "7")
    assert networks.times_s == [0.1, 0.05, 0.1, 0.1, 0.1]
    assert values(client.get("/metrics").text)["unclip_refusals_total", "deadline"] == 4


class NoNotes(Networks):
    """Networks that sample, but never say which texts they cut: their CLIP has died."""

    async def cut_at(self, _texts: Sequence[str]) -> list[int]:
        await never()
        raise AssertionError


def test_finished_pictures_do_not_wait_for_the_notes_on_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as the request would, and its timeout is none of theirs."""
    monkeypatch.setattr(generation, "_LONGEST_NOTE_S", 0.3)
    networks: Any = NoNotes()
    app = create_app(networks, None, ApiSettings(ModelCard("tiny", 16)))
    client = TestClient(app, base_url="http://127.0.0.1")
    CANCELLED.clear()
    begun_s = time.monotonic()
    forms: list[dict[str, Any]] = [{}, {"stream": True}, {"response_format": "file"}]
    answers = [client.post("/v1/images/generations", json={"prompt": "quick", "timeout": 0.2} | form) for form in forms]
    assert [answer.status_code for answer in answers] == [200] * 3
    whole, stream, file = answers
    assert "notes" not in whole.json()
    assert "event: image_generation.completed" in stream.text
    assert "X-Unclip-Notes" not in file.headers
    assert len(CANCELLED) == 3
    assert time.monotonic() - begun_s < 20


def test_texts_are_looked_at_while_the_pictures_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_LONGEST_NOTE_S", 0.0)
    networks: Any = Networks()
    is_looked_at = asyncio.Event()

    async def cut_at(texts: Sequence[str]) -> list[int]:
        is_looked_at.set()
        return [8] * len(texts)

    async def sample(*_: Any) -> SampledPictures:
        await asyncio.wait_for(is_looked_at.wait(), 20)
        return SampledPictures(np.zeros((1, 16, 16, 3), np.uint8), None)

    monkeypatch.setattr(networks, "cut_at", cut_at)
    monkeypatch.setattr(networks, "sample", sample)
    request = Generation(networks, GenerationRequest(prompt="a"), ModelCard("tiny", 16))
    assert asyncio.run(request.answer())["notes"][0].startswith("prompt: CLIP reads 8 tokens")


def test_texts_of_refused_embeddings_are_looked_at_no_further() -> None:
    networks: Any = NoNotes()
    CANCELLED.clear()

    async def ask() -> None:
        body = EmbeddingRequest(input=["quick", "data:image/png;base64,AAAA"])
        with pytest.raises(ApiError):
            await embed(networks, body, ModelCard("tiny", 16))
        await asyncio.sleep(0)
        assert len(CANCELLED) == 1

    asyncio.run(ask())


@pytest.mark.parametrize("longest_s", [0, 0.05])
def test_embeddings_searches_and_neighbours_have_the_same_time(longest_s: float) -> None:
    """The request's own, or the server's."""
    metrics, own = HttpMetrics(), {} if longest_s else {"timeout": 0.05}
    behind: Any = GuardedModel(Networks(), 16, Meter())  # pyright: ignore[reportArgumentType]
    settings = ApiSettings(ModelCard("tiny", 16), metrics=metrics, longest_s=longest_s)
    app = create_app(behind, Index(), settings)  # pyright: ignore[reportArgumentType]
    client = TestClient(Guards(app, metrics=metrics), base_url="http://127.0.0.1")
    search = {"modality": "image", "num_images": 1}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": "slow"}),
        ("/knn-service", search | {"text": "slow"}),
        ("/knn-service", search | {"text": "quick"}),
        ("/metadata", {"ids": [1]}),
        ("/v1/images/generations", {"prompt": "quick", "neighbours": 1}),
    ]
    CANCELLED.clear()
    for number, (path, body) in enumerate(bodies):
        answer = client.post(path, json=body | own)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (504, "deadline_exceeded", "timeout"), body
        assert answer.headers["X-Should-Retry"] == "false"
        assert len(CANCELLED) == number + 1
        wrong = client.post(path, json=body | {"timeout": 0})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "timeout")
    stream = client.post("/v1/images/generations", json={"prompt": "quick", "neighbours": 1, "stream": True} | own).text
    assert stream.count("event: ") == 1
    assert '"code": "deadline_exceeded"' in stream
    counts = values(client.get("/metrics").text)
    assert counts["unclip_refusals_total", "deadline"] == len(bodies)
    assert client.post("/v1/embeddings", json={"input": "quick"} | own).status_code == 200


def test_embeddings_that_nobody_waits_for_end_with_their_part_or_do_not_begin(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, begun, may_end = cascade.clip, list[str](), threading.Event()

    def embed(texts: Sequence[str]) -> torch.Tensor:
        begun.append(texts[0])
        may_end.wait(60)
        return torch.ones(len(texts), 2)

    monkeypatch.setattr(clip, "embed_text", embed)
    engine = make_engine()

    async def leave() -> Vectors:
        first = asyncio.create_task(engine.embed_texts(["first"] * 2048))
        await asyncio.to_thread(wait_until, lambda: begun == ["first"])
        waiting = asyncio.create_task(engine.embed_texts(["waiting"]))
        picture = asyncio.create_task(engine.embed_image(np.zeros((8, 8, 3), np.uint8)))
        await asyncio.sleep(0.05)
        for task in (first, waiting, picture):
            task.cancel()
        await asyncio.wait([first, waiting, picture])
        may_end.set()
        return await engine.embed_texts(["last"])

    encode = Mock(side_effect=AssertionError("a picture is encoded that nobody waits for"))
    monkeypatch.setattr(clip, "encode_image", encode)
    assert asyncio.run(leave()).shape == (1, 2)
    assert begun == ["first", "last"]
    encode.assert_not_called()


def test_texts_that_nobody_waits_for_are_looked_at_no_further_and_hold_no_thread_that_others_need(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, engine = list[int](), threading.Event(), make_engine()

    def cut_at(texts: Sequence[str]) -> list[int]:
        begun.append(len(texts))
        may_end.wait(60)
        return [len(text) for text in texts]

    inputs = SimpleNamespace(cut_at=cut_at)
    monkeypatch.setattr(cascade.clip, "clip", SimpleNamespace(inputs=inputs))

    async def leave() -> list[int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        first = asyncio.create_task(engine.cut_at(["a"] * 2048))
        waiting = asyncio.create_task(engine.cut_at(["a"]))
        await asyncio.wait_for(asyncio.to_thread(wait_until, lambda: len(begun) == 1), 60)
        for task in (first, waiting):
            task.cancel()
        await asyncio.wait([first, waiting])
        may_end.set()
        return await engine.cut_at(["ab"] * 65 + [""])

    assert asyncio.run(leave()) == [2] * 65 + [0]
    assert begun == [64, 64, 2]


def test_embeddings_and_searches_hold_no_thread_that_others_need(
    cascade: Cascade, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, engine, width = threading.Event(), make_engine(), cascade.clip.dims.embed_dim

    def embed(texts: Sequence[str]) -> torch.Tensor:
        may_end.wait(60)
        return torch.ones(len(texts), width)

    monkeypatch.setattr(cascade.clip, "embed_text", embed)

    async def ask_many() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        searches = [deadlines.while_wanted(lambda _: may_end.wait(60)) for _ in range(20)]
        waiting = asyncio.gather(*(engine.embed_texts(["a"]) for _ in range(20)), *searches)
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)  # as the files of pictures are written
        assert not waiting.done()
        may_end.set()
        return await waiting

    answers = asyncio.run(ask_many())
    assert [one.shape for one in answers[:20]] == [(1, width)] * 20
    assert answers[20:] == [True] * 20


def test_a_search_that_nobody_waits_for_reads_no_further_pictures(
    neighbours: LocalNeighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, read, may_end = LocalNeighbours(neighbours._retriever), list[int](), threading.Event()

    def picture(neighbour: Any) -> bytes:
        read.append(neighbour.id)
        may_end.wait(60)
        return plain_picture("red")

    monkeypatch.setattr(own._retriever, "picture", picture)

    async def leave() -> None:
        width = await own.embed_dim()
        vectors = np.eye(width, dtype=np.float32)[:2]
        task = asyncio.create_task(own.search(vectors, 4, "image", num_pictures=4))
        await asyncio.to_thread(wait_until, lambda: len(read) == 1)
        task.cancel()
        await asyncio.wait([task])
        may_end.set()

    with ThreadPoolExecutor(1) as threads:  # whose end is waited for
        monkeypatch.setattr(deadlines, "_THREADS", threads)
        asyncio.run(leave())
    assert len(read) == 1
    with pytest.raises(NotWanted):  # before the first candidates, and before any further ones
        own._retriever.search(
            np.eye(asyncio.run(own.embed_dim()), dtype=np.float32)[:1],
            2,
            conditions=Conditions(distinct=0.9),
            check=Mock(side_effect=NotWanted),
        )


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

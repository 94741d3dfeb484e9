"""Requests with a timeout: refused if it cannot be kept, and dropped when it is over, whatever works on them."""

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from models.request import SampleRequest
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.front import Front
from pipeline.serve import safety
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.gate import Gate
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards
from pipeline.serve.keys import KeyRing, Meter, add_key, read_keys
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.protocols import Accepted, DeadlinePassed, Images, SampledPictures, TooLittleTime, Vectors
from pipeline.serve.safety import SafetyCalls, SafetyHook
from tests.serve.test_engine import wait_until
from tests.serve.test_metrics import values

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
        return SampledPictures(np.zeros((len(request.seeds), 16, 16, 3), np.uint8), None)

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
    longest = zip(networks.times_s, [0.1, 0.05, 0.1, 0.1, 0.1], strict=True)
    assert all(0 < time_s <= most_s for time_s, most_s in longest)
    assert values(client.get("/metrics").text)["unclip_refusals_total", "deadline"] == 4


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


@pytest.fixture
def hook() -> Iterator["Hook"]:
    hook = Hook()
    yield hook
    hook.may_end.set()


class Hook:
    """A safety hook that hangs at the prompt "hang", or at pictures, until it may end."""

    def __init__(self) -> None:
        self.may_end, self.hangs_at_pictures = threading.Event(), False
        self.calls = list[str]()

    def __call__(self, prompt: str, image: Images | None) -> None:
        self.calls.append(prompt)
        if prompt == "hang" or (self.hangs_at_pictures and image is not None):
            assert self.may_end.wait(60)


def test_a_safety_hook_takes_time_of_the_request_and_a_key_pays_nothing_for_its_prompt(
    hook: Hook, tmp_path: Path
) -> None:
    networks, meter = Networks(), Meter(clock=lambda: 0.0)
    key = add_key(tmp_path / "keys.json", "alice", pixels=1000)
    hook.hangs_at_pictures = True
    behind: Any = GuardedModel(networks, 16, meter, SafetyCalls(hook))  # pyright: ignore[reportArgumentType]
    app = create_app(behind, None, ApiSettings(ModelCard("tiny", 16), longest_s=0.2))
    guards = Guards(app, keys=KeyRing(tmp_path / "keys.json"), meter=meter)
    client = TestClient(guards, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {key}"})
    post = partial(client.post, "/v1/images/generations")
    for more in ({}, {"stream": True}):
        answer = post(json={"prompt": "hang"} | more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert not networks.times_s
    [alice] = read_keys(tmp_path / "keys.json")
    assert meter.rest(alice, "pixels") == 1000
    assert post(json={"prompt": "quick"}).json()["error"]["code"] == "deadline_exceeded"
    assert '"code": "deadline_exceeded"' in post(json={"prompt": "quick", "stream": True}).text
    assert meter.rest(alice, "pixels") == 1000 - 2 * 16**2


def guarded_by(hook: SafetyHook) -> Any:
    return GuardedModel(Networks(), 16, Meter(), SafetyCalls(hook))  # pyright: ignore[reportArgumentType]


def test_hooks_that_hang_hold_up_no_other_pictures_and_no_files(hook: Hook) -> None:
    guarded = guarded_by(hook)
    app = create_app(guarded, None, ApiSettings(ModelCard("tiny", 16)))
    most = safety.NUM_THREADS - 1

    async def ask() -> int:
        hung = [asyncio.ensure_future(guarded.sample(SampleRequest("hang", (1,)))) for _ in range(most)]
        await asyncio.to_thread(wait_until, lambda: len(hook.calls) == most)
        for task in hung:
            task.cancel()
        await asyncio.wait(hung)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            answer = await client.post("/v1/images/generations", json={"prompt": "quick", "timeout": 30})
        hook.may_end.set()
        return answer.status_code

    assert asyncio.run(ask()) == 200
    assert hook.calls == ["hang"] * most + ["quick", "quick"]


def test_a_hook_is_asked_about_all_pictures_of_a_request_at_once() -> None:
    all_asked = threading.Barrier(4)

    def hook(_prompt: str, image: Images | None) -> str | None:
        return None if image is None else f"picture {all_asked.wait(30)}"

    sampled = asyncio.run(guarded_by(hook).sample(SampleRequest("quick", (1, 2, 3, 4))))
    assert sampled.images.shape == (4, 16, 16, 3)


def test_an_error_of_the_hook_ends_the_request_and_calls_that_wait_for_a_thread_never_begin() -> None:
    most, numbers, may_end = safety.NUM_THREADS, itertools.count(1), threading.Event()

    def hook(_prompt: str, image: Images | None) -> None:
        if image is None:
            return
        if next(numbers) == 1:
            raise TimeoutError("the service does not answer")
        assert may_end.wait(60)

    calls = SafetyCalls(hook)
    guarded = GuardedModel(Networks(), 16, Meter(), calls)  # pyright: ignore[reportArgumentType]

    async def ask() -> None:
        with pytest.raises(TimeoutError, match="the service does not answer"):
            await guarded.sample(SampleRequest("quick", tuple(range(most + 8))))
        await asyncio.sleep(0)  # in the loop's next round the others are cancelled
        may_end.set()
        await asyncio.to_thread(calls._threads.shutdown)

    asyncio.run(ask())
    assert next(numbers) - 1 <= most + 1  # the thread that failed may have begun another one


def test_a_hook_that_hangs_is_given_up_and_said_once_by_log_and_readyz(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(safety, "_LONGEST_S", 0.05)
    calls = SafetyCalls(hook)
    behind: Any = GuardedModel(Networks(), 16, Meter(), calls)  # pyright: ignore[reportArgumentType]
    gate = Gate(safety=calls)
    gate.open(create_app(behind, None, ApiSettings(ModelCard("tiny", 16))))
    client = TestClient(gate, base_url="http://127.0.0.1")
    for _ in range(2):
        answer = client.post("/v1/images/generations", json={"prompt": "hang"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "the server's safety hook has not answered within 0.05 s" in answer.json()["error"]["message"]
    assert client.get("/readyz").json() == {"status": "ok", "note": "calls of the safety hook hang: 2 of 32"}
    assert client.post("/v1/images/generations", json={"prompt": "quick"}).status_code == 200
    hook.may_end.set()
    wait_until(lambda: client.get("/readyz").json() == {"status": "ok"})
    begun, ended = (record.getMessage() for record in caplog.records if "safety_hook" in record.getMessage())
    assert begun.startswith("serve.safety_hook has not answered for 0.05 s")
    assert ended == "serve.safety_hook: no call hangs any more"


def test_a_swap_goes_on_with_the_calls_of_the_same_hook(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hooks", SimpleNamespace(same=hook, other=lambda *_: None))
    config = ServeConfig(safety_hook="hooks:same")
    before = Front(config)
    calls: Any = before._safety

    async def ask_and_leave() -> None:
        call = asyncio.ensure_future(calls.reason("hang", None))
        await asyncio.to_thread(wait_until, lambda: hook.calls == ["hang"])
        call.cancel()
        await asyncio.wait([call])

    asyncio.run(ask_and_leave())
    monkeypatch.setattr(safety, "_LONGEST_S", 0)  # it hangs from its beginning

    def note(front: Front) -> str:
        front.gate.open(create_app(Networks(), None, ApiSettings(ModelCard("tiny", 16))))  # pyright: ignore[reportArgumentType]
        return TestClient(front.gate, base_url="http://127.0.0.1").get("/readyz").json().get("note", "")

    same = Front(config, before=before)
    assert note(before) == note(same) == "calls of the safety hook hang: 1 of 32"
    assert len([one for one in caplog.records if "has not answered" in one.getMessage()]) == 1
    assert note(Front(ServeConfig(safety_hook="hooks:other"), before=same)) == ""
    assert note(Front(ServeConfig(), before=same)) == ""

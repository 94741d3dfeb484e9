"""Requests with a timeout: refused if it cannot be kept, and dropped at the next step when it is over."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from models.request import SampleRequest
from pipeline.runtime.remote_model import RemoteModel
from pipeline.runtime.replicas import Hop
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards
from pipeline.serve.keys import Meter
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.picture_files import ModelCard
from pipeline.serve.protocols import Accepted, DeadlinePassed, SampledPictures, TooLittleTime
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
    """Networks that never answer, or say at once that the time is too short."""

    def __init__(self) -> None:
        self.times_s = list[float]()

    async def sample(self, request: SampleRequest, _client: str = "") -> SampledPictures:
        self.times_s.append(request.timeout_s)
        if request.prompt == "short":
            raise TooLittleTime("timeout: too short", retry_after_s=7)
        await asyncio.sleep(60)
        raise AssertionError("never")

    async def stream(self, request: SampleRequest, client: str = "", _num_previews: int = 0) -> Any:
        yield Accepted()
        yield await self.sample(request, client)

    async def metrics(self) -> dict[str, str]:
        return {}


def test_the_recipe_bounds_the_time_and_hung_networks_are_not_waited_for() -> None:
    networks, metrics = Networks(), HttpMetrics()
    behind: Any = GuardedModel(networks, 16, Meter(), longest_s=0.1)  # pyright: ignore[reportArgumentType]
    app = create_app(behind, None, ApiSettings(ModelCard("tiny", 16), metrics=metrics))
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


def test_each_part_of_a_chain_gets_the_time_that_is_left() -> None:
    times_s = list[float]()

    class Part:
        """Stands for Ray's handle."""

        async def remote(self, request: SampleRequest, _client: str, hop: Hop | None) -> Any:
            times_s.append(request.timeout_s)
            await asyncio.sleep(0.1)
            return Hop("decoder", None, "") if hop is None else SampledPictures(np.zeros((1, 2, 2, 3), np.uint8), None)

    handle: Any = type("Handle", (), {"sample": Part()})()
    model = RemoteModel({"prior": handle, "decoder": handle})
    asyncio.run(model.sample(SampleRequest("a", (1,), timeout_s=5)))
    first_s, second_s = times_s
    assert 4 < second_s <= first_s - 0.1 < 5
    with pytest.raises(DeadlinePassed):
        asyncio.run(model.sample(SampleRequest("a", (1,), timeout_s=0.05)))
    assert len(times_s) == 3  # the second part was not asked
    assert not any(map(math.isinf, times_s))

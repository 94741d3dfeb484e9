"""Clients that leave while their body is read or their answer is made."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from starlette.types import Message

from pipeline.networks.cascade import load_cascade
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards
from pipeline.serve.keys import Meter
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.web import ApiError, while_connected
from tests.serve.test_deadlines import Networks
from tests.serve.test_metrics import values
from tests.tiny.workspace import served_workspace

END_OF_BODY: Message = {"type": "http.request", "body": b"", "more_body": False}


def test_work_ends_as_soon_as_its_client_leaves() -> None:
    async def leave() -> None:
        has_left, messages = asyncio.Event(), [END_OF_BODY]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        work = asyncio.create_task(asyncio.sleep(60))
        answer = asyncio.create_task(while_connected(Request({"type": "http"}, receive), work))
        await asyncio.sleep(0.01)
        assert not answer.done()
        has_left.set()
        for _ in range(5):  # turns of the loop, without any time between them
            await asyncio.sleep(0)
        assert work.cancelled()
        with pytest.raises(ApiError) as error:
            await answer
        assert error.value.status == 499

    asyncio.run(leave())


def test_an_answer_in_time_leaves_nothing_that_waits_for_its_client() -> None:
    async def answer() -> None:
        async def receive() -> Message:
            await asyncio.sleep(60)
            raise AssertionError("it was waited for")

        assert await while_connected(Request({"type": "http"}, receive), asyncio.sleep(0, "done")) == "done"
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(answer())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/images/generations", "application/json"),
        ("/v1/images/variations", "multipart/form-data; boundary=a"),
    ],
)
def test_a_body_that_its_client_breaks_off_is_no_error_of_the_server(path: str, kind: str) -> None:
    metrics, statuses = HttpMetrics(), list[int]()
    behind: Any = GuardedModel(Networks(), 16, Meter())  # pyright: ignore[reportArgumentType]
    app = Guards(create_app(behind, None, ApiSettings(ModelCard("tiny", 16), metrics=metrics)), metrics=metrics)
    messages: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b'--a\r\nContent-Disposition: form-data; name="', "more_body": True},
    ]

    async def receive() -> Message:
        return messages.pop()

    async def send(message: Message) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    headers = [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", b"1000")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    asyncio.run(app(scope | {"client": ("127.0.0.1", 1), "server": ("localhost", 80), "scheme": "http"}, receive, send))
    assert statuses == [499]  # which nobody reads
    refusals = {key[1]: count for key, count in values(metrics.text({})).items() if key[0] == "unclip_refusals_total"}
    assert refusals == {"client left": 1}


def test_a_stream_that_nobody_reads_is_dropped(serving: Any, tmp_path: Path) -> None:
    slow = served_workspace(tmp_path, overrides=("decoder.model.sampler.num_steps=400",))
    engine = Engine(load_cascade(finished_artifacts(slow, CASCADE_STEPS)), max_batch_size=4)
    app = create_app(engine, None, ApiSettings(ModelCard("slow", 32)))
    with contextlib.closing(engine), serving(app) as url:
        body = {"prompt": "a", "n": 4, "stream": True, "partial_images": 3}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 20
        while not (now := engine.counts())["dropped"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)
    assert now["active"] == now["pictures"] == 0


def test_a_client_that_leaves_is_dropped(serving: Any, tmp_path: Path) -> None:
    slow = served_workspace(tmp_path, overrides=("decoder.model.sampler.num_steps=400",))  # time enough to leave
    engine = Engine(load_cascade(finished_artifacts(slow, CASCADE_STEPS)), max_batch_size=4, max_waiting=3)
    body = b'{"prompt": "a", "n": 10}'
    with contextlib.closing(engine), serving(create_app(engine, None, ApiSettings(ModelCard("slow", 32)))) as url:
        host, port = url.removeprefix("http://").split(":")
        with contextlib.closing(socket.create_connection((host, int(port)))) as link:
            link.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            while not httpx.get(f"{url}/healthz").json()["requests"]:
                time.sleep(0.01)
        deadline = time.monotonic() + 20
        while not (now := httpx.get(f"{url}/healthz").json())["dropped"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)
    assert now["active"] == now["waiting"] == 0
    assert now["pictures"] < 10

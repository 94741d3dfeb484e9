"""Clients that leave while their body is read or their answer is made."""

import asyncio
from typing import Any

import pytest
from fastapi import Request
from starlette.types import Message

from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards
from pipeline.serve.keys import Meter
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.web import ApiError, while_connected
from tests.serve.test_deadlines import Networks
from tests.serve.test_metrics import values

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

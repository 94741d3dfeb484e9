"""What Ray Serve's proxies answer by themselves; a function stands for the proxy and what is behind it."""

import asyncio
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from pipeline.serve import proxy_answers
from pipeline.serve.proxy_answers import middlewares


class Proxy:
    """Answers each request with the next outcome; None: the process behind it dies."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.bodies = list[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            await outcome(scope, receive, send)


def client_of(proxy: Proxy) -> TestClient:
    [middleware] = middlewares()
    return TestClient(middleware.cls(proxy))


def test_a_request_whose_http_process_dies_is_passed_on_once_more() -> None:
    proxy = Proxy(None, JSONResponse({"a": 1}))
    answer = client_of(proxy).post("/v1/images/generations", content=iter([b"one ", b"two"]))
    assert answer.json() == {"a": 1}
    assert proxy.bodies == [b"one two"] * 2


@pytest.mark.parametrize(
    "outcomes", [(None, None), (PlainTextResponse("Path '/' not found.", 404),), (None, PlainTextResponse("busy", 503))]
)
def test_what_a_proxy_answers_itself_is_503_in_the_form_of_the_api(outcomes: tuple[Any, ...]) -> None:
    headers = {"X-Request-Id": "mine-1"}
    answer = client_of(Proxy(*outcomes)).post("/v1/images/generations", content=b"body", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["Retry-After"] == "2"
    assert (answer.headers["X-Request-Id"], answer.headers["X-Frame-Options"]) == ("mine-1", "DENY")


def test_answers_of_the_http_process_and_health_checks_pass_as_they_are() -> None:
    answers = (JSONResponse({"error": {}}, 404), PlainTextResponse("unclip_pictures 1"), PlainTextResponse("no", 503))
    client = client_of(Proxy(*answers))
    assert client.get("/v1/models").json() == {"error": {}}
    assert client.get("/metrics").text == "unclip_pictures 1"
    assert client.get("/-/healthz").text == "no"


def test_a_stream_that_breaks_off_ends_with_an_event_that_says_so() -> None:
    async def break_off(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"event: a\ndata: {}\n\n", "more_body": True})

    text = client_of(Proxy(break_off)).post("/", content=b"").text
    assert text.startswith("event: a\n")
    assert '"code": "not_ready"' in text.partition("event: error\n")[2]

    whole = StreamingResponse(iter(["event: a\ndata: {}\n\n"]), media_type="text/event-stream")
    assert client_of(Proxy(whole)).post("/", content=b"").text == "event: a\ndata: {}\n\n"


async def _leave() -> Message:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize("limit", [None, 3])
def test_nothing_is_passed_on_again_for_a_client_that_left_or_a_body_above_the_limit(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:

    proxy, sent = Proxy(None, None), list[Message]()
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"body"}

    async def send(message: Message) -> None:
        sent.append(message)

    if limit is not None:
        monkeypatch.setattr(proxy_answers, "BODY_LIMIT_BYTES", limit)
    asyncio.run(middlewares()[0].cls(proxy)(scope, receive if limit else _leave, send))
    assert len(proxy.bodies) == 1
    assert [message["status"] for message in sent if "status" in message] == ([503] if limit else [])


class Behind:
    """What is behind a proxy: a process that takes as long as the test says for a request, or none yet."""

    def __init__(self) -> None:
        self.is_there = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.paths = list[str]()
        self.given_up = list[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.paths.append(path)
        try:
            await self.is_there.wait()
            if path != "/livez":
                await self.may_answer.wait()
        except asyncio.CancelledError:
            self.given_up.append(path)
            await PlainTextResponse("disconnected", 499)(scope, receive, send)  # as Ray Serve's proxy does
            return
        await JSONResponse({"status": "ok"})(scope, receive, send)


async def _get(app: Any, path: str, method: str = "GET") -> int:
    """The status of an answer."""
    statuses = list[int]()

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
    [status] = statuses
    return status


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_answers, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(proxy_answers, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(proxy_answers, "_ABSENT_S", 0.2)
    monkeypatch.setattr(proxy_answers, "_STANDSTILL_S", 0.8)
    monkeypatch.setattr(proxy_answers, "_AGAIN_S", 2.0)


@pytest.mark.usefixtures("fast")
def test_where_no_process_takes_requests_they_are_refused_until_one_does() -> None:
    async def ask() -> None:
        behind = Behind()
        app = middlewares()[0].cls(behind)
        behind.may_answer.set()
        assert await asyncio.gather(*(_get(app, "/readyz") for _ in range(3))) == [503] * 3
        assert behind.given_up == ["/readyz"] * 3
        assert await _get(app, "/readyz") == 503
        assert behind.paths.count("/readyz") == 3  # refused at once
        assert await _get(app, "/v1/images/generations", "POST") == 503
        behind.is_there.set()
        await asyncio.sleep(0.01)
        assert await _get(app, "/readyz") == 200

    asyncio.run(ask())


@pytest.mark.usefixtures("fast")
def test_a_request_that_a_process_has_taken_may_last_as_long_as_it_does() -> None:
    async def ask() -> None:
        behind = Behind()
        app = middlewares()[0].cls(behind)
        behind.is_there.set()
        asked = asyncio.ensure_future(_get(app, "/v1/images/generations", "POST"))
        await asyncio.sleep(0.3)
        behind.is_there.clear()  # the process has it; a second one would find none
        await asyncio.sleep(1)
        assert not asked.done()
        behind.may_answer.set()
        assert await asked == 200
        assert behind.paths == ["/v1/images/generations", "/livez"]

    asyncio.run(ask())


@pytest.mark.usefixtures("fast")
def test_what_a_process_has_taken_that_stands_still_for_a_moment_is_not_lost() -> None:
    async def ask() -> None:
        behind = Behind()
        behind.may_answer.set()
        app = middlewares()[0].cls(behind)
        asked = [asyncio.ensure_future(_get(app, "/v1/images/generations", "POST")) for _ in range(20)]
        await asyncio.sleep(0.4)
        assert await _get(app, "/v1/images/generations", "POST") == 503  # a new one
        behind.is_there.set()
        assert await asyncio.gather(*asked) == [200] * 20

    asyncio.run(ask())


@pytest.mark.usefixtures("fast")
def test_one_process_that_hangs_closes_nothing_beside_others_that_do_not() -> None:
    async def ask() -> None:
        num_probes = 0

        async def several(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal num_probes
            num_probes += scope["path"] == "/livez"
            if scope["path"] == "/livez" and num_probes == 1:
                await asyncio.Future()
            if scope["path"] == "/slow":
                await asyncio.sleep(0.4)
            await JSONResponse({})(scope, receive, send)

        app = middlewares()[0].cls(several)
        assert await _get(app, "/slow", "POST") == 200
        assert await _get(app, "/quick") == 200

    asyncio.run(ask())


@pytest.mark.usefixtures("fast")
def test_a_process_that_only_ends_what_it_has_takes_no_requests() -> None:
    async def ask() -> None:
        async def ending(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != "/old":
                await asyncio.Future()
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while True:
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.sleep(0.02)

        app = middlewares()[0].cls(ending)
        old = asyncio.ensure_future(_get(app, "/old", "POST"))
        await asyncio.sleep(0.1)
        assert await _get(app, "/new") == 503
        assert not old.done()
        old.cancel()

    asyncio.run(ask())


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_request_whose_process_dies_waits_for_the_next_one(comes_back: bool) -> None:
    async def ask() -> None:
        behind = Behind()
        behind.may_answer.set()

        async def die(scope: Scope, receive: Receive, send: Send) -> None:
            if behind.paths:
                await behind(scope, receive, send)
            behind.paths.append("died")

        app = middlewares()[0].cls(die)
        asked = asyncio.ensure_future(_get(app, "/v1/images/generations", "POST"))
        await asyncio.sleep(1.2)
        assert not asked.done()
        assert await _get(app, "/readyz") == 503
        if comes_back:
            behind.is_there.set()
        assert await asked == (200 if comes_back else 503)
        assert behind.given_up.count("/v1/images/generations") == (not comes_back)

    asyncio.run(ask())

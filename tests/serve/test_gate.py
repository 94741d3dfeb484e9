import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from pipeline.errors import StepError
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.gate import Gate
from pipeline.serve.http_server import HttpServer, is_loopback, listen, url_of
from tests.ports import free_port


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Python goes from thread to thread after each few operations."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.fixture
def url(gate: Gate, serving: Callable[[Any], AbstractContextManager[str]]) -> Iterator[str]:
    with serving(gate) as url:
        yield url


def test_while_the_networks_load_everything_but_livez_is_503_with_the_reason(gate: Gate, url: str) -> None:
    gate.close("the networks are loading")
    assert httpx.get(f"{url}/livez").status_code == 200
    for path in ("/readyz", "/healthz", "/", "/v1/models"):
        answer = httpx.get(url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert "the networks are loading" in answer.json()["error"]["message"]
        assert answer.headers["Connection"] == "close"
        assert answer.headers["Retry-After"] == "10"  # a start takes about as long


def test_what_is_under_way_ends_and_what_is_new_is_refused(gate: Gate, url: str) -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    app = FastAPI()

    @app.get("/slow")
    def slow() -> str:
        has_begun.set()
        may_end.wait(10)
        return "done"

    gate.open(app)
    assert httpx.get(f"{url}/readyz").status_code == 200
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(httpx.get(f"{url}/slow")))
    thread.start()
    assert has_begun.wait(10)
    gate.close("the server is stopping")
    other = FastAPI()
    assert (gate.num_requests, gate.requests_of(app)(), gate.requests_of(other)()) == (1, 1, 0)
    assert not gate.wait_until_idle(0.01)
    assert httpx.get(f"{url}/slow").status_code == 503
    may_end.set()
    assert gate.wait_until_idle(10)
    thread.join()
    assert (answers[0].status_code, answers[0].json()) == (200, "done")
    assert (gate.num_requests, gate.requests_of(app)()) == (0, 0)


@pytest.mark.usefixtures("often_switched")
def test_a_request_under_way_is_counted_while_others_come_and_go(gate: Gate) -> None:
    app, is_over = FastAPI(), threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            gate._count(app, 1)
            gate._count(app, -1)

    gate._count(app, 1)
    others = threading.Thread(target=come_and_go)
    others.start()
    num_requests = gate.requests_of(app)
    counts = {num_requests() for _ in range(20_000)}
    is_over.set()
    others.join()
    assert counts <= {1, 2}


def test_a_failure_that_nothing_caught_has_the_form_of_the_api(gate: Gate, url: str) -> None:
    class Broken:
        async def stats(self) -> dict[str, int]:
            raise KeyError("secret")

    model: Any = Broken()
    gate.open(create_app(model, None, ApiSettings(ModelCard("tiny", 16))))
    answer = httpx.get(f"{url}/healthz")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert gate.wait_until_idle(10)


def test_a_taken_port_is_refused_and_a_free_one_is_answered_on(gate: Gate) -> None:
    port = free_port()
    with HttpServer(gate, listen("127.0.0.1", port)):
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        with pytest.raises(StepError, match=rf"127\.0\.0\.1:{port} cannot be listened on .*--port {port + 1}"):
            listen("127.0.0.1", port)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/livez")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_urls_are_those_of_a_browser() -> None:
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 80) == "http://[::1]:80"

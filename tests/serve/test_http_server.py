"""Connections that stand still are ended, and those that move are not, over real sockets."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from pipeline.serve import http_server
from pipeline.serve.http_server import HttpServer, listen
from tests.ports import free_port

_STILL_S = 0.5
_NUM_BYTES = 32 << 20
"""Of an answer that no buffer of the system holds."""


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    answer = Response(b"x" * _NUM_BYTES) if scope["path"] == "/large" else PlainTextResponse("here")
    if scope["path"] == "/length":
        answer = PlainTextResponse(str(len(await Request(scope, receive).body())))
    await answer(scope, receive, send)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setattr(http_server, "_LONGEST_STILL_S", _STILL_S)
    monkeypatch.setattr(http_server, "_LOOK_EVERY_TICKS", 1)
    with HttpServer(_app, listen("127.0.0.1", free_port())) as server:
        yield server


@contextlib.contextmanager
def _connected(server: HttpServer, request: bytes) -> Iterator[socket.socket]:
    with contextlib.closing(socket.socket()) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        link.settimeout(20)
        link.connect(server._socket.getsockname())
        link.sendall(request)
        yield link


def _wait_until_ended(server: HttpServer) -> float:
    """Wait until the server holds no connection; how long that took."""
    started_s = time.monotonic()
    while not server._server.started or server._server.server_state.connections:
        assert time.monotonic() < started_s + 20
        time.sleep(0.01)
    return time.monotonic() - started_s


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@pytest.mark.parametrize(
    "request_",
    [b"", b"GET / HTTP/1.1\r\nHost:", _get("/") + b"GET / HT"],
    ids=["nothing", "half a head", "a second half"],
)
def test_a_client_that_sends_no_request_is_not_waited_for(server: HttpServer, request_: bytes) -> None:
    with _connected(server, request_) as link:
        if b"\r\n\r\n" in request_:
            assert b"here" in link.recv(4096)
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(4096) == b""
        _wait_until_ended(server)


def test_an_answer_that_is_not_read_is_given_up_and_one_that_is_read_slowly_is_not(server: HttpServer) -> None:
    with _connected(server, _get("/large")) as link:
        assert link.recv(4096).startswith(b"HTTP/1.1 200")
        _wait_until_ended(server)  # its memory is free, although the client is still there
    received, started_s = 0, time.monotonic()
    with _connected(server, _get("/large")) as link:
        while received < _NUM_BYTES:
            data = link.recv(1 << 20)
            assert data, f"ended after {received} bytes"
            received += len(data)
            if time.monotonic() < started_s + 3 * _STILL_S:
                time.sleep(0.02)
    assert time.monotonic() - started_s > 2 * _STILL_S


@pytest.mark.parametrize("request_", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_form_of_the_api(server: HttpServer, request_: bytes) -> None:
    with _connected(server, request_) as link:
        answer = _received(link)
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().splitlines()
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 400 Bad Request"
    assert json.loads(body)["error"]["code"] == "invalid_request"
    assert (headers["content-type"], headers["content-length"]) == ("application/json", str(len(body)))
    assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("deny", "nosniff")
    assert headers["x-request-id"]


def _received(link: socket.socket) -> bytes:
    """All that comes until the connection is ended."""
    answer = b""
    while received := link.recv(4096):
        answer += received
    return answer


_LINE = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
_FULL = http_server._MAX_HEAD_BYTES
"""Bytes; those of a request that is refused as a whole are all read, so its client sees the answer."""


@pytest.mark.parametrize(
    "request_",
    [
        _LINE + b"X: " + b"a" * (_FULL - len(_LINE) - 2),
        _LINE + b"X: b\r\n" * http_server._MAX_HEAD_FIELDS + b"X",
        b"GET /" + b"a" * (_FULL - 4),
        _LINE + b"X: " + b"a" * _FULL + b"\r\n\r\n",
    ],
    ids=["field", "fields", "path", "whole"],
)
def test_a_head_has_an_end(server: HttpServer, request_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_LONGEST_STILL_S", 20.0)
    with _connected(server, request_) as link:
        head, _, body = _received(link).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large")
    assert json.loads(body)["error"]["code"] == "head_too_large"
    with _connected(server, _get("/")) as link:
        assert b"here" in link.recv(4096)


def test_what_is_refused_before_it_is_read_is_said_once_a_minute(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "_refusals", http_server._Refusals())

    def refuse() -> None:
        for request in (_LINE + b"X: b\r\n" * http_server._MAX_HEAD_FIELDS + b"X", b"nonsense\r\n\r\n"):
            with _connected(server, request) as link:
                _received(link)

    refuse(), refuse()
    fields, nonsense = (record.getMessage() for record in caplog.records)
    assert fields == (
        "refused before it was read (1 since the last such line), from 127.0.0.1: "
        "the head of the request is above 65536 bytes or 128 fields"
    )
    assert "no HTTP request" in nonsense
    caplog.clear()
    monkeypatch.setattr(http_server, "_SAY_EVERY_S", 0.0)
    refuse()
    assert all("(2 since the last such line)" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("fields", [b"X: b\r\n" * http_server._MAX_HEAD_FIELDS, b"X: " + b"a" * _FULL])
def test_what_follows_a_body_in_chunks_has_an_end(
    server: HttpServer, fields: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_LONGEST_STILL_S", 20.0)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with _connected(server, head + b"1\r\na\r\n0\r\n") as link:
        assert b"here" in link.recv(4096)
        link.sendall(fields)
        assert b"head_too_large" in _received(link)


def test_a_bound_of_heads_is_none_of_bodies_and_of_connections(server: HttpServer) -> None:
    field = b"X: " + b"a" * (_FULL - 200) + b"\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"a" * 4096 + b"\r\n" + b"1\r\na\r\n" * 20_000
    posts = {
        b"Content-Length: 3000000\r\n\r\n" + b"a" * 3_000_000: b"3000000",
        chunks + b"0\r\n\r\n": b"24096",
    }
    with _connected(server, b"") as link:
        for rest, length in posts.items():
            for _ in range(3):
                link.sendall(b"POST /length HTTP/1.1\r\nHost: localhost\r\n" + field + rest)
                assert length in link.recv(4096)
                link.sendall(_LINE + field + b"\r\n")
                assert b"here" in link.recv(4096)

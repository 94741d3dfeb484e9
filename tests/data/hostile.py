"""A server on the loopback that does everything a server should not do; the path of a URL names the fault."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit

from tests.data.conftest import make_picture

STALL_S = 20.0
_ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
DEAD_ADDRESSES = tuple(f"127.0.9.{number}" for number in range(1, 7))


class HostileServer:
    """Listens on three loopback addresses, on one port; use it in a ``with`` block.

    ``requests`` counts requests by the Host header and target, ``headers`` keeps the newest head of each target, ``most``
    is the largest number of requests under way at once by host, ``most_in_all`` that of all hosts. ``robots`` and ``tdm`` are files of hosts by name.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.heads: dict[str, str] = {}
        self.times: dict[str, list[float]] = {}
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.most_in_all = 0
        self.robots: dict[str, str] = {}
        self.tdm: dict[str, str] = {}
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_open = True
        first = self._listen(_ADDRESSES[0], 0)
        self.port: int = first.getsockname()[1]
        for address in _ADDRESSES[1:]:
            self._listen(address, self.port)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HostileServer:
        for listener in self._sockets:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for listener in self._sockets:
            listener.close()

    def _listen(self, address: str, port: int) -> socket.socket:
        listener = socket.create_server((address, port), backlog=256)
        self._sockets.append(listener)
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while self._is_open:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(STALL_S)
                while self._answer(connection):
                    pass
            except (OSError, ValueError):
                return

    def _answer(self, connection: socket.socket) -> bool:
        """Answer one request; returns whether the connection may be used again."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = connection.recv(1)
            if not data:
                return False
            head += data
        text = head.decode("latin-1")
        words = text.split(" ")
        if len(words) < 2:  # no request: somebody looks for another server, which had this port before
            return False
        target = words[1]
        host = next(
            (line.partition(":")[2].strip() for line in text.split("\r\n") if line.lower().startswith("host:")), ""
        )
        host = host.rsplit(":", 1)[0]
        with self._lock:
            self.requests[f"{host}{target}"] += 1
            self.heads[target] = text
            self.times.setdefault(host, []).append(time.monotonic())
            self.now[host] += 1
            self.most[host] = max(self.most[host], self.now[host])
            self.most_in_all = max(self.most_in_all, self.now.total())
        try:
            return self._act(connection, host, target)
        finally:
            with self._lock:
                self.now[host] -= 1

    def _act(self, connection: socket.socket, host: str, target: str) -> bool:
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/robots.txt":
            return self._file(connection, self.robots.get(host))
        if parts.path == "/.well-known/tdmrep.json":
            return self._file(connection, self.tdm.get(host))
        kind = parts.path.strip("/").split("/")[0]
        act: Callable[[socket.socket, str, dict[str, str]], bool] | None = getattr(
            self, f"do_{kind.replace('-', '_')}", None
        )
        if act is None:
            return _send(connection, b"", status="404 Not Found")
        return act(connection, f"{host}{target}", query)

    def _file(self, connection: socket.socket, text: str | None) -> bool:
        if text is None:
            return _send(connection, b"", status="404 Not Found")
        if text.startswith("status "):
            return _send(connection, b"", status=text.removeprefix("status "))
        if text == "stall":
            return _stall()
        if text == "slow":
            time.sleep(0.1)
            text = ""
        if text == "cut":
            connection.sendall(_head(1000) + b"User-agent: *")
            return False
        if text == "garbage":
            connection.sendall(b"220 mail.example.com ESMTP\r\n" * 3)
            return False
        return _send(connection, text.encode())

    def do_ok(self, connection: socket.socket, _target: str, query: dict[str, str]) -> bool:
        """A picture; ?seed= chooses which."""
        return _send(connection, make_picture(int(query.get("seed", "0"))))

    def do_wait(self, connection: socket.socket, _target: str, query: dict[str, str]) -> bool:
        """A picture after a moment."""
        time.sleep(float(query.get("s", "0.1")))
        return _send(connection, make_picture(0))

    def do_silent(self, _connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """Accept, read the request, and say nothing."""
        return _stall()

    def do_half_head(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """Stop in the middle of the headers."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Ty")
        return _stall()

    def do_drip_head(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """Headers byte by byte, without an end."""
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        return _drip(connection, b"X-Filler: x\r\n" * 1000)

    def do_half_body(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """Stop in the middle of the body."""
        body = make_picture(0)
        connection.sendall(_head(len(body)) + body[:500])
        return _stall()

    def do_drip(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """The body byte by byte."""
        body = make_picture(0)
        connection.sendall(_head(len(body)))
        return _drip(connection, body)

    def do_endless(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """A body without a length and without an end."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
        while True:
            connection.sendall(b"\xff" * 65536)

    def do_short(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """Fewer bytes than the length."""
        body = make_picture(0)
        connection.sendall(_head(len(body)) + body[:-200])
        return False

    def do_claims_much(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """A length of a terabyte."""
        connection.sendall(_head(1 << 40) + b"x")
        return _stall()

    def do_cut_chunks(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """Chunks that end before the last."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")
        return False

    def do_garbage(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """No HTTP at all."""
        connection.sendall(b"220 mail.example.com ESMTP\r\n" * 3)
        return False

    def do_long_head(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """A header of a megabyte."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * (1 << 20) + b"\r\n\r\n")
        return False

    def do_reset(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """RST in place of an answer."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def do_reset_body(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """RST in the middle of the body."""
        body = make_picture(0)
        connection.sendall(_head(len(body)) + body[:300])
        time.sleep(0.1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def do_loop(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """A redirect to itself."""
        return _send(connection, b"", status="302 Found", headers="Location: /loop\r\n")

    def do_nowhere(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """A redirect without a target."""
        return _send(connection, b"", status="302 Found")

    def do_to(self, connection: socket.socket, _target: str, query: dict[str, str]) -> bool:
        """A redirect to ?url=."""
        return _send(connection, b"", status="302 Found", headers=f"Location: {unquote(query['url'])}\r\n")

    def do_status(self, connection: socket.socket, target: str, query: dict[str, str]) -> bool:
        """?code=, for the first ?times= requests; then a picture.

        With Retry-After ?after=, and Date ?date=; or with both by the server's ?clock=.
        """
        with self._lock:
            count = self.requests[target]
        if count > int(query.get("times", "1000000")):
            return _send(connection, make_picture(0))
        after = f"Retry-After: {query['after']}\r\n" if "after" in query else ""
        if "date" in query:
            after += f"Date: {query['date']}\r\n"
        if "clock" in query:  # a date in two seconds, by a clock that is off by so many
            now = time.time() + float(query["clock"])
            dates = [formatdate(moment, usegmt=True) for moment in (now, now + 2)]
            after = f"Date: {dates[0]}\r\nRetry-After: {dates[1]}\r\n"
        return _send(connection, b"busy", status=f"{query['code']} Busy", headers=after)

    def do_gzip(self, connection: socket.socket, _target: str, query: dict[str, str]) -> bool:
        """A gzip that nobody asked for: of ?what= picture, bomb, cut, lie (no gzip at all).

        The first ?first= bytes of its body come alone.
        """
        body = make_picture(0)
        bodies: dict[str, Callable[[], bytes]] = {
            "picture": lambda: gzip.compress(body),
            "bomb": lambda: gzip.compress(bytes(20 << 20), 9),
            "cut": lambda: gzip.compress(body)[:-300],
            "lie": lambda: body,
            "broken": lambda: gzip.compress(body)[:-8] + bytes(8),
        }
        sent = bodies[query["what"]]()
        head, first = _head(len(sent), headers="Content-Encoding: gzip\r\n"), int(query.get("first", "0"))
        connection.sendall(head + sent[:first])
        time.sleep(0.1 if first else 0.0)
        connection.sendall(sent[first:])
        return True

    def do_brotli(self, connection: socket.socket, _target: str, _query: dict[str, str]) -> bool:
        """An encoding that is not undone."""
        return _send(connection, b"brotli", headers="Content-Encoding: br\r\n")

    def do_header(self, connection: socket.socket, _target: str, query: dict[str, str]) -> bool:
        """A picture with the header ?name=, ?value=."""
        return _send(connection, make_picture(0), headers=f"{query['name']}: {query['value']}\r\n")


@contextlib.contextmanager
def dead_addresses() -> Generator[int]:
    """A port at which ``DEAD_ADDRESSES`` never answer a SYN: their queues are full."""
    listeners, fillers, port = list[socket.socket](), list[socket.socket](), 0
    for address in DEAD_ADDRESSES:
        listener = socket.socket()
        listener.bind((address, port))
        listener.listen(0)
        port = listener.getsockname()[1]
        listeners.append(listener)
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((address, port))
            fillers.append(filler)
    time.sleep(0.1)
    yield port
    for one in [*fillers, *listeners]:
        one.close()


def urls_that_never_end(server: HostileServer, dead_port: int, count: int) -> list[str]:
    """URLs of a server that drips or never answers, and of dead addresses, each kind as often as the others."""
    paths = ("silent", "drip", "half-body", "drip-head")
    urls = [f"{server.url}/{path}" for path in paths] + [
        f"http://{address}:{dead_port}/a" for address in DEAD_ADDRESSES
    ]
    return [f"{urls[number % len(urls)]}?{number}" for number in range(count)]


def _head(num_bytes: int, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {num_bytes}\r\n{headers}\r\n".encode()


def _send(connection: socket.socket, body: bytes, *, status: str = "200 OK", headers: str = "") -> bool:
    connection.sendall(_head(len(body), status, headers) + body)
    return True


def _stall() -> bool:
    time.sleep(STALL_S)
    return False


def _drip(connection: socket.socket, data: bytes) -> bool:
    for value in data:
        connection.sendall(bytes([value]))
        time.sleep(0.1)
    return False

"""Memory that requests under way hold: their bodies, and pictures that were decoded for them.

Each is bounded for itself, and any number of clients may send the largest one: so the sums are bounded as well.
"""

import time
import weakref
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from models.request import Edit, Interpolation
from pipeline.serve.protocols import Overloaded

_MAX_BODIES_BYTES = 512 << 20
"""Largest sum of the bodies of all requests under way."""
_MAX_PICTURES_BYTES = 512 << 20
"""Largest memory of the decoded pictures of all requests under way."""
_SMALL_BYTES = 1 << 16
"""Of a body that is always taken: its connection takes as much."""
_SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""
_BODY = "unclip.body"
"""Of a request's scope: the ``Hold`` of its body."""


@dataclass(eq=False)
class Hold:
    """What one request holds; a context manager that ends with the request.

    One that is never entered ends when nothing refers to it any more.
    """

    of: "HeldBytes"
    num_bytes: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def __enter__(self) -> None:
        """Nothing: it began when there was something to hold."""

    def __exit__(self, *_: object) -> None:
        """Make room for others."""
        self.end()

    def end(self) -> None:
        """Make room for others."""
        if self.num_bytes:
            self.of.note_end(time.monotonic() - self.began_s)
        self.num_bytes = 0


class HeldBytes:
    """The sum of what all requests under way hold of one kind.

    Args:
        what: What that is, for people.
        most_bytes: Largest sum. A request alone is taken whatever it holds.
    """

    def __init__(self, what: str, most_bytes: int) -> None:
        self._what = what
        self._most_bytes = most_bytes
        self._holds = weakref.WeakSet[Hold]()
        self._mean_s = 0.0
        """Running mean of the time for which something is held."""

    @property
    def num_bytes(self) -> int:
        """Bytes that all requests under way hold."""
        return sum(hold.num_bytes for hold in self._holds)

    def hold(self, num_bytes: int) -> Hold:
        """Count what another request holds, until it ends.

        Raises:
            Overloaded: If what the requests before hold leaves no room for it.
        """
        hold = Hold(self)
        self.grow(hold, num_bytes)
        return hold

    def grow(self, hold: Hold, num_bytes: int) -> None:
        """Let a request hold ``num_bytes`` in all; raises as ``hold``."""
        others = [other.num_bytes for other in self._holds if other is not hold and other.num_bytes]
        if others and sum(others) + num_bytes > self._most_bytes:
            reason = f"{self._what} of {sum(others) / 1e6:.0f} MB are under way already"
            raise Overloaded(reason, retry_after_s=self._mean_s / len(others))
        hold.num_bytes = num_bytes
        self._holds.add(hold)

    def note_end(self, taken_s: float) -> None:
        """Note for how long a request has held something."""
        self._mean_s += (taken_s - self._mean_s) * (_SMOOTHING if self._mean_s else 1.0)


class HeldPictures(HeldBytes):
    """The decoded pictures of requests under way; each waits as long as its request."""

    def __init__(self, most_bytes: int = _MAX_PICTURES_BYTES) -> None:
        super().__init__("pictures to edit", most_bytes)

    def hold_edit(self, edit: Edit) -> Hold:
        """Count the pictures of an edit; raises as ``hold``."""
        pictures = edit.pictures if isinstance(edit, Interpolation) else (edit.picture,)
        return self.hold(sum(len(picture.levels) for picture in pictures))


class HeldBodies:
    """An ASGI application that counts the bodies of its requests, each until it is answered or calls ``end_body``.

    Args:
        app: Reads them by ``read_body`` (pipeline/serve/web.py).
        most_bytes: Largest sum. A JSON body is twice in memory while it is parsed.
    """

    def __init__(self, app: ASGIApp, most_bytes: int = _MAX_BODIES_BYTES) -> None:
        self._app = app
        self._bytes = HeldBytes("bodies of requests", most_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        scope[_BODY] = hold = Hold(self._bytes)
        with hold:
            await self._app(scope, receive, send)


def note_body(request: Request, num_bytes: int) -> None:
    """Count what has come of a body.

    Raises:
        Overloaded: If the bodies of the other requests leave no room for it.
    """
    hold: Hold | None = request.scope.get(_BODY)
    if hold is not None and num_bytes > _SMALL_BYTES:
        hold.of.grow(hold, num_bytes)


def end_body(request: Request) -> None:
    """Make room for others: nothing refers to the body any more."""
    hold: Hold | None = request.scope.get(_BODY)
    if hold is not None:
        hold.end()

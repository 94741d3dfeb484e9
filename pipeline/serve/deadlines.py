"""The time of a request: what happens when it is over, and how work ends that nobody waits for any more."""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import Field

from pipeline.serve.protocols import DeadlinePassed

T = TypeVar("T")

MAX_TIMEOUT_S = 3600.0
Timeout = Annotated[float | None, Field(gt=0, le=MAX_TIMEOUT_S)]
"""The field ``timeout`` of a body: longest time until the answer, in seconds; None: as long as the server allows."""


_THREADS = ThreadPoolExecutor(8, "unclip-search")
"""Of work that takes long. It holds none of the threads that the whole process shares, which write pictures' files."""


class NotWanted(Exception):
    """Nobody waits for the result of this work."""


def end_of(timeout_s: float) -> float:
    """When the time of a request that comes now is up, by ``time.monotonic``; infinity if ``timeout_s`` is 0."""
    return time.monotonic() + timeout_s if timeout_s else math.inf


def left_of(ends_s: float) -> float:
    """What is left of the time of a request, in seconds, as ``end_of`` takes it; 0 if it is infinite.

    Raises:
        DeadlinePassed: If nothing is.
    """
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise DeadlinePassed
    return 0.0 if left_s == math.inf else left_s


async def until(ends_s: float, answer: Awaitable[T], *, grace_s: float = 0.0) -> T:
    """An answer that comes in time; if it does not, it is cancelled.

    Args:
        ends_s: When the time is up, by ``time.monotonic``.
        answer: What is waited for.
        grace_s: For how much longer it may say itself that its time is up, in seconds.

    Raises:
        DeadlinePassed: If the time is up.
    """
    limit = asyncio.timeout(None if ends_s == math.inf else max(0.0, ends_s - time.monotonic()) + grace_s)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise DeadlinePassed from None
        raise


@contextmanager
def beside(work: Coroutine[Any, Any, T]) -> Generator[asyncio.Task[T]]:
    """Work that goes on beside a block from its beginning; if the block ends before it does, it is cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(read_error)
    try:
        yield task
    finally:
        task.cancel()


def read_error(task: asyncio.Future[Any]) -> None:
    """Let asyncio not complain of an error that nobody waits for: its block has failed, or its client has left."""
    if not task.cancelled():
        task.exception()


async def while_wanted(work: Callable[[Callable[[], None]], T], threads: ThreadPoolExecutor = _THREADS) -> T:
    """Run ``work`` in a thread, which can end early; it does not begin if nobody waits for it.

    Args:
        work: Gets a function to call between its parts. Once this coroutine is cancelled, that raises ``NotWanted``,
            which ends the work.
        threads: Those that do it.
    """
    has_left, job = threading.Event(), [work]

    def check() -> None:
        if has_left.is_set():
            raise NotWanted

    def run() -> T:
        return job.pop()(check)

    try:
        return await asyncio.wrap_future(threads.submit(run))
    finally:
        has_left.set()
        job.clear()  # what is cancelled lies in the queue until its turn comes, and would keep its pictures so long

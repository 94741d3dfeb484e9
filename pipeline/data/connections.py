"""The places of URLs that are fetched at once, and who gets the next one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator

from pipeline.data.clocks import Clock

_HAS_TURN, _IS_BACK, _BEGINS = range(3)
"""Who waits, in the order in which they are served."""


class Connections:
    """What each URL that is fetched holds one of; use it in ``async with``.

    Free ones go first to URLs whose host's turn has come, then to the others that come back, then to those that begin:
    else a URL that comes back would wait for all that stand in the queue.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self._num_free = count
        self._queues = tuple(deque[asyncio.Future[None]]() for _ in (_HAS_TURN, _IS_BACK, _BEGINS))

    async def __aenter__(self) -> None:
        await self._take(_BEGINS)

    async def __aexit__(self, *_: object) -> None:
        self._give()

    @contextlib.asynccontextmanager
    async def lent(self, clock: Clock, *, has_turn: bool = False) -> AsyncGenerator[None]:
        """Give a URL's connection to another one inside ``async with``, and wait for one at its end.

        After an error there is no wait: the URL ends, and what it gives back then is missing until it does.

        Args:
            clock: The URL's clock, which stands still while it waits.
            has_turn: Whether the host's turn has come at the end.
        """
        self._give()
        try:
            yield
            with clock.stopped():
                await self._take(_HAS_TURN if has_turn else _IS_BACK)
        except BaseException:  # also a cancellation
            self._num_free -= 1
            raise

    async def _take(self, queue: int) -> None:
        if self._num_free > 0:  # then nobody waits
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queues[queue].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came in the same moment
                self._give()
            raise

    def _give(self) -> None:
        self._num_free += 1
        for queue in self._queues:
            while queue and self._num_free > 0:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    self._num_free -= 1

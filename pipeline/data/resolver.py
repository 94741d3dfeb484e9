"""Names of hosts: resolved in threads, remembered, and without the addresses that are not allowed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import aiohttp.abc

from pipeline.data.causes import FetchError
from pipeline.data.urls import AddressRules, refused_address

T = TypeVar("T")

_NAME_TTL_S, _FAILURE_TTL_S = 300.0, 60.0
_LOOKUPS_AT_ONCE = 256
_CACHED_HOSTS = 50_000


@dataclass(eq=False)
class _Answer(Generic[T]):
    task: asyncio.Task[T | FetchError]
    since: float = math.inf
    """When it came, on the monotonic clock."""
    num_bytes: int = 0
    """Its size; of one that has not come, and of an error, nothing."""


class HostCache(Generic[T]):
    """Results of coroutines, by key: a key is asked once for all that wait for it, and errors are forgotten sooner.

    The oldest results make place for new ones.

    Args:
        ask: What is asked.
        ttl_s: How long a result is kept, in seconds.
        size_of: Size of a result, in bytes, for ``most_bytes``.
        most_bytes: Most that all results take, unless one alone takes more.
    """

    def __init__(
        self,
        ask: Callable[[str], Coroutine[Any, Any, T | FetchError]],
        ttl_s: float,
        *,
        size_of: Callable[[T], int] = lambda _: 0,
        most_bytes: int = 0,
    ) -> None:
        self._ask = ask
        self._ttl_s = ttl_s
        self._size_of = size_of
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._answers: dict[str, _Answer[T]] = {}
        self._sized: dict[str, None] = {}
        """Keys of the results that take memory, in the order in which they came."""

    async def get(self, key: str) -> T:
        """The result of a key.

        Raises:
            FetchError: If the coroutine returned one.
        """
        answer = self._answer(key) or self._begin(key)
        result = await asyncio.shield(answer.task)
        if isinstance(result, FetchError):
            raise type(result)(result.cause, result.detail)  # a new one: many rows raise it
        return result

    def knows(self, key: str) -> bool:
        """Whether ``get`` waits for nothing."""
        answer = self._answer(key)
        return answer is not None and answer.task.done()

    def close(self) -> None:
        """Stop what still runs."""
        for answer in self._answers.values():
            answer.task.cancel()

    def _answer(self, key: str) -> _Answer[T] | None:
        """The answer of a key, or what asks for it; None if it is to be asked."""
        answer = self._answers.get(key)
        is_old = answer is not None and time.monotonic() - answer.since > self._ttl_of(answer.task)
        return None if is_old else answer

    def _begin(self, key: str) -> _Answer[T]:
        answer = _Answer(asyncio.create_task(self._ask(key)))
        self._drop(key)
        if len(self._answers) >= _CACHED_HOSTS:
            self._drop(next(iter(self._answers)))
        self._answers[key] = answer
        answer.task.add_done_callback(lambda _: self._note(key, answer))
        return answer

    def _note(self, key: str, answer: _Answer[T]) -> None:
        """An answer has come: where all take too much, the oldest go."""
        answer.since = time.monotonic()
        if self._answers.get(key) is not answer or _is_error(answer.task):
            return
        answer.num_bytes = self._size_of(cast("T", answer.task.result()))
        self._num_bytes += answer.num_bytes
        if answer.num_bytes:
            self._sized[key] = None
        while self._num_bytes > self._most_bytes and len(self._sized) > 1:
            self._drop(next(iter(self._sized)))

    def _drop(self, key: str) -> None:
        answer = self._answers.pop(key, None)
        self._sized.pop(key, None)
        self._num_bytes -= answer.num_bytes if answer else 0

    def _ttl_of(self, task: asyncio.Task[T | FetchError]) -> float:
        return _FAILURE_TTL_S if task.done() and _is_error(task) else self._ttl_s


def _is_error(task: asyncio.Task[Any]) -> bool:
    """Whether a task that has ended brought no result."""
    return task.cancelled() or task.exception() is not None or isinstance(task.result(), FetchError)


class Resolver(aiohttp.abc.AbstractResolver):
    """Resolves names in threads of its own, remembers them, and leaves out addresses that are not allowed.

    The system's resolver cannot be interrupted: a slow name keeps a thread, not a row and not the end of the process.

    Args:
        rules: Which addresses are allowed.
        trusted: Names whose addresses are all allowed.
        num_connections: So many names, or ``_LOOKUPS_AT_ONCE`` if they are more, are looked up at once: what waits for
            slow ones does so inside of its deadline.
    """

    def __init__(self, rules: AddressRules, trusted: set[str], num_connections: int = 0) -> None:
        self._rules = rules
        self._trusted = trusted
        self._slots = asyncio.Semaphore(max(_LOOKUPS_AT_ONCE, num_connections))
        self._names = HostCache(self._look_up, _NAME_TTL_S)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        """The allowed addresses of a name.

        Raises:
            FetchError: If it has none.
        """
        del family
        addresses = await self._names.get(host)
        allowed = [one for one in addresses if host in self._trusted or self._rules.allows(one)]
        if not allowed:
            raise refused_address(addresses[0])
        return [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in allowed
        ]

    async def require_allowed(self, host: str) -> None:
        """Refuse a name of which any address is not allowed: another machine, which resolves it again, may take that.

        Raises:
            FetchError: If it has such an address, or none.
        """
        for address in await self._names.get(host):
            if not self._rules.allows(address):
                raise refused_address(address)

    async def close(self) -> None:
        """Forget every name; threads that still wait end by themselves."""
        self._names.close()

    async def _look_up(self, host: str) -> list[str] | FetchError:
        loop = asyncio.get_running_loop()
        async with self._slots:
            result: asyncio.Future[list[str] | FetchError] = loop.create_future()

            def finish(addresses: list[str] | FetchError) -> None:
                if not result.done():
                    result.set_result(addresses)

            def work() -> None:
                addresses = _addresses(host)
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(finish, addresses)

            threading.Thread(target=work, daemon=True, name=f"resolve {host}").start()
            return await result


def _addresses(host: str) -> list[str] | FetchError:
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return FetchError("dns", getattr(error, "strerror", None) or "no valid name")
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))

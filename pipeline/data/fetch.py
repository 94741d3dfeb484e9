"""An asynchronous fetcher of pictures: one client, whose connections and resolved names are used again.

A file of a store, in a folder that the recipe names, is read with the store's own credentials, and needs no opt-outs.

Every URL has one deadline over everything: name, connection, TLS, redirects, body and further tries. The time in which
it, or the robots.txt that it needs, waits for the host's turn (``Limits``) or for one of the ``Connections`` is not
counted. What goes wrong is a ``FetchError`` of one class; temporary faults are tried again after a growing pause, or
after the time that the host asks for. Each hop of a redirect is checked against the address rules and the host's
opt-outs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import stat
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import aiohttp
from yarl import URL

from pipeline.data import opt_outs
from pipeline.data.answers import asked_wait_s, target_of, translate
from pipeline.data.bodies import DISK_ERRORS, Body, read_body
from pipeline.data.causes import FetchError
from pipeline.data.clocks import Clock, SharedStops
from pipeline.data.connections import Connections
from pipeline.data.hosts import NO_LEASE, HostLimits, Limits
from pipeline.data.opt_outs import PathRules
from pipeline.data.resolver import HostCache, Resolver
from pipeline.data.stores import StoreReader
from pipeline.data.urls import AddressRules, Url, file_path, is_address, parse_url, refused_address
from pipeline.recipe.sections import DownloadConfig

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 10
_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 8.0
_KEEP_ALIVE_S = 5.0
_POLICY_TTL_S = 86_400.0
_MOST_POLICY_BYTES = 64 << 20
"""Of what hosts allow, in one worker: a file of half a megabyte can hold 50,000 rules."""
_POLICY_BYTES, _RULE_BYTES = 1000, 200
"""Memory of a host's policy without rules, and of a rule without its pattern."""
_MAX_HEADER_BYTES = 16_384
_ANSWERED_OTHERWISE = frozenset({"redirects", "url", "scheme"})
"""A robots.txt that leads nowhere counts as none, like a status of 3xx or 4xx (RFC 9309, 2.3.1.2 and 2.3.1.3)."""
_HOST_IS_AWAY = frozenset({"dns", "connect", "tls", "timeout", "deadline", "lost", "address"})
_POLICY_FILES = 2
"""Files of a host that are asked for at once; so many for each connection come at once where none is given back."""
_STORED_AT_ONCE = 64
"""Files of stores that come at once: they share one way, and all that come together share its time."""


def user_agent(config: DownloadConfig) -> str:
    """The name under which hosts see the downloads; ``download.contact`` tells them whom to ask."""
    contact = f"; +{config.contact}" if config.contact else ""
    return f"Mozilla/5.0 (compatible; {config.user_agent_token or 'unclip'}/{version('unclip')}{contact})"


@dataclass(frozen=True)
class _Policy:
    """Paths that a host's two files allow."""

    robots: PathRules
    tdm: PathRules


class Fetcher:
    """Fetches URLs; use it inside ``async with``.

    Args:
        config: The recipe's section.
        rules: Addresses and files that URLs may name.
        limits: Limits of hosts that several workers share; default: those of this fetcher alone.
        connections: What each caller of ``fetch`` holds one of. If hosts have limits, others have it while a URL waits
            for its host's turn or policy, so that a crowded host holds up no other. None: nothing is held.
    """

    def __init__(
        self,
        config: DownloadConfig,
        rules: AddressRules,
        limits: Limits | None = None,
        connections: Connections | None = None,
    ) -> None:
        resources = config.resources
        self._config = config
        self._rules = rules
        self._limits = limits or HostLimits(resources.max_per_host, resources.max_rate_per_host)
        has_limits = bool(resources.max_per_host or resources.max_rate_per_host)
        self._connections = connections if has_limits else None
        self._policy_connections = Connections(_POLICY_FILES * resources.num_connections)
        self._token = config.user_agent_token.strip().lower()
        self._directives = {directive.strip().lower() for directive in config.disallowed_header_directives}
        self._policies = HostCache(self._policy, _POLICY_TTL_S, size_of=_size_of, most_bytes=_MOST_POLICY_BYTES)
        self._policy_stops = SharedStops()
        self._proxies = urllib.request.getproxies()
        self._stores: dict[str, StoreReader] = {}
        self._stored_turn = asyncio.Semaphore(_STORED_AT_ONCE)
        self.num_waiting = 0
        """Requests that wait for their host's turn."""
        self.stopped_s = 0.0
        """Seconds that the clocks of all fetched URLs stood still."""

    async def __aenter__(self) -> Fetcher:
        proxies = {URL(proxy).raw_host or "" for proxy in self._proxies.values()}
        self._proxy_hosts = proxies
        self._resolver = Resolver(self._rules, proxies, self._config.resources.num_connections)
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=self._resolver,
            use_dns_cache=False,  # the resolver has its own
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        timeout_s = self._config.timeout_s
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a bomb would be undone before its size is known
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
            headers={
                "User-Agent": user_agent(self._config),
                "Accept": "image/*,*/*;q=0.8",
                "Accept-Encoding": "identity",
            },
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._policies.close()
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, text: str) -> Body:
        """Fetch the picture of a row.

        Args:
            text: URL of the list.

        Returns:
            Its bytes as an open file, at the start; the caller closes it.

        Raises:
            FetchError: If it did not come; its class says why.
            ConfigError: If a store cannot be reached with any file; says what to set.
        """
        stored = self._rules.stored(text)
        if stored is not None:
            return await self._fetch_stored(*stored)
        path = file_path(text)
        if path is None:
            url = parse_url(text)
            return await self._in_time(lambda clock: self._retry(lambda: self._follow(url, clock), clock))
        self._rules.require_file(path)
        return await self._in_time(lambda _: asyncio.to_thread(_read_file, path, self._config.max_body_bytes))

    async def _in_time(self, work: Callable[[Clock], Awaitable[Body]], *, is_policy: bool = False) -> Body:
        try:
            async with asyncio.timeout(self._config.deadline_s) as deadline:
                clock = Clock(deadline)
                try:
                    return await work(clock)
                finally:
                    self.stopped_s += 0.0 if is_policy else clock.stopped_s
        except TimeoutError:
            raise FetchError("deadline") from None

    async def _fetch_stored(self, folder: str, name: str) -> Body:
        if folder not in self._stores:
            self._stores[folder] = StoreReader(folder, _STORED_AT_ONCE, self._config.timeout_s)
        read, limit = self._stores[folder].read, self._config.max_body_bytes
        async with self._stored_turn:  # outside of the deadline, as the wait for a host's turn
            return await self._in_time(lambda clock: self._retry(lambda: read(name, limit), clock))

    async def _retry(self, ask: Callable[[], Awaitable[Body]], clock: Clock) -> Body:
        attempt = 0
        while True:
            try:
                return await ask()
            except FetchError as error:
                if attempt >= self._config.retries or not error.is_temporary:
                    raise
                backoff_s = min(_BACKOFF_S * 2**attempt, _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.5)
                pause_s = max(backoff_s, error.retry_after_s or 0.0)
                if pause_s >= clock.left_s:
                    raise
                await asyncio.sleep(pause_s)
                attempt += 1

    async def _follow(self, url: Url, clock: Clock, *, policy_of: str = "") -> Body:
        """Fetch a URL and the targets of its redirects; ``policy_of`` is the origin of which it is a policy, if any."""
        for _ in range(_MAX_REDIRECTS + 1):
            self._rules.require_url(url)
            if url.host in self._proxy_hosts:
                raise refused_address(url.host)
            await self._require_resolved(url)
            if not policy_of:
                await self._require_allowed(url, clock)
            answer = await self._get(url, clock, policy_of)
            if not isinstance(answer, Url):
                return answer
            if answer.origin == url.origin and not answer.login:
                answer = replace(answer, login=url.login)
            url = answer
        raise FetchError("redirects", f"more than {_MAX_REDIRECTS}")

    async def _get(self, url: Url, clock: Clock, policy_of: str) -> Body | Url:
        """One request: the body, or the target of a redirect."""
        # As browsers send it: aiohttp refuses a user name with a colon.
        headers = {"Authorization": f"Basic {base64.b64encode(url.login).decode()}"} if url.login else {}
        async with self._slot(url.host, clock, policy_of):
            try:
                async with self._session.get(
                    URL(url.text, encoded=True), allow_redirects=False, headers=headers, proxy=self._proxy_of(url)
                ) as response:
                    if response.status in _REDIRECTS:
                        return target_of(response, url)
                    if not 200 <= response.status < 300:
                        raise await self._refusal(url, response)
                    if policy_of:
                        return await read_body(response, opt_outs.MAX_BYTES, is_cut=True)
                    self._require_headers(response)
                    return await read_body(response, self._config.max_body_bytes)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise
                raise translate(error) from error

    @contextlib.asynccontextmanager
    async def _slot(self, host: str, clock: Clock, policy_of: str) -> AsyncGenerator[None]:
        self.num_waiting += 1
        try:
            with clock.stopped(), self._policy_stops.stopped(policy_of):
                lease = await self._turn(host, clock, policy_of)
        finally:
            self.num_waiting -= 1
        try:
            yield
        finally:
            await self._limits.release(host, lease)

    async def _turn(self, host: str, clock: Clock, policy_of: str) -> int:
        """Wait for the host's turn, without a connection, and then for a connection; returns the lease."""
        connections = self._policy_connections if policy_of else self._connections
        reservation = NO_LEASE
        try:
            while not (lease := await self._limits.start(host, reservation)):
                async with _lent(connections, clock, has_turn=True):
                    reservation = await self._reserve(host)
        except BaseException:  # also a cancellation
            if reservation != NO_LEASE:
                await self._limits.release(host, reservation)
            raise
        return lease

    async def _reserve(self, host: str) -> int:
        reservation = await self._limits.reserve(host, self._config.deadline_s)
        if reservation == NO_LEASE:
            raise _Final("http-429", "the host asks to wait for longer than download.deadline_s")
        return reservation

    async def _refusal(self, url: Url, response: aiohttp.ClientResponse) -> FetchError:
        retry_after_s = None
        if response.status in {429, 503}:
            retry_after_s = asked_wait_s(response.headers)
            if retry_after_s:
                await self._limits.pause(url.host, retry_after_s)
        reason = "".join(filter(str.isprintable, response.reason or ""))[:80]
        return FetchError(f"http-{response.status}", reason, retry_after_s=retry_after_s)

    def _proxy_of(self, url: Url) -> str | None:
        """The proxy of the environment; addresses that only this machine or its network reaches need none."""
        proxy = self._proxies.get(url.scheme) or self._proxies.get("all")
        if not proxy:
            return None
        name = url.host.rstrip(".")
        is_loopback = name == "localhost" or name.endswith(".localhost")
        is_near = is_loopback or (is_address(url.host) and not AddressRules().allows(url.host))
        if is_near or urllib.request.proxy_bypass(url.host):
            return None
        return proxy

    async def _require_resolved(self, url: Url) -> None:
        """Refuse a name whose addresses are not allowed where a proxy would resolve it; others are checked when used.

        Raises:
            FetchError: If it has such an address, or none that this machine knows.
        """
        if self._config.resources.trust_proxy or is_address(url.host) or self._proxy_of(url) is None:
            return
        try:
            await self._resolver.require_allowed(url.host)
        except FetchError as error:
            if error.cause != "dns":
                raise
            raise FetchError("dns", f"{error.detail}; see download.resources.trust_proxy") from None

    async def _require_allowed(self, url: Url, clock: Clock) -> None:
        """Refuse a path that the host's robots.txt or tdmrep.json opts out.

        Raises:
            FetchError: If it does, or if the host did not answer when it was asked for robots.txt.
        """
        if not self._config.robots_txt and not self._config.tdm_reservation:
            return
        connections = None if self._policies.knows(url.origin) else self._connections
        async with _lent(connections, clock):
            with self._policy_stops.joined(url.origin, clock):
                policy = await self._policies.get(url.origin)
        if not policy.robots.allows(url.target):
            raise FetchError("robots-txt")
        if not policy.tdm.allows(url.target):
            raise FetchError("tdm", opt_outs.TDM_PATH)

    async def _policy(self, origin: str) -> _Policy | FetchError:
        """What a host's two files allow; an error if its robots.txt cannot be read, which then allows nothing."""
        robots, tdm = await asyncio.gather(
            self._policy_file(origin, opt_outs.ROBOTS_PATH, is_used=self._config.robots_txt),
            self._policy_file(origin, opt_outs.TDM_PATH, is_used=self._config.tdm_reservation),
        )
        if isinstance(robots, FetchError):
            if robots.cause in _HOST_IS_AWAY:
                return _Final(robots.cause, f"{robots.detail} (robots.txt)".strip())
            is_none = robots.cause in _ANSWERED_OTHERWISE or robots.cause.startswith(("http-3", "http-4"))
            if not is_none or robots.cause == "http-429":  # RFC 9309, 2.3.1.4: a server that fails allows nothing
                return FetchError("robots-txt", f"it cannot be read: {robots.cause}")
            robots = b""
        rules = opt_outs.parse_robots(robots, self._token)
        return _Policy(rules, opt_outs.parse_tdm(b"" if isinstance(tdm, FetchError) else tdm))

    async def _policy_file(self, origin: str, path: str, *, is_used: bool) -> bytes | FetchError:
        if not is_used:
            return b""
        url = parse_url(origin + path)
        async with contextlib.AsyncExitStack() as stack:
            with self._policy_stops.stopped(origin):
                await stack.enter_async_context(self._policy_connections)
            try:
                with await self._in_time(
                    lambda clock: self._retry(lambda: self._follow(url, clock, policy_of=origin), clock), is_policy=True
                ) as body:
                    return body.read()
            except FetchError as error:
                return error

    def _require_headers(self, response: aiohttp.ClientResponse) -> None:
        values = response.headers.getall("X-Robots-Tag", [])
        directive = opt_outs.opting_directive(values, self._token, self._directives)
        if directive:
            raise FetchError("x-robots-tag", directive)
        if self._config.tdm_reservation and opt_outs.reserves_rights(response.headers):
            raise FetchError("tdm", "header")


def _size_of(policy: _Policy) -> int:
    """Memory of a policy, in bytes."""
    rules = (*policy.robots.rules, *policy.tdm.rules)
    return _POLICY_BYTES + sum(_RULE_BYTES + rule.length for rule in rules)


def _lent(
    connections: Connections | None, clock: Clock, *, has_turn: bool = False
) -> contextlib.AbstractAsyncContextManager[None]:
    """See ``Connections.lent``; nothing where none is held."""
    return connections.lent(clock, has_turn=has_turn) if connections else contextlib.nullcontext()


class _Final(FetchError):
    """An error that a whole host shares, and that another try now would not change."""

    @property
    def is_temporary(self) -> bool:
        return False


def _read_file(path: Path, max_bytes: int) -> Body:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a device has no end, and a pipe waits for ever
            raise FetchError("file", "it is no regular file")
        if info.st_size > max_bytes:
            raise FetchError("body-size")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise FetchError("file", getattr(error, "strerror", None) or str(error)) from None

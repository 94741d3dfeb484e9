"""``unclip serve`` with ``serve.mode = "process"``: the networks in the process that speaks HTTP, without Ray.

The engine samples in a thread of its own. A swap loads a second engine beside the first, which is closed when its last
request has its answer.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from pipeline.errors import StepError, UnclipError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.draining import Announce, finishing, named, write_line
from pipeline.runtime.front import Front
from pipeline.runtime.loading import load_engine
from pipeline.runtime.parts import NETWORKS
from pipeline.runtime.served import Served, served_anew, served_by, served_last, server_name
from pipeline.serve.guards import require_keys
from pipeline.serve.http_server import HttpServer, listen, url_of
from pipeline.serve.keeper import Kept, SwapRequests
from pipeline.serve.metrics import EngineMetrics

if TYPE_CHECKING:
    from pipeline.serve.engine import Engine

_WATCH_EVERY_S = 1.0
_IDLE_POLL_S = 0.2


def serve_here(
    recipe: Recipe,
    *,
    reload: Callable[[], Recipe] | None = None,
    on_ready: Callable[[], None] | None = None,
    announce: Announce = write_line,
    kept: Kept | None = None,
) -> None:
    """Serve the trained cascade of a recipe until Ctrl-C (or SIGTERM); requests under way are finished first.

    Args:
        recipe: A checked recipe whose networks are finished.
        reload: Reads the recipe again; SIGHUP then swaps to its networks of that time. None: SIGHUP is left alone.
        on_ready: Called once requests are answered; None: nobody waits for that.
        announce: Takes lines for people.
        kept: Of the process that starts this one again if it is killed; None: there is none.

    Raises:
        ConfigError: If a network is not finished (names the command that finishes it), the keys or the hook cannot be
            read, or the server would be open to other machines without keys.
        DataError: If a network is damaged.
        StepError: If the port is taken, the networks cannot be loaded, or the engine ends.
    """
    config = recipe.serve
    require_keys(config)
    swap_requests = kept.swap_requests if kept else SwapRequests()
    if reload is not None:
        swap_requests.listen()
    # Networks that are swapped in keep the name.
    recipe = dataclasses.replace(recipe, serve=dataclasses.replace(config, name=server_name(recipe)))
    front = Front(config)
    with ExitStack() as stack:
        stack.callback(front.close)
        stack.enter_context(HttpServer(front, kept.listener if kept else listen(config.host, config.port)))
        if kept:
            kept.note_listening()
        networks = stack.enter_context(_Networks(front, announce, kept))
        try:
            served = served_last(kept) or served_by(recipe)
            front.gate.close("the networks are loading")
            networks.load(served)
            announce(f"{server_name(recipe)} is served at {url_of(config.host, config.port)} - Ctrl-C ends it")
            for note in served.notes:
                announce(note)
            if on_ready is not None:
                on_ready()
            with finishing(front, config.drain_s, announce):
                networks.watch(reload, swap_requests)
        except KeyboardInterrupt:
            front.gate.close("the server has ended")


class _Networks:
    """What is served now, and what was served before and still has requests; a context manager.

    Args:
        front: The HTTP interface.
        announce: Takes lines for people.
        kept: Learns what is served, for the process that comes after this one; None: none does.
    """

    def __init__(self, front: Front, announce: Announce, kept: Kept | None) -> None:
        self._front = front
        self._announce = announce
        self._kept = kept
        self._metrics = EngineMetrics()
        self._now: _Loaded | None = None
        self._before: list[_Loaded] = []
        """What ends with its last request."""

    def __enter__(self) -> "_Networks":
        return self

    def __exit__(self, *_: object) -> None:
        for loaded in (*self._before, self._now):
            if loaded is not None:
                loaded.close()

    def load(self, served: Served) -> None:
        """Load networks, and let new requests go to them.

        Raises:
            UnclipError: If they cannot be loaded; then those of before go on.
        """
        loaded = _Loaded(served, self._front, self._metrics, self._announce)
        self._front.gate.open(loaded.app)
        served.remember(self._kept, self._announce)
        self._front.upkeep.note_running({NETWORKS: 1})
        before, self._now = self._now, loaded
        if before is not None:
            self._before.append(before)
            threading.Thread(target=self._end, args=(before,), name="unclip-ending", daemon=True).start()

    def _end(self, before: "_Loaded") -> None:
        """Let go of networks after their last request: nothing else has them then, and their memory is free."""
        before.close_when_idle()
        self._before.remove(before)

    def watch(self, reload: Callable[[], Recipe] | None, swap_requests: SwapRequests) -> None:
        """Serve until Ctrl-C, and swap to the networks of ``reload``'s recipe when that is requested.

        Raises:
            StepError: If the engine ends.
        """
        while self._now is not None and self._now.engine.alive:
            time.sleep(_WATCH_EVERY_S)
            if reload is not None and swap_requests.take():
                try:
                    self._swap(reload(), self._now)
                except Exception as error:  # noqa: BLE001  (whatever it is: the networks of before go on)
                    self._announce(f"not swapped, the networks of before go on: {named(error)}")
        raise StepError("serve: the engine has ended")

    def _swap(self, recipe: Recipe, now: "_Loaded") -> None:
        served = served_anew(recipe, now.served, self._announce)
        if served.tables == now.served.tables:
            self._announce("nothing to swap: these networks are served already")
            return
        self._announce("loading other networks")
        self.load(served)
        self._announce("other networks are served")
        for fact in served.facts:
            self._announce(fact)


class _Loaded:
    """Networks in an engine, and the API around them.

    Args:
        served: What is loaded; it is in use until ``close``.
        front: The HTTP interface.
        metrics: Of all engines.
        announce: Takes lines for people.

    Raises:
        UnclipError: If the networks cannot be loaded.
    """

    def __init__(self, served: Served, front: Front, metrics: EngineMetrics, announce: Announce) -> None:
        self.served = served
        self._uses = ExitStack()
        with ExitStack() as uses:
            uses.enter_context(served.in_use(announce))
            self.engine: Engine = _load(served, metrics)
            uses.callback(self.engine.close)
            self.app: ASGIApp = front.build(served.recipe, served.artifacts, self.engine)
            self._uses = uses.pop_all()
        self._num_requests = front.gate.requests_of(self.app)

    def close_when_idle(self) -> None:
        """Close the engine after the last request; new ones go elsewhere already."""
        time.sleep(_IDLE_POLL_S)  # one may be on its way here
        while self._num_requests() or not self.engine.idle:
            time.sleep(_IDLE_POLL_S)
        self.close()

    def close(self) -> None:
        """End the engine; its requests are answered with 503."""
        self._uses.close()


def _load(served: Served, metrics: EngineMetrics) -> "Engine":
    try:
        return load_engine(served.tables, metrics)
    except UnclipError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise StepError(f"serve: the networks cannot be loaded: {reason}") from error

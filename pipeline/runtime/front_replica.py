"""The HTTP interface as a deployment of Ray Serve, behind its own proxies: for `serve deploy` and KubeRay.

Ray Serve configures it at the same time as the networks, which take their time to load. So requests go to what was
served before, or are answered with 503 at the start, until all replicas have the new networks.
"""

import asyncio
import contextlib
import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import StepError
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.front import Front
from pipeline.runtime.keeping import keeping_what_is_served
from pipeline.runtime.ledger import Exchange
from pipeline.runtime.lookout import Lookout, application_state, num_replicas
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import Tables, digest_of, read_tables
from pipeline.runtime.remote_model import answers_of, are_served
from pipeline.runtime.served import Served, server_name
from pipeline.runtime.turns import Turns

_log = logging.getLogger(__name__)

_WATCH_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1
_FIRST_LOOK_S = 3.0
"""How long a process that starts looks for its networks before it answers, and between two looks at others like it."""


@dataclass(frozen=True)
class _Next:
    """What is configured, and waits for its networks."""

    front: Front
    app: ASGIApp
    served: str
    """Digest of the networks."""
    drain_s: float
    ending: ExitStack
    """Closes the front, and ends the use of what it serves."""


class FrontReplica:
    """A ``Front`` that Ray Serve places behind its own proxies, for `serve deploy`.

    Args:
        ledger: Of the deployment by which several of them share what keys have used; None: there is one.
        handles: Of the deployments of the parts.
    """

    def __init__(self, ledger: DeploymentHandle[Any] | None = None, **handles: DeploymentHandle[Any]) -> None:
        self._ledger = ledger
        self._handles = handles
        self._front = Front(ServeConfig())
        self._exchange: Exchange | None = None
        """One for all that is served: under another name, others would take its uses for new ones."""
        self._lock = threading.Lock()
        """Of what is served and what is waited for: Ray Serve configures while the watch looks."""
        self._turns = Turns(handles)
        self._next: _Next | None = None
        self._is_refused = False
        """Whether what is configured cannot be served here: other processes may turn to it all the same."""
        self._lookout: Lookout | None = None
        """None before anything is served."""
        self._watch: threading.Thread | None = None
        self._closed = threading.Event()
        self._endings = ExitStack()
        """Of all that is served, waited for, or still has requests."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which exists before the recipe is known."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_unnamed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    del MutableHeaders(scope=message)["X-Request-Id"]  # Ray Serve's proxy adds the same one
                await send(message)

            await self._front(scope, receive, send_unnamed)

        return answer

    async def reconfigure(self, tables: Tables) -> None:
        """Serve a recipe once its networks are loaded.

        Called by Ray Serve at the start, and when `serve deploy` brings another one. What cannot be served leaves what
        is served already.
        """
        self._is_refused = True
        await asyncio.to_thread(self._expect, None)
        with keeping_what_is_served(is_serving=self._lookout is not None):
            await asyncio.to_thread(lambda: self._expect(self._prepare(tables)))  # an index takes its time to be read
            self._is_refused = False
        if self._watch is None:
            await asyncio.to_thread(self._look_first)
            self._watch = threading.Thread(target=self._run, name="unclip-watch", daemon=True)
            self._watch.start()

    def _expect(self, coming: _Next | None) -> None:
        """Turn to this when its networks are there, and give up what else was waited for."""
        with self._lock:
            given_up, self._next = self._next, coming
            if coming is not None and self._lookout is None:
                self._front = coming.front
        if given_up is not None:
            given_up.ending.close()

    def _prepare(self, tables: Tables) -> _Next:
        recipe, artifacts = read_tables(tables)
        config = replace(recipe.serve, name=server_name(recipe))
        with ExitStack() as stack:
            stack.enter_context(Served(recipe, artifacts).in_use(_log.warning))
            front = Front(config, self._http_metrics if self._ledger is not None else None, before=self._front)
            stack.callback(front.close)
            app = front.build(recipe, artifacts, *remote_parts(tables, self._handles, front.upkeep))
            front.gate.close("the networks are loading")
            ending = stack.pop_all()
        self._endings.callback(ending.close)
        return _Next(front, app, digest_of(tables), recipe.serve.drain_s, ending)

    def _look_first(self) -> None:
        """Wait for the networks while other processes answer: beside them this one must not say 503."""
        is_beside_others = True
        while is_beside_others and not self._closed.is_set():
            deadline_s = time.monotonic() + _FIRST_LOOK_S
            while time.monotonic() < deadline_s:
                if self._turn_if_ready():
                    return
                time.sleep(_LOOK_EVERY_S)
            is_beside_others = self._others_answer()

    def _others_answer(self) -> bool:
        """Whether Ray Serve sends requests to another process of this deployment, as it does not yet to this one."""
        context = serve.get_replica_context()
        with contextlib.suppress(StepError, RayError, TimeoutError):
            deployment = application_state(context.app_name).deployments[context.deployment]
            return num_replicas(deployment, {"RUNNING"}) > 0
        return False

    def _run(self) -> None:
        is_failing = False
        while not self._closed.wait(_WATCH_EVERY_S):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001  (the next look may succeed; requests are answered meanwhile)
                if not is_failing:
                    _log.warning("the replicas cannot be looked after: %s", error)
                is_failing = True
            else:
                is_failing = False

    def close(self) -> None:
        """End the watch, and the use of what is served."""
        self._closed.set()
        if self._watch is not None:
            self._watch.join()
        self._endings.close()

    def look(self) -> None:
        """Turn to what is configured if all replicas have its networks, and see how the replicas are."""
        self._turn_if_ready()
        self._turns.look(is_behind=self._is_refused)
        if self._lookout is not None:
            self._lookout.look()

    def _turn_if_ready(self) -> bool:
        coming = self._next
        return coming is not None and are_served(self._handles, coming.served) and self._turn_to(coming)

    def _turn_to(self, coming: _Next) -> bool:
        """Serve what is configured, unless something else has been configured meanwhile; whether it is served."""
        application = serve.get_replica_context().app_name
        with self._lock:
            if self._next is not coming:
                return False
            self._next = None
            self._front = coming.front
            coming.front.gate.open(coming.app)
            self._lookout = Lookout(application, self._handles, coming.front, _log.warning)

        def end() -> None:  # after a while: a request may be on its way from the guards to the gate
            closing = threading.Timer(coming.drain_s, coming.ending.close)
            closing.daemon = True
            closing.start()

        coming.front.upkeep.served = coming.served
        self._turns.turn_to(coming.served, lambda: coming.front.gate.num_requests, end)
        if self._ledger is not None and coming.front.keys is not None:
            if self._exchange is None:
                self._exchange = Exchange(self._ledger, coming.front.meter, coming.front.keys)
            self._exchange.keys = coming.front.keys
        return True

    async def own_metrics(self) -> dict[str, str]:
        """What this process measures, by its name."""
        return {serve.get_replica_context().replica_id.unique_id: self._front.metrics.own_text()}

    async def _http_metrics(self) -> dict[str, str]:
        """What all of them measure."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        return {name: text for texts in await answers_of(handle, "own_metrics") for name, text in texts.items()}

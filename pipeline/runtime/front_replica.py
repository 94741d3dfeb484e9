"""The HTTP interface as a deployment of Ray Serve, behind its own proxies: for `serve deploy` and KubeRay."""

import threading
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.front import Front
from pipeline.runtime.ledger import Exchange
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import Tables, read_tables
from pipeline.runtime.remote_model import answers_of
from pipeline.runtime.served import server_name


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

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which exists before the recipe is known."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_unnamed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    del MutableHeaders(scope=message)["X-Request-Id"]  # Ray Serve's proxy adds the same one
                await send(message)

            await self._front(scope, receive, send_unnamed)

        return answer

    def reconfigure(self, tables: Tables) -> None:
        """Serve a recipe; called by Ray Serve at the start, and when `serve deploy` brings another one."""
        recipe, artifacts = read_tables(tables)
        config = replace(recipe.serve, name=server_name(recipe))
        front = Front(config, self._http_metrics if self._ledger is not None else None)
        front.open(recipe, artifacts, *remote_parts(recipe, artifacts, self._handles, front.upkeep))
        closing = threading.Timer(recipe.serve.drain_s, self._front.close)  # its last requests are still under way
        closing.daemon = True
        closing.start()
        if self._exchange is not None:
            self._exchange.close()
        self._front = front
        if self._ledger is not None and front.keys is not None:
            self._exchange = Exchange(self._ledger, front.meter, front.keys)

    async def own_metrics(self) -> dict[str, str]:
        """What this process measures, by its name."""
        return {serve.get_replica_context().replica_id.unique_id: self._front.metrics.own_text()}

    async def _http_metrics(self) -> dict[str, str]:
        """What all of them measure."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        return {name: text for texts in await answers_of(handle, "own_metrics") for name, text in texts.items()}

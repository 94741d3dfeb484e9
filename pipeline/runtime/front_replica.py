"""The HTTP interface as a deployment of Ray Serve, behind its own proxies: for `serve deploy` and KubeRay."""

import threading
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.front import Front
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import Tables, read_tables
from pipeline.runtime.served import server_name


class FrontReplica:
    """A ``Front`` that Ray Serve places behind its own proxies, for `serve deploy`.

    Args:
        handles: Of the deployments of the networks.
    """

    def __init__(self, **handles: DeploymentHandle[Any]) -> None:
        self._handles = handles
        self._front = Front(ServeConfig())

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
        front = Front(replace(recipe.serve, name=server_name(recipe)))
        front.open(recipe, artifacts, *remote_parts(recipe, artifacts, self._handles, front.upkeep))
        closing = threading.Timer(recipe.serve.drain_s, self._front.close)  # its last requests are still under way
        closing.daemon = True
        closing.start()
        self._front = front

"""The HTTP interface of a recipe, assembled: the guards, the gate behind them, and the API that the gate opens.

It loads neither Ray nor torch: the networks are wherever its ``PictureModel`` finds them.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.recipe.picture_card import model_card
from pipeline.recipe.provenance import Signer
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.served import server_name
from pipeline.serve.gate import Gate
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards, GuardSettings
from pipeline.serve.keys import KeyRing, Meter
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.protocols import Neighbours, PictureModel
from pipeline.serve.safety import open_safety
from pipeline.serve.traces import open_traces
from pipeline.serve.upkeep import Upkeep
from pipeline.workspace.store import Artifact

_END_S = 5.0
"""Longest time until the last requests of a server that ends are answered."""


class Front:
    """An ASGI application that answers 503 until it is opened with a recipe.

    Args:
        config: How it is guarded.
        http_metrics: What all HTTP processes measure, if there are several.
        before: What this process has served until now: its counts go on, also those of what keys have used,
            and so do calls of the same safety hook.

    Raises:
        ConfigError: If the keys, the safety hook or the log cannot be used, or traces need a package that is missing.
    """

    def __init__(
        self,
        config: ServeConfig,
        http_metrics: Callable[[], Awaitable[dict[str, str]]] | None = None,
        before: "Front | None" = None,
    ) -> None:
        self.meter = before.meter if before else Meter()
        self._http_metrics = http_metrics
        self.metrics = before.metrics if before else HttpMetrics()
        self.upkeep = before.upkeep if before else Upkeep(self.metrics.registry)
        self._safety = open_safety(config.safety_hook, before._safety if before else None)
        if config.provenance:
            Signer.read(Path(config.provenance))  # what cannot be read is said before anything starts
        self.keys = KeyRing(Path(config.keys), before.keys if before else None) if config.keys else None
        self.gate = Gate(self.keys, self._safety)
        settings = GuardSettings(config.hosts, config.access_log, config.log_prompts)
        spans = self.metrics.spans if config.traces else None
        self._traces = open_traces(config.traces, config.name, spans)
        self._guards = Guards(self.gate, settings, self.keys, self.meter, self.metrics, self._traces)

    def close(self) -> None:
        """Send the last spans."""
        if self._traces is not None:
            self._traces.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._guards(scope, receive, send)

    def end(self, reason: str) -> None:
        """Answer all requests with 503, also those under way, for which nobody works any more."""
        self.gate.close(reason)
        self.upkeep.has_ended = True
        self.gate.wait_until_idle(_END_S)

    def open(
        self,
        recipe: Recipe,
        artifacts: dict[str, Artifact],
        model: PictureModel,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Pass new requests to the API of a recipe; those under way stay with the one before.

        Args:
            recipe: The recipe.
            artifacts: Its finished steps, by name.
            model: Its networks.
            neighbours: Its index, if that is elsewhere; None: it is read here, if it is among the artifacts.
        """
        self.gate.open(self.build(recipe, artifacts, model, neighbours))

    def build(
        self,
        recipe: Recipe,
        artifacts: dict[str, Artifact],
        model: PictureModel,
        neighbours: Neighbours | None = None,
    ) -> ASGIApp:
        """The API of a recipe; arguments as ``open``."""
        from pipeline.retrieve.retriever import Retriever
        from pipeline.serve.api import ApiSettings, create_app
        from pipeline.serve.local_neighbours import LocalNeighbours

        signer = Signer.read(Path(recipe.serve.provenance)) if recipe.serve.provenance else None
        made_with = model_card(recipe, artifacts)
        card = replace(made_with, name=server_name(recipe), aliases=recipe.serve.aliases, signer=signer)
        guarded = GuardedModel(model, card.image_px, self.meter, self._safety)
        manifest = artifacts["decoder"].manifest()
        settings = ApiSettings(
            card,
            created=int(manifest.created) if manifest else 0,
            fetches_urls=recipe.serve.image_urls,
            safe_rows=recipe.serve.safe_rows,
            metrics=self.metrics,
            http_metrics=self._http_metrics,
            longest_s=recipe.serve.timeout_s,
        )
        if neighbours is None and "index" in artifacts:
            retriever = Retriever.open(artifacts["index"], is_verified=True)
            neighbours = LocalNeighbours(retriever, self.metrics.neighbours.time)
            neighbours.require_filter(recipe.serve.safe_rows)
        return create_app(cast("PictureModel", guarded), neighbours, settings)

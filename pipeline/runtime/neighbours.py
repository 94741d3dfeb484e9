"""The index of the pairs as a deployment of its own, and the calls that reach it.

A call names the index that it means, so that a request finds the one that belongs to its CLIP also while networks are
swapped.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from prometheus_client import CollectorRegistry, generate_latest
from ray import serve

from pipeline.retrieve.retriever import Retriever
from pipeline.runtime.keeping import keeping_what_is_served
from pipeline.runtime.parts import NEIGHBOURS, Tables, digest_of, most_requests, parts_of, read_tables
from pipeline.runtime.remote_model import Handles, RemoteModel
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.serve.metrics import search_times
from pipeline.serve.protocols import NeighbourRow, Vectors
from pipeline.serve.upkeep import Upkeep
from pipeline.workspace.store import Artifact

_MOST_INDEXES = 2
"""Of which one was served before a swap."""


def remote_parts(tables: Tables, handles: Handles, upkeep: Upkeep) -> tuple[RemoteModel, "RemoteNeighbours | None"]:
    """The networks of a recipe in their replicas, and its index, if it has a part of its own.

    Args:
        tables: See ``write_tables``.
        handles: Of the parts.
        upkeep: What is known of the replicas.
    """
    recipe, artifacts = read_tables(tables)
    model = RemoteModel(handles, digest_of(tables), most_requests(recipe.serve), upkeep)
    is_apart = NEIGHBOURS in parts_of(recipe) and "index" in artifacts
    return model, RemoteNeighbours(model, artifacts["index"].uri) if is_apart else None


class NeighboursReplica:
    """One copy of the index, which Ray Serve places."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._times = search_times(self._registry)
        self._indexes: dict[str, asyncio.Task[LocalNeighbours]] = {}
        """What opens each index, or has opened it, by address; the last used one at the end."""
        self._newest = ""
        """Digest of what was configured last."""

    async def reconfigure(self, tables: Tables) -> None:
        """As ``prepare``; an index that cannot be opened leaves those that are open.

        Called by Ray Serve at the start, and when the recipe that is served changes.
        """
        with keeping_what_is_served(is_serving=bool(self._newest)):
            await self.prepare(tables)

    async def prepare(self, tables: Tables) -> None:
        """Open the index of a recipe.

        Args:
            tables: See ``part_tables``.

        Raises:
            DataError: If it is damaged.
        """
        recipe, artifacts = read_tables(tables)
        if "index" in artifacts:
            index = await self._index(artifacts["index"].uri)
            await asyncio.to_thread(index.require_filter, recipe.serve.safe_rows)
        self._newest = digest_of(tables)

    async def serves(self, served: str) -> bool:
        """Whether it has read the index of what a digest names."""
        return served == self._newest

    async def turn_to(self, _served: str) -> None:
        """Nothing: a call names its index, and the last two stay."""

    async def keep(self, _served: str) -> None:
        """Nothing, as ``turn_to``."""

    async def _index(self, uri: str) -> LocalNeighbours:
        """An index; of several calls that need it first, one opens it and the others wait for that."""
        opening = self._indexes.pop(uri, None) or asyncio.create_task(asyncio.to_thread(self._open, uri))
        self._indexes[uri] = opening
        while len(self._indexes) > _MOST_INDEXES:
            del self._indexes[next(iter(self._indexes))]
        try:
            return await asyncio.shield(opening)  # a call that is given up does not end it for the others
        except Exception:
            if self._indexes.get(uri) is opening:  # the next call tries again
                del self._indexes[uri]
            raise

    def _open(self, uri: str) -> LocalNeighbours:
        return LocalNeighbours(Retriever.open(Artifact(uri), is_verified=True), self._times.time)

    async def ask(self, uri: str, method: str, *arguments: Any, **settings: Any) -> Any:
        """Call a method of ``protocols.Neighbours`` on an index."""
        return await getattr(await self._index(uri), method)(*arguments, **settings)

    async def stats(self) -> dict[str, int]:
        """Nothing: these are counts of engines."""
        return {}

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``."""
        name = serve.get_replica_context().replica_id.unique_id
        return {name: generate_latest(self._registry).decode()}

    async def end_requests(self) -> None:
        """A search is short."""


class RemoteNeighbours:
    """A ``protocols.Neighbours`` that calls the replicas of the index.

    Args:
        model: Reaches all parts.
        uri: Of the index.
    """

    def __init__(self, model: RemoteModel, uri: str) -> None:
        self._model = model
        self._uri = uri
        self._facts: dict[str, Any] = {}
        """What an index says once: a call costs as much as a search."""

    async def embed_dim(self) -> int:
        """See ``Neighbours``."""
        return await self._ask_once("embed_dim")

    async def near_copy(self) -> float | None:
        """See ``Neighbours``."""
        return await self._ask_once("near_copy")

    async def search(
        self,
        vectors: Vectors,
        k: int,
        modality: Literal["image", "text"],
        *,
        distinct: bool = False,
        where: str = "",
        num_pictures: int = 0,
    ) -> list[list[NeighbourRow]]:
        """See ``Neighbours``."""
        settings: dict[str, Any] = {"distinct": distinct, "where": where, "num_pictures": num_pictures}
        return await self._ask("search", vectors, k, modality, **settings)

    async def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """See ``Neighbours``."""
        return await self._ask("rows", ids)

    async def _ask_once(self, fact: str) -> Any:
        if fact not in self._facts:
            self._facts[fact] = await self._ask(fact)
        return self._facts[fact]

    async def _ask(self, method: str, *arguments: Any, **settings: Any) -> Any:
        return await self._model.ask(NEIGHBOURS, "ask", self._uri, method, *arguments, **settings)

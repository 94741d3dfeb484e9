"""The networks in replicas that Ray Serve places on machines, and the calls that reach them."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from models.request import SampleRequest
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.recipe import Recipe, parse_recipe, to_dict
from pipeline.recipe.sections import ServeConfig
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.serve.protocols import Event, Images, NotServing, Overloaded, SampledPictures, Vectors
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.serve.engine import Engine

Tables = dict[str, Any]

NETWORKS = "networks"
"""Name of the deployment."""
_SPARE_REQUESTS = 64
_UPSCALE_DELAY_S = 10.0
_IDLE_POLL_S = 0.2
_STATS_TIMEOUT_S = 2.0
_UNAVAILABLE = (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    ray.exceptions.RayActorError,
)


def write_tables(recipe: Recipe, artifacts: dict[str, Artifact]) -> Tables:
    """A recipe and its finished steps as plain tables, which Ray Serve passes to the replicas.

    Local paths become absolute: the replicas run in other folders.
    """
    places = {name: artifact.uri for name, artifact in artifacts.items()}
    return {"recipe": to_dict(with_absolute_paths(recipe)), "artifacts": places}


def read_tables(tables: Tables) -> tuple[Recipe, dict[str, Artifact]]:
    """What ``write_tables`` wrote."""
    return parse_recipe(tables["recipe"]), {name: Artifact(uri) for name, uri in tables["artifacts"].items()}


class ModelReplica:
    """One copy of the cascade; a ``protocols.PictureModel`` that Ray Serve places."""

    def __init__(self) -> None:
        self._tables: Tables = {}
        self._current: Engine | None = None
        self._loading = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def reconfigure(self, tables: Tables) -> None:
        """Load the networks of a recipe; requests under way end with those that they began with.

        Called by Ray Serve at the start, and when the recipe that is served changes.

        Args:
            tables: See ``write_tables``.
        """
        async with self._loading:
            if tables == self._tables:
                return
            engine = await asyncio.to_thread(_load_engine, tables)
            previous, self._current, self._tables = self._current, engine, tables
            if previous is not None:
                task = asyncio.create_task(_end_when_idle(previous))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    @property
    def _engine(self) -> "Engine":
        if self._current is None:
            raise NotServing("the networks are loading")
        return self._current

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        return await self._engine.sample(request, client)

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``."""
        async with aclosing(self._engine.stream(request, client, num_previews)) as events:
            async for event in events:
                yield event

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await self._engine.embed_texts(texts)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._engine.embed_image(image)

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``."""
        return await self._engine.stats()

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``."""
        name = serve.get_replica_context().replica_id.unique_id
        [text] = (await self._engine.metrics()).values()
        return {name: text}

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        if getattr(self, "_current", None) is not None:
            self._engine.close()


def _load_engine(tables: Tables) -> "Engine":
    import torch

    from pipeline.networks.cascade import load_cascade, network_configs
    from pipeline.serve.engine import Engine

    recipe, artifacts = read_tables(tables)
    config = recipe.serve
    torch.set_num_threads(max(1, int(config.cpus_per_replica)))
    networks = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
    return Engine(
        load_cascade(networks, config.accelerator, network_configs(recipe)),
        max_batch_size=config.max_batch_size,
        max_waiting=config.max_queued_requests,
    )


async def _end_when_idle(engine: "Engine") -> None:
    while not engine.idle:
        await asyncio.sleep(_IDLE_POLL_S)
    await asyncio.to_thread(engine.close)


class RemoteModel:
    """A ``protocols.PictureModel`` that calls the replicas.

    Args:
        handle: Of the deployment of ``ModelReplica``.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        return await self._call("sample", request, client)

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``."""
        events: Any = self._handle.options(stream=True).stream.remote(request, client, num_previews)
        try:
            with _plain_errors():
                async for event in events:
                    yield event
        finally:
            events.cancel()

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await self._call("embed_texts", texts)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._call("embed_image", image)

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``; the sums over all replicas."""
        sums = Counter[str]()
        for counts in await self._of_all("stats"):
            sums.update(counts)
        return dict(sums)

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``."""
        return {name: text for texts in await self._of_all("metrics") for name, text in texts.items()}

    async def _of_all(self, method: str) -> list[dict[str, Any]]:
        """The answers of all replicas that answer soon."""
        call = self._handle.broadcast(method)
        try:
            # results_async would give up all answers for one that does not come.
            answers = await asyncio.to_thread(call.results, timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, *_UNAVAILABLE):
            return []
        return [cast("dict[str, Any]", answer) for answer in answers if isinstance(answer, dict)]

    async def _call(self, method: str, *arguments: Any) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            with _plain_errors():
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


@contextmanager
def _plain_errors() -> Generator[None]:
    """Raise the errors of a replica as the engine raised them."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Overloaded | NotServing | ValueError):
            raise error.cause from None
        raise
    except _UNAVAILABLE as error:
        raise NotServing(f"no replica is ready ({type(error).__name__})") from None


def networks_options(config: ServeConfig) -> dict[str, Any]:
    """How Ray Serve places the networks, in the words of its configuration files."""
    fewest, most = config.replicas
    scaling = {
        "min_replicas": fewest,
        "max_replicas": most,
        "target_ongoing_requests": config.target_requests,
        "upscale_delay_s": _UPSCALE_DELAY_S,
    }
    return {
        **({"num_replicas": fewest} if fewest == most else {"autoscaling_config": scaling}),
        "ray_actor_options": {
            **{f"num_{kind.lower()}s": number for kind, number in needs_of_replica(config).items()},
            "label_selector": config.label_selector,
        },
        # The engine decides how many may wait; Ray must not stop them before.
        "max_ongoing_requests": config.max_batch_size + config.max_queued_requests + _SPARE_REQUESTS,
        "graceful_shutdown_timeout_s": config.drain_s,
    }


def networks_application(recipe: Recipe, artifacts: dict[str, Artifact]) -> serve.Application:
    """The networks of a recipe as an application of Ray Serve.

    Args:
        recipe: The recipe.
        artifacts: Its finished steps, by name.
    """
    deployment: Any = serve.deployment(
        ModelReplica, name=NETWORKS, user_config=write_tables(recipe, artifacts), **networks_options(recipe.serve)
    )
    # With a version of our own, Ray Serve sees when only the networks changed, and keeps the replicas.
    return deployment.options(version=version("unclip"), _internal=True).bind()


def needs_of_replica(config: ServeConfig) -> dict[str, float]:
    """Ray's resources that one replica takes."""
    return {"CPU": config.cpus_per_replica} | ({"GPU": 1.0} if config.accelerator == "cuda" else {})

"""Ray Serve: the API in one process, the networks in replicas, both with the plain classes of pipeline.serve.

The API's process loads no torch. One replica holds one cascade with its engine; requests reach it through Ray, and
the request of a client that leaves is cancelled there too.
"""

import asyncio
import logging
import os
import re
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import ray
import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from models.request import SampleRequest
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import ServeConfig
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.run import connect
from pipeline.serve.picture_files import ModelCard
from pipeline.serve.protocols import Event, Images, NotServing, Overloaded, SampledPictures, Vectors
from pipeline.workspace.store import Artifact

APPLICATION = "unclip"
_NEIGHBOURS = ("download", "embed", "index")
_WATCH_EVERY_S = 1.0
_SPARE_REQUESTS = 64
_UNAVAILABLE = (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    ray.exceptions.RayActorError,
)


class ModelReplica:
    """One copy of the cascade; a ``protocols.PictureModel`` that Ray Serve places."""

    def __init__(self, artifacts: dict[str, Artifact], recipe: Recipe) -> None:
        import torch

        from pipeline.networks.cascade import load_cascade, network_configs
        from pipeline.serve.engine import Engine

        config = recipe.serve
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
        self._engine = Engine(
            load_cascade(artifacts, config.accelerator, network_configs(recipe)),
            max_batch_size=config.max_batch_size,
            max_waiting=config.max_queued_requests,
        )

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        return await self._engine.sample(request, client)

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``."""
        async with aclosing(self._engine.stream(request, client, num_previews)) as events:
            async for event in events:
                yield event

    async def embed_text(self, text: str) -> Vectors:
        """See ``PictureModel``."""
        return await self._engine.embed_text(text)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._engine.embed_image(image)

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``."""
        return await self._engine.stats()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


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

    async def embed_text(self, text: str) -> Vectors:
        """See ``PictureModel``."""
        return await self._call("embed_text", text)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._call("embed_image", image)

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``; of one replica if there are several."""
        try:
            return await self._call("stats")
        except NotServing:
            return {}

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


class Front:
    """The HTTP interface; Ray Serve takes the application that it builds.

    Args:
        model: Handle of the networks.
        artifacts: The finished steps, by name.
        recipe: The recipe that is served.
    """

    def __init__(self, model: DeploymentHandle[Any], artifacts: dict[str, Artifact], recipe: Recipe) -> None:
        self._model = model
        self._artifacts = artifacts
        self._recipe = recipe

    def __serve_build_asgi_app__(self) -> Any:
        """The FastAPI application, built where it runs."""
        from pipeline.retrieve.retriever import Retriever
        from pipeline.serve.api import ApiSettings, create_app
        from pipeline.serve.knn import LocalNeighbours

        manifest = self._artifacts["decoder"].manifest()
        settings = ApiSettings(
            card=model_card(self._recipe, self._artifacts),
            api_key=self._recipe.serve.api_key,
            created=int(manifest.created) if manifest else 0,
        )
        neighbours = None
        if "index" in self._artifacts:
            neighbours = LocalNeighbours(Retriever.open(self._artifacts["index"]))
        return create_app(RemoteModel(self._model), neighbours, settings)


def serve_recipe(recipe: Recipe, *, address: str = "", announce: Callable[[str], None] | None = None) -> None:
    """Serve the trained cascade of a recipe until Ctrl-C (or SIGTERM).

    Without a finished index, pictures are served without their neighbours, and a line says so.

    Args:
        recipe: A checked recipe whose networks are finished.
        address: Ray cluster; empty: one of our own on this machine, ended with the server.
        announce: Takes lines for people; None writes them to standard output.

    Raises:
        ConfigError: If a network is not finished; names the command that finishes it.
        StepError: If the port is taken, the cluster lacks CPUs or GPUs, a replica cannot start, or Ray goes away.
    """
    config = recipe.serve
    announce = announce or _write_line
    artifacts, no_neighbours = finished_artifacts(recipe, CASCADE_STEPS), ""
    try:
        artifacts |= finished_artifacts(recipe, _NEIGHBOURS)
    except ConfigError as error:
        no_neighbours = f"without neighbours: {error}"
    _quieten()
    # Ray Serve kills an HTTP proxy that is not up in 5 s: a busy machine needs longer.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    if not address:
        _require_free_port(config.host, config.port)
    with connect(address):
        _require_room(config)
        try:
            try:
                serve.start(
                    proxy_location="HeadOnly",
                    http_options={"host": config.host, "port": config.port},
                    logging_config={"log_level": "WARNING", "enable_access_log": False},
                )
                serve.run(build_application(recipe, artifacts), name=APPLICATION, route_prefix="/")
            except RuntimeError as error:
                raise StepError(f"serve: a replica could not start: {_reason(str(error))}") from None
            except ray.exceptions.RayError as error:
                raise StepError(
                    f"serve: Ray Serve could not start ({type(error).__name__}); if the machine was only too busy, the "
                    "same command works again"
                ) from None
            host = "127.0.0.1" if config.host in {"0.0.0.0", "::"} else config.host  # noqa: S104  (compared, not bound)
            announce(f"{recipe.name} is served at http://{host}:{config.port} - Ctrl-C ends it")
            if no_neighbours:
                announce(no_neighbours)
            _watch()
        except KeyboardInterrupt:
            announce("stopping")
        finally:
            if address:  # our own Ray ends with its processes
                with suppress(ray.exceptions.RayError):
                    _end_on_cluster()


def build_application(recipe: Recipe, artifacts: dict[str, Artifact]) -> serve.Application:
    """The two deployments of a recipe, connected."""
    config = recipe.serve
    num_gpus = 1 if config.accelerator == "cuda" else 0
    model: Any = serve.deployment(
        ModelReplica,
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": num_gpus},
        # The engine decides how many may wait; Ray must not stop them before.
        max_ongoing_requests=config.max_batch_size + config.max_queued_requests + _SPARE_REQUESTS,
        graceful_shutdown_timeout_s=5,
    )
    front: Any = serve.deployment(
        serve.ingress()(Front),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.num_replicas * (config.max_batch_size + config.max_queued_requests) * 4 + 256,
        graceful_shutdown_timeout_s=5,
    )
    networks = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
    return front.bind(model.bind(networks, recipe), artifacts, recipe)


def model_card(recipe: Recipe, artifacts: dict[str, Artifact]) -> ModelCard:
    """What the server's pictures are made with.

    Args:
        recipe: The recipe.
        artifacts: The finished steps, by name.
    """
    networks = {
        name: artifact.uri.rstrip("/").rpartition("/")[2]
        for name, artifact in artifacts.items()
        if name in CASCADE_STEPS
    }
    stages = {name: getattr(recipe, name).model for name in networks if name != "clip"}
    return ModelCard(
        recipe.name,
        [recipe.decoder.model, *recipe.upsamplers().values()][-1].image_px,
        networks=networks,
        sampling={name: asdict(model.sampler) for name, model in stages.items() if hasattr(model, "sampler")},
        aliases=recipe.serve.aliases,
        version=version("unclip"),
    )


def _require_free_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StepError(
                f"serve: {host}:{port} cannot be listened on ({error.strerror}); choose another: --set serve.port=8001"
            ) from None


def _require_room(config: ServeConfig) -> None:
    """Refuse a demand that Ray would wait for without end."""
    total = ray.cluster_resources()
    demand = {"CPU": config.num_replicas * config.cpus_per_replica}
    if config.accelerator == "cuda":
        demand["GPU"] = float(config.num_replicas)
    for name, number in demand.items():
        if total.get(name, 0.0) < number:
            raise StepError(
                f"serve: {config.num_replicas} replicas need {number:g} {name}, Ray has {total.get(name, 0.0):g}; "
                "see serve.num_replicas, serve.cpus_per_replica and serve.accelerator"
            )


def _end_on_cluster() -> None:
    """End our application, and Ray Serve with it unless others use it."""
    if set(serve.status().applications) - {APPLICATION}:
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def _watch() -> None:
    while True:
        time.sleep(_WATCH_EVERY_S)
        try:
            application = serve.status().applications.get(APPLICATION)
        except ray.exceptions.RayError as error:
            raise StepError(f"serve: Ray went away ({type(error).__name__})") from None
        if application is None:
            raise StepError("serve: the application was ended from elsewhere")


def _reason(text: str) -> str:
    """The last error that a replica's traceback names."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    return f"{errors[-1][0]}: {errors[-1][1]}" if errors else text.strip().splitlines()[-1]


def _quieten() -> None:
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

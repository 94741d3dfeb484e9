"""``unclip serve``: the process that speaks HTTP, with the networks in replicas of Ray Serve.

Ray Serve's own proxies are not used, because all recipes of a cluster would share their one port. Here every recipe has
its own, and answers in the API's form while the networks load, end or have died. This process loads no torch.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import ray
import ray.exceptions
from ray import serve
from ray.serve.api import RunTarget
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview
from starlette.types import ASGIApp

from pipeline.errors import ConfigError, StepError
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import ServeConfig
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.replicas import NETWORKS, RemoteModel, needs_of_replica, networks_application
from pipeline.runtime.run import connect, own_servers, require_alive
from pipeline.serve.gate import Gate
from pipeline.serve.guarded_model import GuardedModel, load_hook
from pipeline.serve.guards import Guards, GuardSettings
from pipeline.serve.http_server import HttpServer, is_loopback, url_of
from pipeline.serve.keys import KeyRing, Meter
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.picture_files import ModelCard
from pipeline.serve.protocols import PictureModel
from pipeline.workspace.store import Artifact

_NEIGHBOURS = ("download", "embed", "index")
_NAMESPACE = "unclip"
_WATCH_EVERY_S = 1.0
_LOOK_EVERY_S = 0.2

Announce = Callable[[str], None]


def serve_recipe(recipe: Recipe, *, address: str = "", announce: Announce | None = None) -> None:
    """Serve the trained cascade of a recipe until Ctrl-C (or SIGTERM); requests under way are finished first.

    Without a finished index, pictures are served without their neighbours, and a line says so.

    Args:
        recipe: A checked recipe whose networks are finished.
        address: Ray cluster; empty: one of our own on this machine, ended with the server.
        announce: Takes lines for people; None writes them to standard output.

    Raises:
        ConfigError: If a network is not finished (names the command that finishes it), the keys or the hook cannot be
            read, or the server would be open to other machines without keys.
        StepError: If the port or the name is taken, our own Ray lacks CPUs or GPUs, a replica cannot start, or Ray goes
            away.
    """
    config = recipe.serve
    announce = announce or _write_line
    if not is_loopback(config.host) and not config.keys:
        raise ConfigError(
            f"serve.host: {config.host} is open to other machines, and every one of them could use the server; make "
            "keys (unclip keys add FILE NAME), and name their file in serve.keys"
        )
    meter, metrics, gate = Meter(), HttpMetrics(), Gate()
    guards = Guards(
        gate,
        GuardSettings(config.hosts, config.access_log, config.log_prompts),
        KeyRing(Path(config.keys)) if config.keys else None,
        meter,
        metrics,
    )
    hook = load_hook(config.safety_hook) if config.safety_hook else None
    artifacts, no_neighbours = finished_artifacts(recipe, CASCADE_STEPS), ""
    try:
        artifacts |= finished_artifacts(recipe, _NEIGHBOURS)
    except ConfigError as error:
        no_neighbours = f"without neighbours: {error}"
    _quieten()
    with HttpServer(guards, config.host, config.port), connect(address):
        if not address:
            _require_room(config)
        try:
            with _deployed(recipe, artifacts, gate, announce, shared=bool(address)) as handle:
                model = GuardedModel(RemoteModel(handle), model_card(recipe, artifacts).image_px, meter, hook)
                app = build_app(recipe, artifacts, cast("PictureModel", model), metrics)
                gate.open(app)
                announce(f"{server_name(recipe)} is served at {url_of(config.host, config.port)} - Ctrl-C ends it")
                if no_neighbours:
                    announce(no_neighbours)
                try:
                    _watch(recipe, app, gate, announce)
                finally:
                    _drain(gate, config.drain_s, announce)
        except KeyboardInterrupt:
            gate.close("the server has ended")


def server_name(recipe: Recipe) -> str:
    """Name of the model, its index and its application."""
    return recipe.serve.name or recipe.name


def build_app(recipe: Recipe, artifacts: dict[str, Artifact], model: PictureModel, metrics: HttpMetrics) -> ASGIApp:
    """The HTTP interface of a recipe.

    Args:
        recipe: The recipe that is served.
        artifacts: Its finished steps, by name.
        model: Its networks.
        metrics: What the process measures.
    """
    from pipeline.retrieve.retriever import Retriever
    from pipeline.serve.api import ApiSettings, create_app
    from pipeline.serve.knn import LocalNeighbours

    manifest = artifacts["decoder"].manifest()
    created = int(manifest.created) if manifest else 0
    settings = ApiSettings(
        model_card(recipe, artifacts), created=created, fetches_urls=recipe.serve.image_urls, metrics=metrics
    )
    neighbours = None
    if "index" in artifacts:
        neighbours = LocalNeighbours(Retriever.open(artifacts["index"]), metrics.neighbours.time)
    return create_app(model, neighbours, settings)


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
        server_name(recipe),
        [recipe.decoder.model, *recipe.upsamplers().values()][-1].image_px,
        networks=networks,
        sampling={name: asdict(model.sampler) for name, model in stages.items() if hasattr(model, "sampler")},
        aliases=recipe.serve.aliases,
        version=version("unclip"),
    )


@contextmanager
def _deployed(
    recipe: Recipe, artifacts: dict[str, Artifact], gate: Gate, announce: Announce, *, shared: bool
) -> Generator[DeploymentHandle[Any]]:
    """The replicas of a recipe, ready; on a shared cluster they are removed at the end, and nothing else is."""
    application = application_name(recipe)
    owner = _claim(application) if shared else None
    try:
        with _errors_for_people():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
            target = RunTarget(networks_application(recipe, artifacts), name=application, route_prefix=None)
            [handle] = serve.run_many([target], wait_for_applications_running=False)
            _wait_until_ready(recipe, gate, announce)
        yield handle
    finally:
        if shared:  # our own Ray ends with its processes
            with suppress(ray.exceptions.RayError, TimeoutError):
                serve.delete(application)
        del owner


def application_name(recipe: Recipe) -> str:
    """Name of the recipe's application in Ray Serve."""
    return f"unclip-{server_name(recipe)}"


@ray.remote(num_cpus=0)
class _Owner:
    """Holds the name of an application while the process that serves it lives; Ray ends both together."""


def _claim(application: str) -> Any:
    """Reserve an application's name on the cluster.

    Raises:
        StepError: If another process serves under it.
    """
    try:
        return _Owner.options(name=application, namespace=_NAMESPACE).remote()
    except ValueError:
        name = application.removeprefix("unclip-")
        raise StepError(
            f"serve: {name!r} is served on this cluster already; give this server another name (--name) or end that one"
        ) from None


@contextmanager
def _errors_for_people() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StepError(f"serve: a replica could not start: {_reason(str(error))}") from None
    except ray.exceptions.RayError as error:
        raise StepError(
            f"serve: Ray Serve could not start ({type(error).__name__}); if the machine was only too busy, the same "
            "command works again"
        ) from None


def _wait_until_ready(recipe: Recipe, gate: Gate, announce: Announce) -> None:
    """Wait for the replicas, and say what is waited for.

    Raises:
        RuntimeError: If they cannot start.
    """
    servers = own_servers()
    while True:
        require_alive(servers)
        state = _application(recipe)
        if state.status == "RUNNING":
            return
        if state.status == "DEPLOY_FAILED":
            raise RuntimeError(state.message)
        reason = missing_machine(recipe.serve) or "the networks are loading"
        if reason != gate.reason:
            if reason != "the networks are loading":
                announce(f"waiting: {reason}")
            gate.close(reason)
        time.sleep(_LOOK_EVERY_S)


def missing_machine(config: ServeConfig) -> str:
    """What is waited for, if no machine of the cluster is large enough for a replica; empty if one is."""
    needs = needs_of_replica(config)
    for node in ray.nodes():
        is_large = all(node["Resources"].get(kind, 0.0) >= number for kind, number in needs.items())
        has_labels = config.label_selector.items() <= node["Labels"].items()
        if node["Alive"] and is_large and has_labels:
            return ""
    size = " and ".join(f"{number:g} {kind}" for kind, number in needs.items())
    labels = ", ".join(f"{name}={value}" for name, value in config.label_selector.items())
    return f"a replica needs a machine with {size}{' and ' + labels if labels else ''}; the cluster was asked for one"


def _require_room(config: ServeConfig) -> None:
    """Refuse a demand that our own Ray would wait for without end."""
    total = ray.cluster_resources()
    for name, number in needs_of_replica(config).items():
        demand = config.num_replicas * number
        if total.get(name, 0.0) < demand:
            raise StepError(
                f"serve: {config.num_replicas} replicas need {demand:g} {name}, this machine has "
                f"{total.get(name, 0.0):g}; see serve.num_replicas, serve.cpus_per_replica and serve.accelerator"
            )


def _watch(recipe: Recipe, app: ASGIApp, gate: Gate, announce: Announce) -> None:
    """Look after the replicas until Ctrl-C; while none runs, requests are answered with 503."""
    servers = own_servers()
    while True:
        time.sleep(_WATCH_EVERY_S)
        require_alive(servers)
        try:
            state = _application(recipe)
        except ray.exceptions.RayError as error:
            raise StepError(f"serve: Ray went away ({type(error).__name__})") from None
        replicas = state.deployments[NETWORKS].replica_states if NETWORKS in state.deployments else {}
        num_running = sum(number for state, number in replicas.items() if state == "RUNNING")
        if not num_running and not gate.reason:
            gate.close("no replica is running, others are started")
            announce("no replica is running; requests are answered with 503 until others have started")
        elif num_running and gate.reason:
            gate.open(app)
            announce("served again")


def _application(recipe: Recipe) -> ApplicationStatusOverview:
    state = serve.status().applications.get(application_name(recipe))
    if state is None:
        raise StepError("serve: the application was ended from elsewhere")
    return state


def _drain(gate: Gate, timeout_s: float, announce: Announce) -> None:
    """Finish what is under way, and refuse what is new; a second Ctrl-C ends it at once."""
    gate.close("the server is stopping")
    if not gate.num_requests:
        announce("stopping")
        return
    announce(f"stopping; requests under way: {gate.num_requests} - Ctrl-C again ends them at once")
    if not gate.wait_until_idle(timeout_s):
        announce(f"not finished within {timeout_s:g} s (serve.drain_s): {gate.num_requests}")


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

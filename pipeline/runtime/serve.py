"""``unclip serve``: the process that speaks HTTP, with the networks in replicas of Ray Serve.

Ray Serve's own proxies are not used, because all recipes of a cluster would share their one port. Here every recipe has
its own, and answers in the API's form while the networks load, end or have died. This process loads no torch.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import ray
import ray.exceptions
from ray import serve
from ray.serve.api import RunTarget

from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.connection import connect, own_servers, require_alive
from pipeline.runtime.deployments import networks_application
from pipeline.runtime.draining import Announce, finishing, write_line
from pipeline.runtime.front import Front
from pipeline.runtime.kept_ray import KeptRay
from pipeline.runtime.lookout import application_state
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import needs_of_replica, parts_of, place_of, write_tables
from pipeline.runtime.placement import machine_has
from pipeline.runtime.remote_model import Handles, end_requests
from pipeline.runtime.served import served_by, served_last, server_name
from pipeline.runtime.watch import Watch, application_name, errors_for_people
from pipeline.serve.gate import Gate
from pipeline.serve.guards import require_keys
from pipeline.serve.http_server import HttpServer, listen, url_of
from pipeline.serve.keeper import Kept, SwapRequests
from pipeline.workspace.store import Artifact

_NAMESPACE = "unclip"
_LOOK_EVERY_S = 0.2
_CLAIM_S = 5.0


def serve_recipe(
    recipe: Recipe,
    *,
    address: str = "",
    reload: Callable[[], Recipe] | None = None,
    announce: Announce | None = None,
    on_ready: Callable[[], None] | None = None,
    kept: Kept | None = None,
    own_ray: KeptRay | None = None,
) -> None:
    """Serve the trained cascade of a recipe until Ctrl-C (or SIGTERM); requests under way are finished first.

    Without a finished index, pictures are served without their neighbours, and a line says so.

    Args:
        recipe: A checked recipe whose networks are finished.
        address: Ray cluster; empty: one of our own on this machine, ended with the server.
        reload: Reads the recipe again; SIGHUP then swaps to its networks of that time. None: SIGHUP is left alone.
        announce: Takes lines for people; None writes them to standard output.
        on_ready: Called once requests are answered; None: nobody waits for that.
        kept: Of the process that starts this one again if it is killed; None: there is none.
        own_ray: A Ray of our own that another process holds; None: the cluster's, or one that ends with this process.

    Raises:
        ConfigError: If a network is not finished (names the command that finishes it), the keys or the hook cannot be
            read, or the server would be open to other machines without keys.
        StepError: If the port or the name is taken, our own Ray lacks CPUs or GPUs, a replica cannot start, or Ray goes
            away.
    """
    config = recipe.serve
    announce = announce or write_line
    require_keys(config)
    swap_requests = kept.swap_requests if kept else SwapRequests()
    if reload is not None:
        swap_requests.listen()
    # Networks that are swapped in keep the name, by which the application is found.
    recipe = dataclasses.replace(recipe, serve=dataclasses.replace(config, name=server_name(recipe)))
    front = Front(config)
    _quieten()
    with ExitStack() as stack:
        stack.callback(front.close)
        stack.enter_context(HttpServer(front, kept.listener if kept else listen(config.host, config.port)))
        if kept:
            kept.note_listening()
        served = served_last(kept) or served_by(recipe)
        recipe, artifacts = served.recipe, served.artifacts
        uses = stack.enter_context(ExitStack())
        uses.enter_context(served.in_use(announce))
        servers = stack.enter_context(own_ray.join() if own_ray else _connected(address))
        if not address:
            _require_room(recipe)
        try:
            with _deployed(recipe, artifacts, front.gate, announce, servers, shared=bool(address)) as handles:
                front.open(recipe, artifacts, *remote_parts(write_tables(recipe, artifacts), handles, front.upkeep))
                watch = Watch(served, front, handles, announce, uses, swap_requests, kept)
                announce(f"{server_name(recipe)} is served at {url_of(config.host, config.port)} - Ctrl-C ends it")
                for note in served.notes:
                    announce(note)
                if on_ready is not None:
                    on_ready()
                with finishing(front, config.drain_s, announce):
                    watch.run(reload, servers)
        except KeyboardInterrupt:
            front.gate.close("the server has ended")


@contextmanager
def _connected(address: str) -> Generator[list[psutil.Process]]:
    with connect(address):
        yield own_servers()


@contextmanager
def _deployed(
    recipe: Recipe,
    artifacts: dict[str, Artifact],
    gate: Gate,
    announce: Announce,
    servers: list[psutil.Process],
    *,
    shared: bool,
) -> Generator[Handles]:
    """The replicas of a recipe, ready; on a shared cluster they are removed at the end, and nothing else is.

    Args:
        recipe: The recipe.
        artifacts: Its finished steps, by name.
        gate: Says what is waited for.
        announce: Takes lines for people.
        servers: Of our own Ray; empty on a shared cluster.
        shared: Whether the cluster is somebody else's.
    """
    application = application_name(recipe)
    owner = _claim(application) if shared else None
    try:
        with errors_for_people():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
            target = RunTarget(networks_application(recipe, artifacts), name=application, route_prefix=None)
            [first] = serve.run_many([target], wait_for_applications_running=False)
            _wait_until_ready(recipe, gate, announce, servers)
        name, *others = parts_of(recipe)
        handles = {name: first, **{other: serve.get_deployment_handle(other, application) for other in others}}
        end_requests(handles)
        yield handles
    finally:
        if shared:  # our own Ray ends with its processes
            with suppress(ray.exceptions.RayError, TimeoutError):
                serve.delete(application)
        del owner


@ray.remote(num_cpus=0)
class _Owner:
    """Holds the name of an application while the process that serves it lives; Ray ends both together."""


def _claim(application: str) -> Any:
    """Reserve an application's name on the cluster.

    Raises:
        StepError: If another process serves under it.
    """
    deadline_s = time.monotonic() + _CLAIM_S
    while True:
        try:
            return _Owner.options(name=application, namespace=_NAMESPACE).remote()
        except ValueError:
            if time.monotonic() < deadline_s:  # Ray has yet to notice that a server was killed
                time.sleep(_LOOK_EVERY_S)
                continue
        name = application.removeprefix("unclip-")
        raise StepError(
            f"serve: {name!r} is served on this cluster already; give this server another name (--name) or end that one"
        )


def _wait_until_ready(recipe: Recipe, gate: Gate, announce: Announce, servers: list[psutil.Process]) -> None:
    """Wait for the replicas, and say what is waited for.

    Raises:
        RuntimeError: If they cannot start.
    """
    while True:
        require_alive(servers)
        state = application_state(application_name(recipe))
        if state.status == "RUNNING":
            return
        if state.status == "DEPLOY_FAILED":
            raise RuntimeError(state.message)
        reason = missing_machine(recipe) or "the networks are loading"
        if reason != gate.reason:
            if reason != "the networks are loading":
                announce(f"waiting: {reason}")
            gate.close(reason)
        time.sleep(_LOOK_EVERY_S)


def missing_machine(recipe: Recipe) -> str:
    """What is waited for, if no machine of the cluster is large enough for a replica; empty if one is."""
    for part in parts_of(recipe):
        needs, labels_of = needs_of_replica(recipe.serve, part), place_of(recipe.serve, part).label_selector
        if not any(node["Alive"] and machine_has(node, needs, {"label_selector": labels_of}) for node in ray.nodes()):
            size = " and ".join(f"{number:g} {kind}" for kind, number in needs.items())
            labels = ", ".join(f"{name}={value}" for name, value in labels_of.items())
            return (
                f"a replica needs a machine with {size}{' and ' + labels if labels else ''}; the cluster was asked for "
                "one"
            )
    return ""


def _require_room(recipe: Recipe) -> None:
    """Refuse a demand that our own Ray would wait for without end."""
    total, demand, num_replicas = ray.cluster_resources(), dict[str, float](), 0
    for part in parts_of(recipe):
        count = place_of(recipe.serve, part).replicas[0]
        num_replicas += count
        for name, number in needs_of_replica(recipe.serve, part).items():
            demand[name] = demand.get(name, 0.0) + count * number
    for name, number in demand.items():
        if total.get(name, 0.0) < number:
            raise StepError(
                f"serve: {num_replicas} replicas need {number:g} {name}, this machine has "
                f"{total.get(name, 0.0):g}; see serve.replicas, serve.cpus_per_replica and serve.accelerator"
            )


def _quieten() -> None:
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)

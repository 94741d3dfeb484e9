"""``unclip serve``: the process that speaks HTTP, with the networks in replicas of Ray Serve.

Ray Serve's own proxies are not used, because all recipes of a cluster would share their one port. Here every recipe has
its own, and answers in the API's form while the networks load, end or have died. This process loads no torch.
"""

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import ray
import ray.exceptions
from ray import serve
from ray.serve.api import RunTarget
from ray.serve.exceptions import DeploymentUnavailableError

from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.connection import connect, own_servers, require_alive
from pipeline.runtime.deployments import networks_application
from pipeline.runtime.draining import Announce, finishing, named, write_line
from pipeline.runtime.front import Front
from pipeline.runtime.kept_ray import KeptRay
from pipeline.runtime.lookout import Lookout, application_state, in_thread
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import (
    digest_of,
    needs_of_replica,
    part_tables,
    parts_of,
    place_of,
    write_tables,
)
from pipeline.runtime.remote_model import Handles, end_requests, turn_to
from pipeline.runtime.served import Served, in_use_of, served_by, served_last, server_name
from pipeline.serve.gate import Gate
from pipeline.serve.guards import require_keys
from pipeline.serve.http_server import HttpServer, listen, url_of
from pipeline.serve.keeper import Kept, SwapRequests
from pipeline.workspace.store import Artifact

_NAMESPACE = "unclip"
_WATCH_EVERY_S = 1.0
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
        uses.enter_context(in_use_of(recipe, artifacts))
        servers = stack.enter_context(own_ray.join() if own_ray else _connected(address))
        if not address:
            _require_room(recipe)
        try:
            with _deployed(recipe, artifacts, front.gate, announce, servers, shared=bool(address)) as handles:
                front.open(recipe, artifacts, *remote_parts(write_tables(recipe, artifacts), handles, front.upkeep))
                watch = _Watch(served, front, handles, announce, uses, swap_requests, kept)
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
        with _errors_for_people():
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
        if not any(_fits(node, needs, labels_of) for node in ray.nodes()):
            size = " and ".join(f"{number:g} {kind}" for kind, number in needs.items())
            labels = ", ".join(f"{name}={value}" for name, value in labels_of.items())
            return (
                f"a replica needs a machine with {size}{' and ' + labels if labels else ''}; the cluster was asked for "
                "one"
            )
    return ""


def _fits(node: dict[str, Any], needs: dict[str, float], labels: dict[str, str]) -> bool:
    is_large = all(node["Resources"].get(kind, 0.0) >= number for kind, number in needs.items())
    return bool(node["Alive"]) and is_large and labels.items() <= node["Labels"].items()


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


class _Watch:
    """Looks after the replicas of a server, and swaps their networks.

    Args:
        served: What is served.
        front: Its HTTP interface.
        handles: Of its replicas.
        announce: Takes lines for people.
        uses: Holds what is served in use until the end.
        swap_requests: When to swap.
        kept: Learns what is served, for the process that comes after this one; None: none does.
    """

    def __init__(
        self,
        served: Served,
        front: Front,
        handles: Handles,
        announce: Announce,
        uses: ExitStack,
        swap_requests: SwapRequests,
        kept: Kept | None = None,
    ) -> None:
        self._served = served
        self._front = front
        self._handles = handles
        self._announce = announce
        self._uses = uses
        self._kept = kept
        self._lookout = Lookout(application_name(served.recipe), handles, front, announce)
        self._swap_requests = swap_requests
        self._swapping: Future[None] | None = None
        served.remember(kept, announce)

    def run(self, reload: Callable[[], Recipe] | None, servers: list[psutil.Process]) -> None:
        """Watch until Ctrl-C, and swap to the networks of ``reload``'s recipe when that is requested.

        Args:
            reload: See ``serve_recipe``.
            servers: Of our own Ray; empty on a shared cluster.

        Raises:
            StepError: If Ray or the application goes away.
        """
        while True:
            time.sleep(_WATCH_EVERY_S)
            require_alive(servers)
            try:
                self._lookout.look()
            except ray.exceptions.RayError as error:
                raise StepError(f"serve: Ray went away ({type(error).__name__})") from None
            if reload is not None:
                self._swap_if_requested(reload)

    def _swap_if_requested(self, reload: Callable[[], Recipe]) -> None:
        """Begin a swap in a thread, because replicas take their time to load; look whether one is over."""
        if self._swapping is None and self._swap_requests.take():
            self._swapping = in_thread(lambda: self.swap(reload()))
        if self._swapping is not None and self._swapping.done():
            swapping, self._swapping = self._swapping, None
            try:
                swapping.result()
            except Exception as error:  # noqa: BLE001  (whatever it is: the networks of before go on)
                self._announce(f"not swapped, the networks of before go on: {named(error)}")

    def swap(self, recipe: Recipe) -> None:
        """Let every replica load the networks of ``recipe`` beside its own, and then send new requests to them.

        Requests that came before end with the networks of before, which the replicas keep for ``serve.drain_s``.
        Where the server listens stays as it is.

        Raises:
            UnclipError: If the networks are not finished, or a replica cannot load them; then all keep the old ones.
        """
        served = served_by(dataclasses.replace(recipe, serve=self._served.recipe.serve))
        recipe, artifacts = served.recipe, served.artifacts
        if parts_of(recipe).keys() != parts_of(self._served.recipe).keys():
            raise StepError("serve: the recipe has other parts than the chain that is served; start the server anew")
        if served.tables == self._served.tables:
            self._announce("nothing to swap: these networks are served already")
            return
        with ExitStack() as uses:
            uses.enter_context(in_use_of(recipe, artifacts))
            # What can fail without the replicas fails here.
            parts = remote_parts(served.tables, self._handles, self._front.upkeep)
            app = self._front.build(recipe, artifacts, *parts)
            self._announce("loading other networks")
            try:
                self._load(served)
            except Exception:
                with suppress(ray.exceptions.RayError):  # the watch says that Ray went away
                    self._reconfigure(self._served)
                raise
            self._uses.close()
            self._uses.enter_context(uses.pop_all())
        self._served = served
        self._front.gate.open(app)
        turn_to(self._handles, digest_of(served.tables))
        served.remember(self._kept, self._announce)
        self._announce("other networks are served")
        if served.version:
            self._announce(served.version)

    def _load(self, served: Served) -> None:
        with _errors_for_people():
            replies = self._reconfigure(served)
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors or not replies:
            reason = _reason(str(errors[0])) if errors else "no replica is running"
            raise StepError(f"serve: the networks cannot be loaded: {reason}")
        # Replicas that start later load the same; those that have loaded it have nothing to do.
        application = networks_application(served.recipe, served.artifacts)
        target = RunTarget(application, name=application_name(served.recipe), route_prefix=None)
        with _errors_for_people():
            serve.run_many([target], wait_for_applications_running=False)

    def _reconfigure(self, served: Served) -> list[Any]:
        """Configure all replicas; their replies, or those of the first part that has an error or no replica."""
        replies: list[Any] = []
        for part, handle in self._handles.items():
            own = part_tables(served.recipe, served.tables, part)
            try:
                some = handle.broadcast("prepare", own).results(return_exceptions=True)
            except DeploymentUnavailableError:  # none is running
                return []
            if not some or any(isinstance(reply, Exception) for reply in some):
                return some
            replies += some
        return replies


def _reason(text: str) -> str:
    """The last error that a replica's traceback names."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    return f"{errors[-1][0]}: {errors[-1][1]}" if errors else text.strip().splitlines()[-1]


def _quieten() -> None:
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)

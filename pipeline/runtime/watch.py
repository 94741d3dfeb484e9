"""Looks after the replicas of ``unclip serve``, and swaps their networks under load.

Ray Serve updates one replica after another, and none while others start. So all replicas are told here, at once, and
those that come in the middle of a swap are told again.
"""

import re
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import ray.exceptions
from ray import serve
from ray.serve.api import RunTarget
from ray.serve.exceptions import DeploymentUnavailableError

from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.connection import require_alive
from pipeline.runtime.deployments import networks_application
from pipeline.runtime.draining import Announce, named
from pipeline.runtime.front import Front
from pipeline.runtime.lookout import Lookout, in_thread
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import NEIGHBOURS, digest_of, part_tables, parts_of
from pipeline.runtime.remote_model import Handles, are_served
from pipeline.runtime.served import Served, served_anew, server_name
from pipeline.runtime.turns import Turns
from pipeline.serve.keeper import Kept, SwapRequests

_WATCH_EVERY_S = 1.0
_LOOK_EVERY_S = 0.2
_LONGEST_TURN_S = 60.0
"""How long a swap waits for replicas that were starting when it began."""


class Watch:
    """Looks after the replicas of a server, and swaps their networks.

    Args:
        served: What is served.
        front: Its HTTP interface, which is open.
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
        """Of what is served, and of what was while requests of it are under way."""
        self._kept = kept
        self._lookout = Lookout(application_name(served.recipe), handles, front, announce)
        num_requests, ended = front.gate.requests_of(front.gate.app), self._hold(uses.pop_all())
        self._turns = Turns(handles, digest_of(served.tables), num_requests, ended)
        self._swap_requests = swap_requests
        self._working: Future[None] | None = None
        """A swap, or what tells replicas once more what is served."""
        self._must_tell = True
        """Whether replicas may have other networks than those that are served: a server before this one may have been
        killed in the middle of a swap."""
        self._is_telling_again = False
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
            self._turns.look()
            self._work(reload)

    def _work(self, reload: Callable[[], Recipe] | None) -> None:
        """Do in a thread what waits for replicas, because they take their time to load; look whether it is over."""
        if self._working is None:
            if reload is not None and self._swap_requests.take():
                self._working = in_thread(lambda: self.swap(reload()))
            elif self._must_tell or self._lookout.is_updating:
                self._must_tell = False
                self._working = in_thread(self._tell_what_is_served)
        if self._working is not None and self._working.done():
            working, self._working = self._working, None
            try:
                working.result()
            except Exception as error:  # noqa: BLE001  (whatever it is: the networks of before go on)
                self._announce(f"not swapped, the networks of before go on: {named(error)}")

    def _tell_what_is_served(self) -> None:
        """Let the replicas load what they lack of it; if they cannot be told, say so once, and try it again."""
        try:
            self._tell(self._served)
        except Exception as error:  # noqa: BLE001  (whatever it is, it may have passed a second later)
            if not self._is_telling_again:
                self._announce(f"new replicas cannot be told what is served; it is tried again: {named(error)}")
            self._must_tell = self._is_telling_again = True
        else:
            self._is_telling_again = False

    def _hold(self, uses: ExitStack) -> Callable[[], object]:
        """Hold what is in use until the end of the server, or until what is returned is called."""
        self._uses.callback(uses.close)
        return lambda: in_thread(uses.close)  # a store that is away holds up nothing

    def swap(self, recipe: Recipe) -> None:
        """Let every replica load the networks of ``recipe`` beside its own, and then send new requests to them.

        Requests that came before end with the networks of before, which the replicas keep until then, and for
        ``serve.drain_s`` at least. All of ``[serve]`` stays as it is.

        Raises:
            UnclipError: If the networks are not finished, or a replica cannot load them; then all keep the old ones.
        """
        served = served_anew(recipe, self._served, self._announce)
        recipe, artifacts = served.recipe, served.artifacts
        if parts_of(recipe).keys() != parts_of(self._served.recipe).keys():
            raise StepError("serve: the recipe has other parts than the chain that is served; start the server anew")
        if served.tables == self._served.tables:
            self._announce("nothing to swap: these networks are served already")
            return
        with ExitStack() as uses:
            uses.enter_context(served.in_use(self._announce))
            # What can fail without the replicas fails here.
            parts = remote_parts(served.tables, self._handles, self._front.upkeep)
            app = self._front.build(recipe, artifacts, *parts)
            self._announce("loading other networks")
            try:
                self._load(served)
            except Exception:
                self._tell(self._served)
                raise
            ended = self._hold(uses.pop_all())
        self._served = served
        self._front.gate.open(app)
        self._front.upkeep.served = digest_of(served.tables)
        self._turns.turn_to(digest_of(served.tables), self._front.gate.requests_of(app), ended)
        served.remember(self._kept, self._announce)
        self._announce("other networks are served")
        for fact in served.facts:
            self._announce(fact)

    def _load(self, served: Served) -> None:
        """Let all replicas load networks, also those that start meanwhile.

        Raises:
            StepError: If a replica cannot, or none is running.
        """
        for part in self._handles:
            with errors_for_people():
                replies = self._prepare(served, part)
            errors = [reply for reply in replies if isinstance(reply, Exception)]
            if errors or not (replies or part == NEIGHBOURS):  # an index that is away holds up no networks
                reason = _reason(str(errors[0])) if errors else "no replica is running"
                raise StepError(f"serve: the networks cannot be loaded: {reason}")
        # Replicas that start later load the same; those that have loaded it have nothing to do.
        application = networks_application(served.recipe, served.artifacts)
        target = RunTarget(application, name=application_name(served.recipe), route_prefix=None)
        with errors_for_people():
            serve.run_many([target], wait_for_applications_running=False)
        deadline_s = time.monotonic() + _LONGEST_TURN_S
        while not are_served(self._handles, digest_of(served.tables)) and time.monotonic() < deadline_s:
            self._tell(served)
            time.sleep(_LOOK_EVERY_S)

    def _tell(self, served: Served) -> None:
        """Let the replicas that run now load what they lack, and give up all that is neither this nor in use.

        One that cannot is replaced by Ray Serve once requests mean these networks.
        """
        for part in self._handles:
            with suppress(ray.exceptions.RayError):  # the watch says that Ray went away
                self._prepare(served, part)

    def _prepare(self, served: Served, part: str) -> list[Any]:
        """What the replicas of a part answer when they are told to load networks; empty if none is running."""
        own = part_tables(served.recipe, served.tables, part)
        try:
            return self._handles[part].broadcast("prepare", own).results(return_exceptions=True)
        except DeploymentUnavailableError:
            return []


def application_name(recipe: Recipe) -> str:
    """Name of the recipe's application in Ray Serve."""
    return f"unclip-{server_name(recipe)}"


@contextmanager
def errors_for_people() -> Generator[None]:
    """Raise the errors of Ray and of its replicas as ``StepError``."""
    try:
        yield
    except RuntimeError as error:
        raise StepError(f"serve: a replica could not start: {_reason(str(error))}") from None
    except ray.exceptions.RayError as error:
        raise StepError(
            f"serve: Ray Serve could not start ({type(error).__name__}); if the machine was only too busy, the same "
            "command works again"
        ) from None


def _reason(text: str) -> str:
    """The last error that a replica's traceback names."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    return f"{errors[-1][0]}: {errors[-1][1]}" if errors else text.strip().splitlines()[-1]

"""Looks after the replicas of a server, from each process that speaks HTTP."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import TypeVar

from ray import serve
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from pipeline.errors import StepError
from pipeline.runtime.draining import Announce
from pipeline.runtime.front import Front
from pipeline.runtime.parts import NEIGHBOURS

_CONTROLLER_ANSWERS_S = 3.0
_RUNNING = {"RUNNING", "UPDATING", "RECOVERING"}
"""States of replicas that take requests; a controller that was restarted looks at those that it finds: RECOVERING."""

T = TypeVar("T")


class Lookout:
    """Tells a server what Ray Serve says of its replicas; while none runs, requests are answered with 503.

    An index that is away closes nothing: pictures need none, and a search fails by itself.

    Args:
        application: Its name in Ray Serve.
        parts: Names of the deployments.
        front: The HTTP interface, which is open.
        announce: Takes lines for people.
    """

    def __init__(self, application: str, parts: Iterable[str], front: Front, announce: Announce) -> None:
        self._application = application
        self._parts = tuple(parts)
        self._front = front
        self._announce = announce
        self._state: Future[ApplicationStatusOverview] | None = None
        """What Ray Serve's controller was asked for and has not answered yet."""
        self._unhealthy = set[str]()
        """Parts of which a replica has died and is not replaced yet."""
        self.is_updating = False
        """Whether Ray Serve has yet to bring all replicas to what was deployed last."""

    def look(self) -> None:
        """Look once.

        Raises:
            StepError: If the application was ended.
            RayError: If Ray went away.
        """
        state = self._state_of_application()
        if state is None:
            return
        running = dict.fromkeys(self._parts, 0)
        deployments = {part: state.deployments[part] for part in running.keys() & state.deployments.keys()}
        self.is_updating = any(deployment.status == "UPDATING" for deployment in deployments.values())
        for part, deployment in deployments.items():
            running[part] = num_replicas(deployment, _RUNNING)
            self._note_health(part, is_healthy=deployment.status != "UNHEALTHY")
        self._front.upkeep.note_running(running)
        gate = self._front.gate
        gate.note = "; ".join(self._notes(running))
        is_running = all(number for part, number in running.items() if part != NEIGHBOURS)
        if not is_running and not gate.reason:
            gate.close("no replica is running, others are started")
            self._announce("no replica is running; requests are answered with 503 until others have started")
        elif is_running and gate.reason:
            gate.reopen()
            self._announce("served again")

    def _notes(self, running: Mapping[str, int]) -> Iterator[str]:
        """What is amiss although requests are answered."""
        if self._unhealthy:
            yield f"a replica has died: {', '.join(sorted(self._unhealthy))}"
        if running.get(NEIGHBOURS) == 0:
            yield "no replica of the index is running: pictures have no neighbours, and nothing is found"

    def _state_of_application(self) -> ApplicationStatusOverview | None:
        """What runs; None if Ray Serve's controller does not answer, because it has died and is started again."""
        is_late = self._state is not None
        self._state = self._state or in_thread(lambda: application_state(self._application))
        wait({self._state}, timeout=_CONTROLLER_ANSWERS_S)
        if not self._state.done():
            self._front.gate.note = "Ray Serve's controller does not answer: a replica that dies is not replaced"
            if not is_late:
                self._announce(f"{self._front.gate.note} until it has started again; requests are answered")
            return None
        answer, self._state = self._state, None
        if is_late:
            self._announce("Ray Serve's controller answers again")
        return answer.result()

    def _note_health(self, part: str, *, is_healthy: bool) -> None:
        if is_healthy:
            self._unhealthy.discard(part)
        elif part not in self._unhealthy:
            self._unhealthy.add(part)
            self._front.upkeep.deaths.labels(part).inc()
            self._announce(f"a replica has died ({part}), another one is started")


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Work in a thread that does not hold up the end of the process."""
    result = Future[T]()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  (raised where the result is read)
            result.set_exception(error)

    threading.Thread(target=run, name="unclip-watch", daemon=True).start()
    return result


def application_state(application: str) -> ApplicationStatusOverview:
    """What Ray Serve says of an application.

    Raises:
        StepError: If there is none.
    """
    state = serve.status().applications.get(application)
    if state is None:
        raise StepError("serve: the application was ended from elsewhere")
    return state


def num_replicas(deployment: DeploymentStatusOverview, states: Collection[str]) -> int:
    """How many replicas of a deployment are in one of these states, which Ray Serve names."""
    return sum(count for state, count in deployment.replica_states.items() if state in states)

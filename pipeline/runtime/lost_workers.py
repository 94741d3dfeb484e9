"""What a training's workers were lost to: their machine, its memory, or a fault of their own.

When a machine ends, the workers on the others fail within a second, because they talk to it, while Ray still counts on
it for up to a minute. So a machine is there only if a task on it answers. One that does not is waited for until Ray has
given it up, too: the next workers might be sent to it.
"""

import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.machine import num_oom_kills
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import living_machines
from pipeline.runtime.restarts import End, out_of_memory
from pipeline.workspace.store import LIVE, Artifact

_PLACES = f"{LIVE}workers.json"
_LOOK_S = 1.0
_LONGEST_LOOK_S = 90.0
"""Longer than Ray needs to miss a machine, and than one that is busy needs to start a process."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    machine: str
    """Ray's id."""
    oom_kills: int
    """Processes of the worker's container, job or machine that the kernel has ended so far because memory ran out."""


def here() -> Place:
    """The place of this process."""
    return Place(ray.get_runtime_context().get_node_id(), num_oom_kills())


def note_places(output: Artifact, places: Sequence[Place]) -> None:
    """Write where the workers of a training run, in the order of their ranks."""
    output.write_json(_PLACES, {"workers": [asdict(place) for place in places]})


def forget_places(output: Artifact) -> None:
    """Remove where the workers of an earlier start were."""
    output.remove(_PLACES)


def machine_of_first(output: Artifact) -> str | None:
    """Ray's id of the machine on which the first worker of a training runs or ran; None if none has begun."""
    places = (output.find_json(_PLACES) or {"workers": []})["workers"]
    return places[0]["machine"] if places else None


def end_of(context: StepContext, error: Exception, before: Collection[str]) -> End:
    """How a start of a training ended that lost a worker.

    Args:
        context: The step.
        error: What Ray says: of the worker, of all of them (``worker_failures``), or of Ray Train's controller.
        before: Ids of the machines that were there when it started: where no worker has begun, any may be the lost one.
    """
    section = context.recipe.trained()[context.step.name]
    places = [Place(**place) for place in (context.output.find_json(_PLACES) or {"workers": []})["workers"]]
    by_rank: dict[int, Exception] = getattr(error, "worker_failures", {}) or {0: error}
    failures = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in by_rank.items()}
    num_workers = len(places) or section.resources.most_workers
    if any(isinstance(failure, ray.exceptions.OutOfMemoryError) for failure in failures.values()):
        words = "Ray has ended a worker: the memory of its machine was used up"
        return out_of_memory(section, num_workers, words, is_own=False)
    machines, cause = {place.machine for place in places} or set(before), last_line(next(iter(by_rank.values())))
    answers = _answers(machines)
    if machines - answers.keys():
        return End("preempted", f"a machine was lost ({cause})")
    died = [rank for rank, failure in failures.items() if isinstance(failure, ray.exceptions.RayError)]
    if any(answers[place.machine].oom_kills > place.oom_kills for rank, place in enumerate(places) if rank in died):
        words = "a worker was killed, and the kernel has ended a process there because memory ran out"
        return out_of_memory(section, num_workers, words, is_own=False)
    return End("failed", f"a worker failed ({cause})")


def last_line(error: Exception) -> str:
    """The last line of an error, or its class if it has no words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


def _answers(machines: Collection[str]) -> dict[str, Place]:
    """What the machines answer, as far as they do, by their ids; waits for the others until Ray misses one of them."""
    answers, tasks = dict[str, Place](), dict[Any, str]()
    end = time.monotonic() + _LONGEST_LOOK_S
    while True:
        for machine in set(machines) - answers.keys() - set(tasks.values()):
            there = NodeAffinitySchedulingStrategy(machine, soft=False)
            tasks[_answer.options(scheduling_strategy=there).remote()] = machine
        for task in ray.wait(list(tasks), num_returns=len(tasks), timeout=_LOOK_S)[0]:
            machine = tasks.pop(task)
            with contextlib.suppress(ray.exceptions.RayError):  # it is asked again
                answers[machine] = ray.get(task)
        silent = set(machines) - answers.keys()
        if not silent or not silent <= living_machines() or time.monotonic() > end:
            return answers
        time.sleep(_LOOK_S)


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> Place:
    return here()

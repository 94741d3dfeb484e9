"""When a step that is ready is submitted, and how long a training may wait for its machines."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import psutil
import ray

from pipeline.errors import StepError
from pipeline.recipe.schedule import needs_of
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import cluster_has_roles, describe, unoffered, worker_options
from pipeline.runtime.step_task import cancel_step
from pipeline.workspace.progress import ProgressState, duration, read_progress

_HEAD_START_S = 20.0

Admission = Callable[[StepContext, Collection[StepContext]], bool]
"""(step, submitted steps) -> whether to submit it now."""


def at_once(_context: StepContext, _running: Collection[StepContext]) -> bool:
    """On a cluster, submit every ready step, so that the autoscaler sees the demand."""
    return True


def fits_now(context: StepContext, running: Collection[StepContext]) -> bool:
    """On our own Ray, submit a step when its resources are free, in the order of the plan.

    Ray places waiting tasks in no fixed order; an upsampler that starts before the decoder makes the whole run minutes
    longer.
    """
    return not running or (
        not any(_is_starting(other) for other in running)
        and all(ray.available_resources().get(name, 0) >= amount for name, amount in _needs(context).items())
    )


def _is_starting(context: StepContext) -> bool:
    """Whether a step may soon take resources that seem free."""
    state = read_progress(context.output)
    # A reading of a later time than now was written before the clock went back.
    return state is not None and not state.has_begun and 0 <= time.time() - state.updated < _HEAD_START_S


def _needs(context: StepContext) -> dict[str, float]:
    """Resources that a step needs to begin: of all workers of a training, of one worker of any other step."""
    needs = needs_of(getattr(context.recipe, context.step.name))
    return {"CPU": needs.num_workers * needs.cpus, "GPU": needs.num_workers * needs.gpus}


class Waits:
    """Since when which trainings wait for machines.

    Args:
        servers: The servers of our own Ray.
    """

    def __init__(self, servers: list[psutil.Process]) -> None:
        self._servers = servers
        self._since: dict[str, float] = {}

    def end_late(
        self, running: Mapping[Any, StepContext], readings: Mapping[str, ProgressState]
    ) -> dict[Any, StepError]:
        """End the trainings that have waited for longer than their recipe allows; returns what each waited for.

        Args:
            running: The running steps, by Ray's reference.
            readings: Their newest readings, by name.
        """
        late: dict[Any, StepError] = {}
        for reference, context in running.items():
            name, trained = context.step.name, context.recipe.trained()
            if name not in trained or name not in readings or readings[name].has_begun:
                self._since.pop(name, None)
            elif time.monotonic() - self._since.setdefault(name, time.monotonic()) > trained[name].resources.max_wait_s:
                late[reference] = self._error(context)
                cancel_step(reference, self._servers)
        return late

    def _error(self, context: StepContext) -> StepError:
        name = context.step.name
        resources = context.recipe.trained()[name].resources
        options = worker_options(name, resources, has_roles=cluster_has_roles())
        return StepError(
            f"{name}: waited {duration(time.monotonic() - self._since[name])} for {resources.fewest_workers} x "
            f"{describe(options)}{unoffered(options)}. Add machines, or change {name}.resources (label_selector, "
            "num_workers, max_wait_s), and run again: its checkpoints are kept"
        )

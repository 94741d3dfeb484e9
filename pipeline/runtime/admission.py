"""Which steps can run here, when one that is ready is submitted, and how long a training may wait for its machines."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import psutil
import ray

from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import needs_of
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import (
    DISK,
    amounts_of,
    cluster_has_roles,
    describe,
    needed,
    room_for,
    too_large,
    worker_options,
)
from pipeline.runtime.step_task import cancel_step
from pipeline.workspace.progress import ProgressState, duration, read_progress

_HEAD_START_S = 20.0

Admission = Callable[[StepContext, Collection[StepContext]], bool]
"""(step, submitted steps) -> whether to submit it now."""


def require_room(recipe: Recipe, steps: Collection[str], *, is_long_list: bool = False) -> None:
    """Refuse steps for whose workers our own Ray, which no machine joins, would wait without end.

    A short list of pairs is read without workers, and a pretrained CLIP is loaded without: these steps are not refused.

    Args:
        recipe: The recipe.
        steps: Names of the steps that are to run.
        is_long_list: Whether workers read the list of pairs, so that this step is refused, too.

    Raises:
        StepError: Names all such steps, what their workers ask for, and the fields that say so.
    """
    has_roles, without = cluster_has_roles(), {"clip" if recipe.clip.source == "pretrained" else ""}
    without |= set() if is_long_list else {"pairs"}
    lacks, fields, amounts = list[str](), list[str](), set[str]()
    for name in steps:
        section = getattr(recipe, name)
        if name in without or not hasattr(section, "resources"):
            continue
        options = worker_options(name, section.resources, has_roles=has_roles)
        number, room = needs_of(section).num_workers, room_for(options)
        if room < number:
            lacks.append(f"{name} needs {number} x {describe(options)}")
            amounts |= amounts_of(options).keys()
            fields += [f"{name}.resources.{field}" for field in (["num_workers"] if room else too_large(options))]
    if lacks:
        raise StepError(
            f"{'; '.join(lacks)}: this machine has {_total(amounts)}, and no other joins it. Change "
            f"{', '.join(fields)}, or run on a cluster with --address"
        )


def _total(names: Collection[str]) -> str:
    """What the connected machines have of these resources, free or not, for people."""
    total = ray.cluster_resources()
    words = [f"{total.get('CPU', 0):g} CPU", f"{total.get('GPU', 0):g} GPU"]
    words += [f"{total.get('memory', 0) / 1e9:.3g} GB"] if "memory" in names else []
    words += [f"{total.get(DISK, 0):g} GB of disk"] if DISK in names else []
    return f"{', '.join(words[:-1])} and {words[-1]}"


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
            f"{name}: waited {duration(time.monotonic() - self._since[name])} for "
            f"{needed(resources.fewest_workers, options)}. Add machines, or change {name}.resources (label_selector, "
            "num_workers, max_wait_s), and run again: its checkpoints are kept"
        )

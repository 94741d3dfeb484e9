"""Which of the steps that could run are handed to Ray: Ray places what waits in no order of its own."""

import time
from collections.abc import Callable, Collection

import ray

from pipeline.recipe.sections import TaskResources, TrainResources
from pipeline.runtime.context import StepContext
from pipeline.workspace.progress import read_progress

_HEAD_START_S = 20.0

Admission = Callable[[StepContext, Collection[StepContext]], bool]
"""(step, steps handed over) -> whether to hand it over now."""


def told_at_once(_context: StepContext, _running: Collection[StepContext]) -> bool:
    """On a cluster: it is told of all that is wanted, so that it can grow."""
    return True


def fits_now(context: StepContext, running: Collection[StepContext]) -> bool:
    """On a Ray of our own: a step starts when there is room for it, the first of the plan first.

    Ray places what waits in no order of its own; an upsampler that is placed before the decoder makes the whole run
    longer by minutes.
    """
    return not running or (
        not any(_asked_just_now(other) for other in running)
        and all(ray.available_resources().get(name, 0) >= amount for name, amount in _needs(context).items())
    )


def _asked_just_now(context: StepContext) -> bool:
    """Whether a step may still be about to take what seems free."""
    state = read_progress(context.output)
    return state is not None and not state.has_begun and time.time() - state.updated < _HEAD_START_S


def _needs(context: StepContext) -> dict[str, float]:
    """What a step must have to begin: all workers of a training, one of any other step."""
    needs = getattr(getattr(context.recipe, context.step.name), "resources", None)
    if not isinstance(needs, TaskResources | TrainResources):
        return {}
    num_workers = needs.num_workers if isinstance(needs, TrainResources) else 1
    num_gpus = num_workers if needs.accelerator == "cuda" else 0
    return {"CPU": num_workers * needs.cpus_per_worker, "GPU": num_gpus}

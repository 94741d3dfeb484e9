"""Receives the events of a run, and every few seconds its time to go."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import ray

from pipeline.recipe.estimate import Remaining, load_times, remaining
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import ProgressState

_FORECAST_S = 5.0


class Observer(Protocol):
    """Receives the events of a run."""

    def started(self, step: Step) -> None:
        """A step was submitted to Ray."""

    def progressed(self, step: Step, state: ProgressState) -> None:
        """The progress of a running step was read."""

    def remaining(self, rest: Remaining) -> None:
        """The time to go of the whole run was estimated again."""

    def finished(self, step: Step, manifest: Manifest) -> None:
        """A step was committed."""

    def failed(self, step: Step, dependents: Collection[str]) -> None:
        """A step failed, and the waiting steps ``dependents``, which are made from it, are not run."""

    def reported(self, message: str) -> None:
        """How far work is that is of no step, such as a takedown."""

    def warned(self, message: str) -> None:
        """Something went wrong that does not stop the run."""


class Forecast:
    """Gives the observer the time to go of the whole run, every few seconds.

    Args:
        recipe: The recipe.
        steps: The steps that are not done.
        observer: Receives it.
        can_grow: Whether machines may join, so that the resources are asked for again each time. A Ray of this run's
            own has those of this machine; asking it would hang for a minute if it were killed at that moment.
    """

    def __init__(self, recipe: Recipe, steps: Sequence[Step], observer: Observer, *, can_grow: bool) -> None:
        self._can_grow = can_grow
        self._resources = ray.cluster_resources()
        self._recipe = recipe
        self._steps = list(steps)
        self._observer = observer
        self._times, self._machine = load_times(recipe, steps)
        self._estimated_at = float("-inf")

    def update(self, readings: Mapping[str, ProgressState], done: Collection[str]) -> None:
        """Estimate again from the readings of the running steps."""
        if time.monotonic() - self._estimated_at < _FORECAST_S:
            return
        self._estimated_at = time.monotonic()
        if self._can_grow:
            self._resources = ray.cluster_resources()
        cpus, gpus = (self._resources.get(name, 0) for name in ("CPU", "GPU"))
        machine = dataclasses.replace(self._machine, cpus=cpus, gpus=gpus)
        steps = [step for step in self._steps if step.name not in done]
        self._observer.remaining(remaining(self._recipe, steps, readings, self._times, machine))

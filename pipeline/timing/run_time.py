"""The time of a run before it starts: measured, kept for the run's own estimate, and scheduled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.recipe.estimate import StepTime, plan_spans, save_times
from pipeline.recipe.plan import StepStatus, artifact_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import Machine, Span, this_machine
from pipeline.timing.measure import Watch, measure
from pipeline.timing.units import step_times
from pipeline.workspace.store import Workspace


@dataclass(frozen=True)
class RunTime:
    """When the steps of a run start and end."""

    spans: dict[str, Span]
    """Of the steps that are not done, by name."""
    untimed: tuple[str, ...]
    """Steps that nothing here measures."""
    machine: Machine

    @property
    def seconds(self) -> float:
        """Time of the whole run, without the steps of unknown time."""
        return max((span.end_s for span in self.spans.values()), default=0.0)


def measure_run(recipe: Recipe, statuses: Sequence[StepStatus], watch: Watch) -> RunTime:
    """Measure the steps of a recipe that are not done, and keep their times in its workspace.

    Raises:
        ConfigError: See ``measure``.
        DataError: See ``measure``.
        StepError: If the workspace cannot be written.
    """
    workspace = Workspace(recipe.workspace)
    finished = {status.step.name: artifact_of(workspace, status.step) for status in statuses if status.state == "done"}
    units = measure(recipe, finished, watch)
    times = step_times(recipe, units)
    save_times(recipe, times, units.crowding)
    return schedule_run(recipe, statuses, times, units.crowding)


def schedule_run(
    recipe: Recipe, statuses: Sequence[StepStatus], times: dict[str, StepTime], crowding: float
) -> RunTime:
    """When the steps that are not done run on this machine."""
    machine = this_machine(crowding)
    spans = plan_spans(recipe, statuses, times, machine)
    todo = [status.step.name for status in statuses if status.state != "done"]
    return RunTime(spans, tuple(name for name in todo if name not in spans), machine)

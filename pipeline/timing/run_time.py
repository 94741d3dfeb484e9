"""The time of a run before it starts: measured, kept for the run's own estimate, and scheduled."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.recipe.estimate import Remaining, remaining_from, save_times
from pipeline.recipe.plan import artifact_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import Machine, this_machine
from pipeline.recipe.status import StepStatus
from pipeline.timing.measure import Watch, measure
from pipeline.timing.units import step_times
from pipeline.workspace.store import Workspace


def measure_run(recipe: Recipe, statuses: Sequence[StepStatus], watch: Watch) -> tuple[Remaining, Machine]:
    """Measure the steps of a recipe that are not done, and keep their times in its workspace.

    Returns:
        When the steps run, and the machine as it was measured.

    Raises:
        ConfigError: See ``measure``.
        DataError: See ``measure``.
        StepError: If the workspace cannot be written.
    """
    workspace = Workspace(recipe.workspace)
    finished = {status.step.name: artifact_of(workspace, status.step) for status in statuses if status.state == "done"}
    todo = [status.step.name for status in statuses if status.state != "done"]
    units = measure(recipe, finished, watch, todo)
    times = {name: value for name, value in step_times(recipe, units).items() if name in todo}
    machine = this_machine(save_times(recipe, times, units.crowding if units.trainings else None))
    return remaining_from(recipe, statuses, times, machine), machine

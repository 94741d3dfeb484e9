"""What a run needs soon, said to Ray's autoscaler while machines still have time to start.

A step's workers ask for machines when it begins, and a machine takes minutes to start. So for a step whose inputs will
be there within that time the run makes a placement group of its workers, which waits until machines have room for it:
Ray's autoscalers see it as demand, and it ends with its driver. (``request_resources`` is one call for a whole cluster
that the next caller replaces, and outlives its driver.) The group is removed when the step begins and asks for itself.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime.placement import amounts_of, cluster_has_roles, room_for, worker_options
from pipeline.workspace.progress import ProgressState


class Soon:
    """The demands of one run.

    Args:
        recipe: The recipe.
        is_cluster: Whether machines may come; a Ray of this run's own has this machine alone.
    """

    def __init__(self, recipe: Recipe, *, is_cluster: bool) -> None:
        self._recipe = recipe
        self._lead_s = recipe.job.boot_s if is_cluster else 0.0
        self._groups: dict[str, list[Any]] = {}
        """By step; none for a step for which the machines were there."""

    def update(self, waiting: Sequence[Step], done: Collection[str], readings: Mapping[str, ProgressState]) -> None:
        """Ask for the machines of the steps whose inputs are done or will be soon.

        Args:
            waiting: Steps that have not begun.
            done: Names of finished steps.
            readings: The newest readings of the running ones, by name.
        """
        soon = {name for name, state in readings.items() if state.has_begun and 0 < state.eta_s < self._lead_s}
        for step in waiting:
            if soon.intersection(step.inputs) and {*step.inputs} <= {*done, *soon} and step.name not in self._groups:
                self._groups[step.name] = self._ask(step)

    def begins(self, name: str) -> None:
        """A step begins: its workers ask for themselves from now on."""
        for group in self._groups.pop(name, []):
            remove_placement_group(group)

    def end(self) -> None:
        """Ask for nothing any more."""
        for name in [*self._groups]:
            self.begins(name)

    def _ask(self, step: Step) -> list[Any]:
        """One group for all workers of a training, which need one another; else one for each worker."""
        resources = getattr(getattr(self._recipe, step.name), "resources", None)
        if resources is None:
            return []
        options = worker_options(step.name, resources, has_roles=cluster_has_roles())
        amounts, labels = amounts_of(options), options.get("label_selector")
        is_training = isinstance(resources, TrainResources)
        number = resources.fewest_workers if is_training else resources.num_workers
        if room_for(options) >= number:
            return []
        together = number if is_training else 1
        selectors: dict[str, Any] = {"bundle_label_selector": [labels] * together} if labels else {}
        return [placement_group([amounts] * together, **selectors) for _ in range(number // together)]

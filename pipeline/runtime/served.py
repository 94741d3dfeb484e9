"""What a server serves: the networks of a recipe as it is now, or those that an alias of the tracker names."""

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.recipe.champion import measured_cascade
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.tracking.aliases import evaluation_of
from pipeline.workspace.store import Artifact

NEIGHBOUR_STEPS = ("download", "embed", "index")


@dataclass(frozen=True)
class Served:
    """Networks, and the recipe that describes them."""

    recipe: Recipe
    artifacts: dict[str, Artifact]
    """The finished steps that a server reads, by name."""
    notes: tuple[str, ...] = ()
    """Lines for people: which version it is, and why there are no neighbours."""


def served_by(recipe: Recipe) -> Served:
    """What a recipe says is to be served; an alias (``serve.networks``) is looked up now.

    Raises:
        ConfigError: If a network is not finished, or there is no such alias.
        StepError: If the tracker does not answer.
    """
    alias = recipe.serve.networks
    if not alias:
        artifacts, why_no_neighbours = served_artifacts(recipe)
        return Served(recipe, artifacts, (why_no_neighbours,) if why_no_neighbours else ())
    version, evaluation = evaluation_of(recipe, alias)
    measured, artifacts = measured_cascade(recipe, evaluation, (*CASCADE_STEPS, *NEIGHBOUR_STEPS))
    missing = [name for name in NEIGHBOUR_STEPS if name not in artifacts]
    notes = [f"{alias} is version {version} of the tracker's model: evaluation {evaluation}"]
    if missing:
        artifacts = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
        notes.append(f"without neighbours: {', '.join(missing)} of that evaluation are not in the workspace any more")
    return Served(measured, artifacts, tuple(notes))


def served_artifacts(recipe: Recipe) -> tuple[dict[str, Artifact], str]:
    """The finished steps of the recipe as it is now, and why there are no neighbours, if there are none.

    Raises:
        ConfigError: If a network is not finished.
    """
    artifacts = finished_artifacts(recipe, CASCADE_STEPS)
    try:
        return artifacts | finished_artifacts(recipe, NEIGHBOUR_STEPS), ""
    except ConfigError as error:
        return artifacts, f"without neighbours: {error}"


def server_name(recipe: Recipe) -> str:
    """Name of the model, its index and its application."""
    return recipe.serve.name or recipe.name

"""What a server serves: the networks of a recipe as it is now, or those that an alias of the tracker names."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property

from pipeline.errors import ConfigError
from pipeline.recipe.champion import measured_cascade
from pipeline.recipe.garbage import in_use_of
from pipeline.recipe.last_run import named_artifacts
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.parts import Tables, read_tables, write_tables
from pipeline.runtime.tracking.aliases import evaluation_of
from pipeline.serve.keeper import Kept
from pipeline.workspace.store import Artifact, Workspace

NEIGHBOUR_STEPS = ("download", "embed", "index")


@dataclass(frozen=True)
class Served:
    """Networks, and the recipe that describes them."""

    recipe: Recipe
    artifacts: dict[str, Artifact]
    """The finished steps that a server reads, by name."""
    version: str = ""
    """Which version has the alias, for people; empty without one."""
    lacks: str = ""
    """Why there are no neighbours, for people; empty if there are."""

    @cached_property
    def tables(self) -> Tables:
        """See ``write_tables``."""
        return write_tables(self.recipe, self.artifacts)

    def remember(self, kept: Kept | None, announce: Callable[[str], None]) -> None:
        """Leave a note of what is served now for the process that comes after this one; say so if that fails."""
        if kept is None:
            return
        try:
            kept.notes.write({"tables": self.tables, "version": self.version, "lacks": self.lacks})
        except OSError as error:
            announce(
                f"no note of what is served could be written ({error}): if this process is killed, the next one serves "
                "what was noted before, or else what the recipe says then"
            )

    def in_use(self, warn: Callable[[str], None]) -> AbstractContextManager[None]:
        """Keep `unclip gc` from removing what is served; ``warn`` receives a sentence if that cannot be done."""
        read = {(name, artifact.key) for name, artifact in self.artifacts.items()}
        # Not by the plan: a machine of a cluster that serves has no list of pairs.
        named = named_artifacts(Workspace(self.recipe.workspace), self.recipe)
        return in_use_of(self.recipe, (), read | named, warn)

    @property
    def facts(self) -> list[str]:
        """What is said of these networks whenever they begin to be served, and of a file that names them."""
        return [fact for fact in (self.version, self.lacks) if fact]

    @property
    def notes(self) -> list[str]:
        """What is said of it at the start."""
        fewest, most = self.recipe.serve.gateway.replicas
        gateway = (
            f"one process speaks HTTP here, serve.gateway.replicas = [{fewest}, {most}] asks for more: write a file "
            "for Ray Serve (unclip serve RECIPE --config-only > serve.yaml), start Ray as its first line says, and "
            "deploy it (serve deploy serve.yaml); on Kubernetes: unclip serve RECIPE --manifest IMAGE"
        )
        return [*self.facts, gateway] if most > 1 else self.facts


def served_by(recipe: Recipe) -> Served:
    """What a recipe says is to be served; an alias (``serve.networks``) is looked up now.

    Raises:
        ConfigError: If a network is not finished, or there is no such alias.
        StepError: If the tracker does not answer.
    """
    alias = recipe.serve.networks
    if not alias:
        artifacts, why_no_neighbours = served_artifacts(recipe)
        return Served(recipe, artifacts, lacks=why_no_neighbours)
    what, evaluation = evaluation_of(recipe, alias)
    measured, artifacts = measured_cascade(recipe, evaluation, (*CASCADE_STEPS, *NEIGHBOUR_STEPS))
    which = f"{alias} is {what}: evaluation {evaluation}"
    missing = ", ".join(name for name in NEIGHBOUR_STEPS if name not in artifacts)
    if not missing:
        return Served(measured, artifacts, which)
    networks = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
    return Served(measured, networks, which, f"without neighbours: not in the workspace any more: {missing}")


def served_anew(recipe: Recipe, served: Served, announce: Callable[[str], None]) -> Served:
    """What a recipe that was read again says is to be served, with ``[serve]`` as at the start.

    Args:
        recipe: As it is now.
        served: What is served.
        announce: Takes a line for each field of ``[serve]`` that has changed.

    Raises:
        UnclipError: As ``served_by``.
    """
    now, at_start = _resolved_serve(recipe), _resolved_serve(served.recipe)
    for name in (field.name for field in fields(now)):
        if getattr(now, name) != getattr(at_start, name):
            announce(f"serve.{name} has changed in the recipe: it holds from the next start on")
    return served_by(replace(recipe, serve=served.recipe.serve))


def _resolved_serve(recipe: Recipe) -> ServeConfig:
    return replace(with_absolute_paths(recipe).serve, name=server_name(recipe))


def served_last(kept: Kept | None) -> Served | None:
    """What the process before this one, which was killed, served last; None if there was none."""
    note = kept.notes.read() if kept is not None else {}
    if not note:
        return None
    recipe, artifacts = read_tables(note["tables"])
    return Served(recipe, artifacts, note["version"], note["lacks"])


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

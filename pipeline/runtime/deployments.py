"""The deployments of a recipe, as Ray Serve's application."""

from importlib.metadata import version
from typing import Any

from ray import serve

from pipeline.recipe.recipe import Recipe
from pipeline.runtime.neighbours import NeighboursReplica
from pipeline.runtime.parts import NEIGHBOURS, networks_options, part_tables, parts_of, write_tables
from pipeline.runtime.replicas import ModelReplica
from pipeline.workspace.store import Artifact


def replica_of(part: str) -> type[Any]:
    """The class of a part's replicas."""
    return NeighboursReplica if part == NEIGHBOURS else ModelReplica


def networks_application(recipe: Recipe, artifacts: dict[str, Artifact]) -> serve.Application:
    """The networks of a recipe as an application of Ray Serve.

    Args:
        recipe: The recipe.
        artifacts: Its finished steps, by name.
    """
    tables = write_tables(recipe, artifacts)

    def bind(part: str, *others: serve.Application) -> serve.Application:
        options = networks_options(recipe.serve, part)
        deployment: Any = serve.deployment(
            replica_of(part), name=part, user_config=part_tables(recipe, tables, part), **options
        )
        # With a version of our own, Ray Serve sees when only the networks changed, and keeps the replicas.
        return deployment.options(version=version("unclip"), _internal=True).bind(*others)

    first, *others = parts_of(recipe)
    return bind(first, *map(bind, others))

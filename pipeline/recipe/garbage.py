"""The artifacts of a workspace that no given recipe needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipe.plan import artifact_of, earlier_trainings, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEPS
from pipeline.workspace.lock import used_artifacts
from pipeline.workspace.store import Workspace


@dataclass(frozen=True)
class Garbage:
    """An artifact that may go."""

    step: str
    key: str
    num_bytes: int
    is_finished: bool


@dataclass(frozen=True)
class Kept:
    """An artifact that stays although no recipe needs it."""

    step: str
    key: str
    why: str


def find_garbage(workspace: Workspace, recipes: Sequence[Recipe]) -> tuple[list[Garbage], list[Kept]]:
    """What may be removed, the largest first; and what stays for another reason than a recipe.

    What a recipe's plan holds is needed, finished or not; so is all that it was made from, the embeddings that an index
    of it reads, be they of another recipe, and the trainings that an unfinished one of it continues.

    Raises:
        ConfigError: If a recipe has another workspace.
        DataError: If a manifest cannot be read: what it needs is not known then.
    """
    needed: set[tuple[str, str]] = set()
    for recipe in recipes:
        if Workspace(recipe.workspace).root != workspace.root:
            raise ConfigError(f"recipe {recipe.name} has another workspace: {recipe.workspace}")
        for step in make_plan(recipe):
            needed.add((step.name, step.key))
            if artifact_of(workspace, step).manifest() is None:
                needed |= {(step.name, key) for key, _ in earlier_trainings(step)}
    needed = _with_inputs(workspace, needed)
    used = used_artifacts(workspace)
    garbage: list[Garbage] = []
    others: list[Kept] = []
    for row in STEPS:
        for key in workspace.keys(row.name):
            if (row.name, key) in needed:
                continue
            if owner := used.get(f"{row.name}/{key}"):
                others.append(Kept(row.name, key, f"in use by {owner}"))
                continue
            artifact = workspace.artifact(row.name, key)
            garbage.append(Garbage(row.name, key, sum(artifact.sizes().values()), artifact.manifest() is not None))
    return sorted(garbage, key=lambda one: -one.num_bytes), others


def remove_garbage(workspace: Workspace, garbage: Sequence[Garbage]) -> None:
    """Remove artifacts; the caller holds the workspace's lock."""
    for one in garbage:
        workspace.artifact(one.step, one.key).destroy()


def _with_inputs(workspace: Workspace, artifacts: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Artifacts and all that they were made from or read."""
    waiting, reached = list(artifacts), set[tuple[str, str]]()
    while waiting:
        step, key = waiting.pop()
        if (step, key) in reached:
            continue
        reached.add((step, key))
        artifact = workspace.artifact(step, key)
        manifest = artifact.manifest()
        if manifest is not None:
            waiting += manifest.inputs.items()
        if step == "index":
            names = [name for name in artifact.names() if name.endswith("/segment.json")]
            sources = [source for name in names for source in _sources(artifact.read_json(name))]
            waiting += [(parts[-2], parts[-1]) for source in sources if len(parts := source.split("/")) >= 2]
    return reached


def _sources(segment: Any) -> list[str]:
    """The embeddings that a segment of an index reads, by their place in the workspace."""
    return list(segment["embedded"]["sources"])

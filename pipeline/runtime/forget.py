"""Forgotten rows leave the files of a workspace; indexes are built anew on Ray."""

from collections.abc import Callable

import ray

from pipeline.recipe.plan import Step, make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.admission import require_room
from pipeline.runtime.connection import own_servers
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.store import Workspace


def finish_forgetting(
    workspace: Workspace, check: Callable[[], None], say: Callable[[str], object], recipe: Recipe | None = None
) -> Pending | None:
    """Rewrite everything that still holds forgotten rows; see ``pipeline.forget.forget.finish``.

    Args:
        workspace: The workspace, locked; Ray is connected if an index has to be built anew.
        check: Raises StepError if the lock was lost.
        say: Is told every half minute, in words, how far it is.
        recipe: The recipe that runs; the resources of its index count for that index.

    Raises:
        StepError: See ``finish``; or if no worker that builds an index can ever start on this machine alone.
    """
    pending = Pending.read(workspace.root)
    if pending is None:
        return None
    # Loaded where there is work: these load torch and faiss, and every run comes by here.
    from pipeline.forget.forget import finish
    from pipeline.runtime import index

    for key in pending.indexes if ray.is_initialized() and own_servers() else ():
        if workspace.artifact("index", key).manifest() is not None:
            require_room(_recipe_of(workspace, key, recipe)[0], ["index"])

    def compact_index(key: str) -> None:
        index.compact(*_recipe_of(workspace, key, recipe), check)

    return finish(workspace, compact_index, check, say)


def _recipe_of(workspace: Workspace, key: str, recipe: Recipe | None) -> tuple[Recipe, Step]:
    """A recipe and its index step for a finished index, whose own recipe may be gone: its manifest has what counts."""
    for step in make_plan(recipe) if recipe else ():
        if recipe and (step.name, step.key) == ("index", key):
            return recipe, step
    manifest = workspace.artifact("index", key).manifest()
    assert manifest is not None
    section = {name: value for name, value in manifest.section.items() if name != "seed"}
    tables = {"workspace": workspace.root, "seed": manifest.section.get("seed", 0), "index": section}
    step = Step("index", manifest.step_version, manifest.section, manifest.inputs)
    return parse_recipe(tables, where=f"{workspace.root}/index/{key}"), step

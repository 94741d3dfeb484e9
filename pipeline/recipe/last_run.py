"""What a recipe was run with last, and the keys of that run's plan: for `unclip gc` and `unclip lineage`.

A later release may not read the recipe of that run, or would plan other keys from it; the keys of its artifacts stay.
"""

import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import DataError
from pipeline.recipe.plan import Step, earlier_trainings, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEP_ROWS, STEPS
from pipeline.recipe.tables import flatten, to_dict, without_resources
from pipeline.workspace.files import is_remote
from pipeline.workspace.lock import locked_workspace
from pipeline.workspace.manifest import parse_record
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]

RESOLVED = "resolved.json"
"""The recipe of the last run with every default, in ``recipes/<name>``."""
PLAN = "plan.json"
"""The plan of that run, beside it."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan."""

    key: str
    inputs: dict[str, str]
    """Key of each input, by step name."""
    section: Json
    continues: tuple[str, ...] = ()
    """Keys of the trainings that it goes on from while it is not finished."""


@dataclass(frozen=True)
class Planned:
    """A recipe's plan, as far as it says which artifacts the recipe needs."""

    steps: dict[str, PlannedStep]
    """By name."""
    named: tuple[tuple[str, str], ...] = field(default=())
    """Step and key of the artifacts of the workspace in which files lie that the recipe names."""

    @property
    def keys(self) -> set[tuple[str, str]]:
        """Step and key of each of its artifacts."""
        return {(name, step.key) for name, step in self.steps.items()}


def planned(recipe: Recipe) -> Planned:
    """The plan of a recipe as it is now.

    Raises:
        ConfigError: See ``make_plan``.
    """
    steps = {step.name: _of(step) for step in make_plan(recipe)}
    return Planned(steps, tuple(sorted(named_artifacts(Workspace(recipe.workspace), recipe))))


def write_last_run(recipe: Recipe) -> None:
    """Keep what a run that begins now is of: first the keys, which `unclip gc` must know.

    Raises:
        ConfigError: See ``make_plan``.
    """
    home = _home(Workspace(recipe.workspace), recipe.name)
    home.write_json(PLAN, asdict(planned(recipe)))
    home.write_json(RESOLVED, to_dict(recipe))


def renew_last_run(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Write what cannot be read of the last run again, for a run that has nothing to do: it is the last one then.

    Nothing is written if what can be read shows another one: who starts a finished recipe again does not mean that what
    was made since may go.

    Args:
        recipe: The recipe, as it is run now.
        warn: Receives a sentence if the lock of a dead process is broken.

    Raises:
        ConfigError: See ``make_plan``.
        StepError: If another run holds the workspace.
    """
    workspace = Workspace(recipe.workspace)
    try:
        read_last_run(workspace, recipe.name)
    except DataError:
        if not changes_since(workspace, recipe):
            with locked_workspace(workspace, warn):
                write_last_run(recipe)


def read_last_run(workspace: Workspace, name: str) -> Planned | None:
    """The plan of the last run of a recipe; None if it was never run here.

    Raises:
        DataError: If the file is damaged, or an older release ran the recipe, which kept no keys.
    """
    home = _home(workspace, name)
    content = home.find_bytes(PLAN)
    if content is None:
        if home.exists(RESOLVED):
            raise DataError(f"{home.uri} has no {PLAN}: an older release ran it")
        return None
    try:
        return parse_record(Planned, json.loads(content))
    except (ValueError, DataError) as error:  # without the advice to move the folder away: the champion is in it, too
        raise DataError(f"{home.uri}/{PLAN}: damaged ({error})") from None


def changes_since(workspace: Workspace, recipe: Recipe) -> Json:
    """The fields that change artifacts of which the last run had other values, by dotted name, as they were then.

    For people: nothing is missed that cannot be read. A field that only one release has is not compared.
    """
    try:
        stored = _home(workspace, recipe.name).read_json(RESOLVED)
    except DataError:
        return {}
    then, now = (_fields_of_steps(tables) for tables in (stored, to_dict(recipe)))
    return {name: then[name] for name, value in now.items() if name in then and then[name] != value}


def named_artifacts(workspace: Workspace, recipe: Recipe, steps: Collection[str] | None = None) -> set[tuple[str, str]]:
    """The artifacts of a workspace in which files lie that a recipe names, in the sections of some steps or of all."""
    sections = [(row, getattr(recipe, row.name)) for row in STEPS if steps is None or row.name in steps]
    paths = [
        str(getattr(one, name))
        for row, section in sections
        if section is not None
        for one in section.each()
        for name in row.files
    ]
    roots = _places(workspace.root)
    inside = [
        place.removeprefix(f"{root}/").split("/")
        for path in paths
        if path
        for place in _places(path)
        for root in roots
        if place.startswith(f"{root}/")
    ]
    return {(parts[0], parts[1]) for parts in inside if len(parts) > 1}


def _home(workspace: Workspace, name: str) -> Artifact:
    return workspace.artifact("recipes", name)


def _fields_of_steps(tables: Json) -> Json:
    fields = flatten(without_resources(tables))
    return {name: value for name, value in fields.items() if name == "seed" or name.partition(".")[0] in STEP_ROWS}


def _of(step: Step) -> PlannedStep:
    return PlannedStep(step.key, step.inputs, step.section, tuple(key for key, _ in earlier_trainings(step)))


def _places(path: str) -> set[str]:
    """Where a path or URI leads: of a local path as it is written, and with its links followed."""
    if is_remote(path):
        return {path.rstrip("/")}
    local = path.removeprefix("file://")
    return {os.path.abspath(local), os.path.realpath(local)}  # noqa: PTH100  (strings, as URIs are)

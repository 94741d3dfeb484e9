"""The recipe as steps, and the artifacts that they read and write.

A step is a pure description. Its key is the hash of the step's version, its section and the keys of its inputs, so a
finished step is never run again and a changed field re-runs only what depends on it.
"""

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipe.initial_files import CHECKPOINTS, missing_files, num_files
from pipeline.recipe.keys import own_tables, sampling_tables, without_added, without_sampling
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import StepSection
from pipeline.recipe.steps import STEPS, StepRow
from pipeline.recipe.tables import flatten, to_dict
from pipeline.recipe.train_sections import is_checkpoint
from pipeline.recipe.user_files import local_inputs
from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.store import MANIFEST, Artifact, UserArtifact, Workspace

Json = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One submittable job: reads the artifacts of its inputs, writes one artifact."""

    name: str
    version: int
    section: Json
    inputs: dict[str, str]
    """Key of each input, by step name."""

    @property
    def key(self) -> str:
        """16 hex digits over everything that can change the artifact's bytes."""
        content = json.dumps([self.name, self.version, self.section, self.inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def make_plan(recipe: Recipe, *, until: str = "") -> list[Step]:
    """The steps of a recipe, each after its inputs.

    Args:
        recipe: A checked recipe.
        until: Last step; the plan holds it and what it needs. Empty: all.

    Raises:
        ConfigError: If ``until`` is no step of this recipe, or a local input does not exist or lacks files.
    """
    steps, fields = dict[str, Step](), flatten(to_dict(recipe))
    for row in STEPS:
        section: StepSection | None = getattr(recipe, row.name)
        if section is None:
            continue
        lists = section.each()
        section = lists[0] if len(lists) == 1 else section  # the only one of several is the same as one alone
        tables = own_tables(section)
        if row.seeded:
            tables["seed"] = recipe.seed
        if len(lists) > 1:
            tables["lists"] = _lists_in_key(row, lists, tables["lists"])
        if row.trains and section.reads_inputs and recipe.pairs.weights:
            tables["list_weights"] = list(recipe.pairs.weights)
        tables |= local_inputs(row, section) | {name: value for name in row.reads if (value := fields[name])}
        tables = tables | sampling_tables(recipe) if row.samples else without_sampling(tables)
        inputs = {name: steps[name].key for name in _inputs_of(row, steps)} if section.reads_inputs else {}
        steps[row.name] = Step(row.name, row.version, tables, inputs)
        _require_whole(recipe, section, steps[row.name])
    return steps_until(list(steps.values()), until)


def _inputs_of(row: StepRow, steps: Mapping[str, Step]) -> list[str]:
    """The inputs of a step among the steps before it."""
    is_imported = "embed" in steps and not steps["embed"].inputs
    return [name for name in row.inputs if name in steps and not (is_imported and name in row.inputs_of_own_rows)]


def steps_until(steps: list[Step], until: str) -> list[Step]:
    """The steps that ``until`` needs, itself included; all steps if ``until`` is empty.

    Raises:
        ConfigError: If ``until`` is no step of the plan.
    """
    if not until:
        return steps
    names = [step.name for step in steps]
    if until not in names:
        raise ConfigError(f"--until {until}: no such step in this recipe; it has {', '.join(names)}")
    needed = {until}
    for step in reversed(steps):
        if step.name in needed:
            needed |= set(step.inputs)
    return [step for step in steps if step.name in needed]


def dependents(steps: Sequence[Step], name: str) -> set[str]:
    """A step and all that are made from it, directly or not, by name."""
    names = {name}
    for step in steps:  # each comes after its inputs
        if names & set(step.inputs):
            names.add(step.name)
    return names


def chosen_steps(steps: list[Step], *, start: str = "", until: str = "", only: str = "") -> tuple[list[Step], set[str]]:
    """The part of a plan that a command works on.

    Args:
        steps: The whole plan.
        start: First step: itself and all that are made from it. Empty: all.
        until: Last step; empty: none.
        only: The only step; empty: as the other two say.

    Returns:
        The steps that may run and those that they read, and the names of the former; the latter must be finished.

    Raises:
        ConfigError: If a name is no step of the plan, or the names leave no step.
    """
    if only and (start or until):
        raise ConfigError("--step: give it alone, without --from and --until")
    for option, name in (("--from", start), ("--step", only)):
        if name and name not in {step.name for step in steps}:
            raise ConfigError(
                f"{option} {name}: no such step in this recipe; it has {', '.join(s.name for s in steps)}"
            )
    names = {only} if only else dependents(steps, start) if start else {step.name for step in steps}
    chosen = names & {step.name for step in steps_until(steps, until)}
    if not chosen:
        raise ConfigError(f"--from {start} --until {until}: no step of this recipe is after one and before the other")
    inputs = {name for step in steps if step.name in chosen for name in step.inputs}
    return [step for step in steps if step.name in chosen | inputs], chosen


def earlier_trainings(step: Step) -> list[tuple[str, int]]:
    """The trainings that a step continues: the same without its last phase, without the last two, and so on.

    Returns:
        Key of each, and the step (of its optimizer) up to which it is the same training.
    """
    phases: list[Json] = step.section.get("train", {}).get("phases", [])
    trainings: list[tuple[str, int]] = []
    for count in reversed(range(len(phases))):
        train = step.section["train"] | {"phases": phases[:count]}
        section = without_added(step.section | {"train": train})
        trainings.append((replace(step, section=section).key, phases[count]["from_step"]))
    return trainings


def artifact_of(workspace: Workspace, step: Step) -> Artifact:
    """The artifact of a step, committed or not."""
    return workspace.artifact(step.name, step.key)


def inputs_of(workspace: Workspace, step: Step) -> dict[str, Artifact]:
    """The artifacts that a step reads, by step name."""
    return {name: workspace.artifact(name, key) for name, key in step.inputs.items()}


def manifest_of(
    step: Step,
    output: Artifact,
    counts: dict[str, int] | None = None,
    *,
    wall_s: float = 0.0,
    records: Mapping[str, ShardRecord] | None = None,
) -> Manifest:
    """The manifest of a step whose files are all written.

    Args:
        step: The step.
        output: The artifact with the files.
        counts: Rows; None if the step has no rows.
        wall_s: Time of the step, in seconds.
        records: The records of all its shards; None: they are read.
    """
    return Manifest(
        step=step.name,
        key=step.key,
        step_version=step.version,
        section=step.section,
        inputs=step.inputs,
        counts=counts or {},
        files=output.describe_files(records),
        wall_s=round(wall_s, 3),
        created=time.time(),
    )


def finished_artifacts(recipe: Recipe, names: Collection[str]) -> dict[str, Artifact]:
    """The artifacts of the named steps, by step name, without the steps that the recipe does not have.

    A network that the recipe uses unchanged needs no run: it is read from its own folder.

    Raises:
        ConfigError: If one is not finished under this recipe; names the command that finishes it.
        DataError: If a manifest cannot be read.
    """
    plan = make_plan(recipe)
    artifacts, missing = _artifacts(recipe, plan, names)
    if missing:
        last = missing[-1]
        makes_all = {step.name for step in steps_until(plan, last)}.issuperset(missing)
        raise ConfigError(
            f"{missing[0]} is not finished under this recipe; first: unclip run RECIPE"
            f"{f' --until {last}' if makes_all else ''}"
        )
    return artifacts


def unfinished_steps(recipe: Recipe, names: Collection[str]) -> list[str]:
    """Those of the named steps that the recipe has and that are not finished, in the order of the plan.

    Raises:
        DataError: If a manifest cannot be read.
    """
    return _artifacts(recipe, make_plan(recipe), names)[1]


def _artifacts(recipe: Recipe, plan: list[Step], names: Collection[str]) -> tuple[dict[str, Artifact], list[str]]:
    """The artifacts of the named steps of a plan, and the names of those that are not finished."""
    workspace, missing = Workspace(recipe.workspace), list[str]()
    artifacts = {step.name: artifact_of(workspace, step) for step in plan if step.name in names}
    for name, artifact in artifacts.items():
        if artifact.manifest() is None:
            folder = getattr(recipe, name).finished_network
            if folder:
                artifacts[name] = UserArtifact(folder if "://" in folder else str(Path(folder).resolve()))
            else:
                missing.append(name)
    return artifacts, missing


def _require_whole(recipe: Recipe, section: StepSection, step: Step) -> None:
    """Refuse a start from a checkpoint of which files are missing; a training that has begun needs them no more.

    Raises:
        ConfigError: Names the first that is missing.
    """
    path: str = getattr(section, "init_from", "")
    missing = missing_files(path) if is_checkpoint(path) else []
    if not missing:
        return
    begun = (MANIFEST, CHECKPOINTS)
    if not any(name.startswith(begun) for name in artifact_of(Workspace(recipe.workspace), step).names()):
        raise ConfigError(
            f"{step.name}: init_from {path} is the first of {num_files(path)} files of a checkpoint, and {missing[0]} "
            f"is not beside it: copy all of {Path(path).stem}.* there, under their names"
        )


def _lists_in_key(row: StepRow, lists: Sequence[StepSection], tables: Sequence[Json]) -> Json:
    """Each list of pairs, by its number from 1; its weight changes none of its rows."""
    return {
        str(number): {name: value for name, value in table.items() if name != "weight"}
        | local_inputs(row, one, f"list {number}: ")
        for number, (one, table) in enumerate(zip(lists, tables, strict=True), 1)
    }

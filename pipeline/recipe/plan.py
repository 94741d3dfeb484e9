"""The recipe as steps: what is done, what remains, and why.

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

from pipeline.addresses import values_without_secrets, without_password
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.appended import notes_on_appended
from pipeline.recipe.continued import made_anew, notes_on_start
from pipeline.recipe.initial_files import CHECKPOINTS, missing_files, num_files
from pipeline.recipe.recipe import SAMPLING, Recipe, flatten, to_dict, without_resources
from pipeline.recipe.sections import StepSection
from pipeline.recipe.steps import STEPS, StepRow
from pipeline.recipe.train_sections import is_checkpoint
from pipeline.workspace.digests import fingerprint, unseen_files
from pipeline.workspace.files import exists
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


@dataclass(frozen=True)
class StepStatus:
    """Where a step stands in a workspace."""

    step: Step
    state: str
    """done, partial (committed shards or checkpoints wait to be continued), todo, or unreadable (it has a manifest that
    cannot be read: a run stops there)."""
    reasons: tuple[str, ...]
    """Why it has to run: the fields that differ from the newest artifact of the step, and from where it starts if that
    is not what one expects; or why it cannot be read. Of a step that is done: why it may have to run again, or what
    else is to be done about it."""
    manifest: Manifest | None


_ADDED_LATER = {
    "model.diffusion.min_snr_floor": 0.0,
    "model.hard_negatives": False,
    "model.pooled_drop_prob": 0.0,
    "model.sketch_px": 0,
    "model.text_adapter": {"depth": 0, "head_width": 32, "mlp_ratio": 4, "code_width": 0, "one_way_heads": False},
    "model.text_adapter.code_width": 0,
    "model.text_adapter.one_way_heads": False,
    "model.diffusion.loss": "simple",
    "model.diffusion.timestep_draws": "uniform",
    "model.image_norm": 1.0,
    "precision": "float32",
    "compiled": False,
    "token_states": False,
    "import_from": "",
    "import_validation_prob": 0.02,
    "train.phases": [],
    "train.shuffle_rows": 200_000,
    "train.num_streams": 1,
    "train.clip_precision": "float32",
    "lists": [],
}
"""Fields added later, by their dotted name in a section, with their old default. A field at its old default is left out
of the key, so that existing trainings stay valid."""

_IN_TRAINING = {"noise_level": 0.0}
"""Sampling fields that were once part of a training's key. The key always holds this default, so that existing
trainings stay valid; another value is part of the evaluation's key only."""


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
        tables = _own_tables(section)
        if row.seeded:
            tables["seed"] = recipe.seed
        if len(lists) > 1:
            tables["lists"] = _lists_in_key(row, lists, tables["lists"])
        if row.trains and section.reads_inputs and recipe.pairs.weights:
            tables["list_weights"] = list(recipe.pairs.weights)
        tables |= _local_inputs(row, section) | {name: value for name in row.reads if (value := fields[name])}
        tables = tables | sampling_tables(recipe) if row.samples else _without_sampling(tables)
        inputs = {name: steps[name].key for name in _inputs_of(row, steps)} if section.reads_inputs else {}
        steps[row.name] = Step(row.name, row.version, tables, inputs)
        _require_whole(recipe, section, steps[row.name])
    return steps_until(list(steps.values()), until)


def _inputs_of(row: StepRow, steps: Mapping[str, Step]) -> list[str]:
    """The inputs of a step among the steps before it."""
    is_imported = "embed" in steps and not steps["embed"].inputs
    return [name for name in row.inputs if name in steps and not (is_imported and name in row.inputs_of_own_rows)]


def recipe_key(recipe: Recipe) -> str:
    """16 hex digits over the settings of all steps: those that can change an artifact or a picture.

    The same recipe has the same key wherever its steps run and its files lie; no file of the user's is read for it.
    """
    tables = {row.name: _own_tables(section) for row in STEPS if (section := getattr(recipe, row.name)) is not None}
    content = json.dumps({"seed": recipe.seed, **tables}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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


def sampling_tables(recipe: Recipe) -> Json:
    """The sampling fields of every trained network that is sampled; the steps that sample depend on them."""
    begun = {row.begins_with for row in STEPS}
    models = {name: to_dict(section)["model"] for name, section in recipe.trained().items() if name not in begun}
    tables = {
        name: {field: model[field] for field in SAMPLING if field in model and _IN_TRAINING.get(field) != model[field]}
        for name, model in models.items()
    }
    return {name: {"model": fields} for name, fields in tables.items() if fields}


def _own_tables(section: StepSection) -> Json:
    """The fields of a section that are part of its step's key, before those that come from elsewhere."""
    return _without_added(without_resources(to_dict(section)))


def _without_added(tables: Json, place: str = "") -> Json:
    """The tables without the fields of ``_ADDED_LATER`` that have their old default."""
    return {
        name: _without_added(value, f"{place}{name}.") if isinstance(value, dict) else value
        for name, value in tables.items()
        if f"{place}{name}" not in _ADDED_LATER or _ADDED_LATER[f"{place}{name}"] != value
    }


def _without_sampling(tables: Json) -> Json:
    """The tables without the sampling fields, because no weight depends on them.

    The analytic sampler stays: the training measures its variance at each sampling step.
    """
    model = tables.get("model", {})
    if not model or model.get("sampler", {}).get("method") == "analytic":
        return tables
    fields = {name: value for name, value in model.items() if name not in SAMPLING}
    return tables | {"model": fields | {name: value for name, value in _IN_TRAINING.items() if name in model}}


def earlier_trainings(step: Step) -> list[tuple[str, int]]:
    """The trainings that a step continues: the same without its last phase, without the last two, and so on.

    Returns:
        Key of each, and the step (of its optimizer) up to which it is the same training.
    """
    phases: list[Json] = step.section.get("train", {}).get("phases", [])
    trainings: list[tuple[str, int]] = []
    for count in reversed(range(len(phases))):
        train = step.section["train"] | {"phases": phases[:count]}
        section = _without_added(step.section | {"train": train})
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


def plan_status(workspace: Workspace, steps: list[Step]) -> list[StepStatus]:
    """The state of every step, with the reasons why it has to run.

    Raises:
        ConfigError: If the workspace's object store cannot be used as it is set.
    """
    workspace.check()
    statuses, inputs, outdated, todo = list[StepStatus](), dict[str, Manifest](), set[str](), set[str]()
    for step in steps:
        artifact = artifact_of(workspace, step)
        try:
            manifest = artifact.manifest()
        except DataError as error:
            statuses.append(StepStatus(step, "unreadable", (str(error),), None))
            continue
        finished = {name: inputs[name] for name in step.inputs if name in inputs and name not in todo}
        if manifest is not None:
            inputs[step.name] = manifest
            anew = made_anew(manifest.input_contents, inputs)
            reasons = tuple(f"{name} was made anew, with other content" for name in anew)
            if not anew:
                made_of = [name for name in step.inputs if name in outdated]
                reasons = tuple(f"runs again if {name}, which is out of date, comes out different" for name in made_of)
            if reasons:
                outdated.add(step.name)
            if step.name == "index":
                reasons += notes_on_appended(artifact, step.inputs, is_made_anew=bool(reasons))
            state = "todo" if anew else "done"
        else:
            earlier, damages = workspace.manifests(step.name)
            reasons = (*(_differences(earlier[0], step) if earlier else ["never run"]), *damages)
            state = "partial" if artifact.names() else "todo"
        if state != "done":
            todo.add(step.name)
            unfinished = [name for name in step.inputs if name not in finished]
            reasons += notes_on_start(artifact, earlier_trainings(step), finished, unfinished)
        statuses.append(StepStatus(step, state, reasons, manifest if state == "done" else None))
    return statuses


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


def unseen_inputs(recipe: Recipe) -> list[str]:
    """A sentence for each of the user's inputs of which the plan knows less than the content."""
    notes: list[str] = []
    for row in STEPS:
        section: StepSection | None = getattr(recipe, row.name)
        if section is None:
            continue
        for path in [path for one in section.each() for path in one.local_paths(row.files).values()]:
            if files_by_size := unseen_files(path, section.known_by_size):
                first = without_password(str(files_by_size[0]))
                files = f"{len(files_by_size)} files, such as {first}," if len(files_by_size) > 1 else first
                notes.append(
                    f"{row.name}: a change of {files} is noticed only by its size: the content is not looked at"
                )
    return notes


def passing_inputs(recipe: Recipe) -> list[str]:
    """A sentence for each checkpoint of a running training that another one starts from: it will be removed.

    The key of the other one holds its content, so there is no plan without it, also when that training has begun.
    """
    return [
        f"{name}: init_from {without_password(path)} is removed when its training is beyond it, and this recipe has no "
        "plan without it: "
        f"{_to_copy(path)} elsewhere and name the copy (the same content goes on with the same training)"
        for name, section in recipe.trained().items()
        if is_checkpoint(path := getattr(section, "init_from", "")) and CHECKPOINTS in path
    ]


def _to_copy(path: str) -> str:
    """The words for copying a checkpoint, all files of it."""
    count = num_files(path)
    return "copy it" if count == 1 else f"copy its {count} files ({Path(path).stem}.*) under their names"


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
        | _local_inputs(row, one, f"list {number}: ")
        for number, (one, table) in enumerate(zip(lists, tables, strict=True), 1)
    }


def _local_inputs(row: StepRow, section: StepSection, where: str = "") -> Json:
    """Fingerprints of the user's files that a section names; in the key they replace the paths."""
    entries: Json = {}
    for name, path in section.local_paths(row.files).items():
        if not exists(path):
            mend = "relative paths start at the folder where you run unclip"
            if name == "init_from" and is_checkpoint(path):
                mend += (
                    ". A training removes its old checkpoints: name a copy (the same content goes on with the same "
                    "training; of a divided state, NUMBER.*, copy all files), another checkpoint, or the folder of a "
                    "network"
                )
            raise ConfigError(f"{row.name}: {where}{path} does not exist; {mend}")
        content = [fingerprint(file, section.known_by_size) for file in section.files_in_key(path)]
        entries |= {name: section.path_in_key(path), row.files[name]: content if len(content) > 1 else content[0]}
    return entries


def _differences(previous: Manifest, step: Step) -> list[str]:
    reasons = [f"{name} changed" for name, key in step.inputs.items() if previous.inputs.get(name) != key]
    if previous.step_version != step.version:
        reasons.append(f"step version {previous.step_version} -> {step.version}")
    defaults = flatten(_ADDED_LATER, f"{step.name}.")  # what a section without these fields was made with
    old, new = (defaults | flatten(section, f"{step.name}.") for section in (previous.section, step.section))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    shown_old, shown_new = values_without_secrets(old), values_without_secrets(new)
    return reasons + [f"{name}: {shown_old.get(name)} -> {shown_new.get(name)}" for name in changed]

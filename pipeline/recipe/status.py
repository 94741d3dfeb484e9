"""Where the steps of a plan stand in a workspace: what is done, what remains, and why."""

from dataclasses import dataclass

from pipeline.addresses import values_without_secrets
from pipeline.errors import DataError
from pipeline.recipe.appended import notes_on_appended
from pipeline.recipe.continued import made_anew, notes_on_start
from pipeline.recipe.keys import ADDED_LATER
from pipeline.recipe.plan import Step, artifact_of, earlier_trainings
from pipeline.recipe.tables import flatten
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Workspace


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


def _differences(previous: Manifest, step: Step) -> list[str]:
    reasons = [f"{name} changed" for name, key in step.inputs.items() if previous.inputs.get(name) != key]
    if previous.step_version != step.version:
        reasons.append(f"step version {previous.step_version} -> {step.version}")
    defaults = flatten(ADDED_LATER, f"{step.name}.")  # what a section without these fields was made with
    old, new = (defaults | flatten(section, f"{step.name}.") for section in (previous.section, step.section))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    shown_old, shown_new = values_without_secrets(old), values_without_secrets(new)
    return reasons + [f"{name}: {shown_old.get(name)} -> {shown_new.get(name)}" for name in changed]

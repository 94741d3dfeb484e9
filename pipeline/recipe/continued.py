"""Whether unfinished work goes on from what is there, or begins anew: what a plan says before, and a run does."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from pipeline.errors import DataError
from pipeline.recipe.initial_files import CHECKPOINTS, KEPT_STATE, steps_of_checkpoints
from pipeline.workspace.manifest import Manifest, has_content
from pipeline.workspace.store import INPUTS, Artifact, Workspace


def made_anew(contents: Mapping[str, str], inputs: Mapping[str, Manifest]) -> list[str]:
    """Names of the inputs that have other content now; one from which rows were forgotten counts as the same."""
    return [name for name in sorted(contents.keys() & inputs.keys()) if not has_content(inputs[name], contents[name])]


def notes_on_start(
    artifact: Artifact,
    earlier: Sequence[tuple[str, int]],
    inputs: Mapping[str, Manifest],
    unfinished: Collection[str],
) -> tuple[str, ...]:
    """What becomes of work that is there when an unfinished step starts, as far as nobody expects it.

    Args:
        artifact: Of the step.
        earlier: The trainings that its phases continue, the nearest first: key and last step that is the same.
        inputs: The finished inputs of the step.
        unfinished: Names of the others.
    """
    try:
        anew = made_anew(artifact.find_json(INPUTS) or {}, inputs)
    except DataError as error:  # a run of this step stops there
        return (str(error),)
    if not anew and (not earlier or _steps_with_state(artifact.names())):  # listed only with phases: it may be long
        return ()
    notes = [f"what it has done is not used: {' and '.join(anew)} was made anew, with other content"] if anew else []
    return (*notes, *(_notes_on_phases(artifact, earlier, inputs, unfinished) if earlier else ()))


def _notes_on_phases(
    artifact: Artifact, earlier: Iterable[tuple[str, int]], inputs: Mapping[str, Manifest], unfinished: Collection[str]
) -> list[str]:
    """From where a training with phases starts that has no checkpoint of its own."""
    root, _, step = artifact.uri.rpartition("/")[0].rpartition("/")
    workspace, notes, refusal = Workspace(root), list[str](), ""
    for key, last_step in earlier:
        other, where = workspace.artifact(step, key), f"{step}/{key}"
        try:
            manifest, names = other.manifest(), other.names()
            contents = (other.find_json(INPUTS) or {}) if manifest is None else manifest.input_contents
        except DataError as error:  # a run stops there
            return [*notes, str(error)]
        if names and (anew := made_anew(contents, inputs)):
            notes.append(f"{where} is not continued: it was trained on another {' and '.join(anew)}, made anew since")
            continue
        steps = _steps_with_state(names)
        if start := max((number for number in steps if number <= last_step), default=0):
            waits_for = [name for name in unfinished if name in contents]
            condition = f", unless {' or '.join(waits_for)} comes out different" if waits_for else ""
            return [*notes, f"continues {where} from step {start}{condition}"]
        if steps:
            return [
                *notes,
                f"cannot continue {where}: its first checkpoint is of step {min(steps)}, later than the phase that "
                f"begins at step {last_step}",
            ]
        if manifest is not None:
            refusal = refusal or (
                f"cannot continue {where}: it is finished and kept no state of its optimizer (resources.keep_state)"
            )
    others = (workspace.artifact(step, key) for key in workspace.keys(step) if key != artifact.key)
    if refusal or notes or any(other.names() for other in others):
        notes.append(refusal or "begins at step 0: there is no training that its phases can continue")
    return notes


def _steps_with_state(names: Collection[str]) -> set[int]:
    """The steps from which a training with these files can go on."""
    return {*steps_of_checkpoints(names, KEPT_STATE), *steps_of_checkpoints(names, CHECKPOINTS)}

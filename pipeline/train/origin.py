"""Where the first weights of a training come from: the training that it continues, and the network that it begins with.

Both are noted when it starts, because either may be gone when it ends, and stand in its manifest: pairs that were
forgotten count along them.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, UnclipError
from pipeline.recipe.initial_files import CHECKPOINTS, key_in
from pipeline.recipe.lineage import exported_network, weights_of
from pipeline.recipe.steps import STEP_ROWS, STEPS
from pipeline.recipe.train_sections import is_checkpoint
from pipeline.workspace.files import is_remote
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import INPUTS, LIVE, MANIFEST, Artifact, Workspace

if TYPE_CHECKING:
    from pipeline.train.assemble import TrainJob

Json = dict[str, Any]

_FILES = {"continued": f"{LIVE}origin.json", "begun_with": f"{LIVE}begun_with.json"}
"""Where a training under way notes what its metrics will have."""
_KEY = re.compile(r"[0-9a-f]{16}")


def source_of(artifact: Artifact) -> Json:
    """Where the weights of a training come from, finished or not: content of its inputs, and its earlier weights."""
    manifest = artifact.manifest()
    if manifest is None:
        contents = artifact.find_json(INPUTS) or {}
        notes = {name: artifact.find_json(file) for name, file in _FILES.items()}
    else:
        contents, notes = manifest.input_contents, {name: manifest.metrics.get(name) for name in _FILES}
    return {"input_contents": contents, **{name: note for name, note in notes.items() if note}}


def note_continued(job: TrainJob, continued: Json) -> None:
    """Note the training that this one continues; empty: it continues none, whatever a killed start has noted."""
    if job.rank == 0 and continued:
        job.output.write_json(_FILES["continued"], continued)
    elif job.rank == 0:
        job.output.remove(_FILES["continued"])


def note_begun_with(job: TrainJob) -> None:
    """Note the network with whose weights this training begins, if with any; empty if it is not known which it is."""
    if job.rank == 0 and ((note := _begun_with(job)) or _init_from(job)):
        job.output.write_json(_FILES["begun_with"], note)


def origin_of(job: TrainJob) -> Json:
    """The training that this one continued, and the network whose weights it began with, for the manifest."""
    notes = {name: job.output.find_json(file) for name, file in _FILES.items()}
    if notes["begun_with"] is None:  # an earlier release has begun it, and where its weights were may not answer now
        with contextlib.suppress(UnclipError):
            notes["begun_with"] = _begun_with(job)
    return {name: note for name, note in notes.items() if note}


def _begun_with(job: TrainJob) -> Json:
    """The network with whose weights a training begins; empty if there is none, or it is another program's."""
    first = job.inputs.get(STEP_ROWS[job.name].begins_with)
    if first is not None:
        return {"name": STEP_ROWS[job.name].begins_with, "key": first.key, **source_of(first)}
    if not (init_from := _init_from(job)):
        return {}
    folder, _, file = init_from.rpartition("/") if is_checkpoint(init_from) else (init_from, "", "")
    return _of_files(folder, file, job)


def _init_from(job: TrainJob) -> str:
    return getattr(job.section, "init_from", "")


def _of_files(folder: str, file: str, job: TrainJob) -> Json:
    """The network of a folder, or of a checkpoint in it, as far as the files say which it is.

    Of a copy the content of its inputs is left out unless the workspace has the same weights: the training of this key
    may have been made anew since.
    """
    place = Artifact(folder if is_remote(folder) else str(Path(folder.removeprefix("file://")).resolve()))
    artifact = Artifact(place.uri.removesuffix(f"/{CHECKPOINTS}".rstrip("/"))) if file else place
    if (manifest := _manifest(artifact)) is not None:
        return {"name": manifest.step, "key": manifest.key, **source_of(artifact)}
    name = artifact.uri.split("/")[-2]
    if name in STEP_ROWS and _KEY.fullmatch(artifact.key):
        is_under_way = artifact.exists(INPUTS) and not artifact.exists(MANIFEST)  # else the manifest is damaged
        return {"name": name, "key": artifact.key, **(source_of(artifact) if is_under_way else {})}
    workspace = Workspace(job.recipe.workspace)
    return _of_copy(place, file, job.name, workspace) if file else _of_export(artifact, workspace)


def _of_copy(folder: Artifact, file: str, step: str, workspace: Workspace) -> Json:
    """The training of which a file is a checkpoint, by its key."""
    key = ""
    with contextlib.suppress(DataError):  # it has gone since the training began
        key = key_in(str(folder.path(file)))
    same = [row.name for row in STEPS if row.trains == STEP_ROWS[step].trains]
    places = [name for name in same if key and workspace.artifact(name, key).names()]
    return {"name": next(iter(places), step), "key": key} if key else {}


def _of_export(folder: Artifact, workspace: Workspace) -> Json:
    """The network of an exported folder."""
    network = None
    with contextlib.suppress(DataError):  # another program's file of this name
        network = exported_network(folder)
    if network is None:
        return {}
    name, key, weights = network
    artifact = workspace.artifact(name, key)
    manifest = _manifest(artifact)
    is_same = manifest is not None and weights == weights_of(manifest)
    return {"name": name, "key": key, **(source_of(artifact) if is_same else {})}


def _manifest(folder: Artifact) -> Manifest | None:
    """The manifest of a folder; None if it has none, another program's, or a damaged one."""
    with contextlib.suppress(DataError):
        return folder.manifest()
    return None

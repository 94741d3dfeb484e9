"""One step as a task of Ray: its submission, its result, and its commit."""

import dataclasses
import importlib
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import psutil
import ray
import ray.exceptions

from pipeline.data.retries import ask_retry, with_former_contents
from pipeline.errors import StepError
from pipeline.recipe.appended import notes_on_appended
from pipeline.recipe.garbage import read_artifacts
from pipeline.recipe.plan import manifest_of
from pipeline.recipe.steps import STEP_ROWS
from pipeline.runtime.calls import failure_of
from pipeline.runtime.connection import are_alive
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.placement import cluster_has_roles, controller_options
from pipeline.runtime.stopping import STOP
from pipeline.runtime.tracking.run import Tracking
from pipeline.runtime.worker_logs import logged
from pipeline.workspace.manifest import Manifest, content_of, has_content
from pipeline.workspace.progress import ERROR, Progress
from pipeline.workspace.store import INPUTS, MANIFEST

_PACKAGES = (
    "unclip",
    "torch",
    "open_clip_torch",
    "ray",
    "pyarrow",
    "img2dataset",
    "numpy",
    "opencv-python-headless",
    "pillow",
)
_STEP_RETRIES = 2


def start_step(context: StepContext, tracking: Tracking, warn: Callable[[str], None]) -> Any:
    """Submit a step; returns Ray's reference to its result.

    Raises:
        StepError: See ``forget_if_inputs_changed``.
    """
    context.output.clear_temporaries()
    forget_if_inputs_changed(context, warn)
    if context.retry_failed and context.step.name == "download":
        ask_retry(context.output, context.retry_failed)  # not in the task, which Ray may start anew when it is done
    for name in (ERROR, STOP):
        context.output.remove(name)
    # Submitted first: to submit to a Ray that is killed at the first sign of progress hangs for a minute.
    reference = run_step.options(**controller_options(has_roles=cluster_has_roles())).remote(context)
    Progress(context.output, waits=True).update(0, 1, "", "starting", force=True)
    tracking.started(context)
    return reference


def forget_if_inputs_changed(context: StepContext, warn: Callable[[str], None] = lambda _: None) -> None:
    """Remove what a step made from other bytes of its inputs, finished or not, and note the bytes of today.

    Args:
        context: The step.
        warn: Receives a sentence for what is not made again with the step.

    Raises:
        StepError: If a living process reads what is to be removed.
    """
    output, manifests = context.output, dict[str, Manifest]()
    for name, artifact in context.inputs.items():
        manifest = artifact.manifest()
        if manifest is not None:
            manifests[name] = manifest
    before: dict[str, str] = output.find_json(INPUTS) or {}
    is_same = before.keys() == manifests.keys() and all(
        has_content(manifests[name], content) for name, content in before.items()
    )
    if output.exists(MANIFEST) or (before and not is_same):
        _clear(context, warn)
    elif before:
        return  # what was begun with rows that were forgotten since keeps their content: its manifest says so
    output.write_json(INPUTS, {name: content_of(manifest) for name, manifest in manifests.items()})


def _clear(context: StepContext, warn: Callable[[str], None]) -> None:
    """Remove what a step made, unless somebody reads it; say how rows that were appended to an index come back."""
    name, output = context.step.name, context.output
    if owner := read_artifacts(context.workspace).get((name, context.step.key)):
        raise StepError(
            f"{name}: it is to be made anew, which would remove what is in use by {owner}; end it, then run again"
        )
    for note in notes_on_appended(output, context.step.inputs, is_made_anew=True) if name == "index" else ():
        warn(f"index: it is built anew: {note}")
    output.clear()


def cancel_step(reference: Any, servers: list[psutil.Process]) -> None:
    """End a step's task; of our own Ray only while its ``servers`` live: the call would hang."""
    if are_alive(servers):
        ray.cancel(reference, force=True)


@ray.remote(num_cpus=0, max_retries=_STEP_RETRIES)
def run_step(context: StepContext) -> StepResult:
    """Run a step by the function that its row names, in a process of its own."""
    module, _, name = STEP_ROWS[context.step.name].runner.partition(":")
    function: Callable[[StepContext], StepResult] = getattr(importlib.import_module(module), name)
    with logged(context.step.name, "controller"):
        return function(context)


def result_of(reference: Any, context: StepContext, ended: Mapping[Any, StepError]) -> StepResult:
    """The result of a step that Ray has finished, or that was ended before.

    Raises:
        UnclipError: What it has failed with, in one line.
    """
    name, output = context.step.name, context.output
    if reference in ended:
        raise ended[reference]
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise failure_of(error, name, output) from None
    except ray.exceptions.RayError as error:
        raise StepError(
            f"{name}: lost its worker {_STEP_RETRIES + 1} times ({type(error).__name__}); "
            f"what it finished is kept in {output.uri}; run again to continue"
        ) from None


def commit_step(context: StepContext, result: StepResult, tracking: Tracking) -> Manifest:
    """Write the manifest of a step that has ended, after the tracker has its result; returns it."""
    step, output = context.step, context.output
    progress = Progress(output, waits=True)
    wall_s, is_training = progress.wall_s, step.name in context.recipe.trained()
    output.learn(result.files)
    manifest = dataclasses.replace(
        manifest_of(step, output, result.counts, wall_s=wall_s, records=output.fold_records()),
        metrics=result.metrics,
        input_contents=output.read_json(INPUTS),
        node_s=round(progress.node_s if is_training else wall_s * result.num_workers, 3),
        num_workers=progress.num_workers if is_training else result.num_workers,
        versions={name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        tracking_run_id=tracking.finished(context, result),
    )
    if step.name == "download":
        manifest = with_former_contents(output, manifest)
    output.commit(manifest)
    return manifest

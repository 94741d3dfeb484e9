"""Run a recipe on Ray: every unfinished step starts when its inputs are done."""

import contextlib
import dataclasses
import importlib
import platform
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import psutil
import ray
import ray.exceptions

from pipeline.errors import ConfigError, DataError, StepError, UnclipError
from pipeline.recipe.estimate import Remaining, load_times, remaining
from pipeline.recipe.garbage import read_artifacts
from pipeline.recipe.lineage import RESOLVED
from pipeline.recipe.plan import Step, StepStatus, artifact_of, dependents, manifest_of, passing_inputs, plan_status
from pipeline.recipe.recipe import Recipe, to_dict
from pipeline.recipe.schedule import needs_of
from pipeline.recipe.steps import STEP_ROWS
from pipeline.runtime.connection import are_alive, connect, own_servers, require_alive
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.forget import finish_forgetting
from pipeline.runtime.head import watched_head
from pipeline.runtime.machines import LONGEST_LOOK_S, Machines
from pipeline.runtime.placement import cluster_has_roles, controller_options, describe, unoffered, worker_options
from pipeline.runtime.retries import ask_retry, waiting_retries
from pipeline.runtime.soon import Soon
from pipeline.runtime.stopping import STOP, STOP_WAIT_S, request_stop
from pipeline.runtime.tracking.run import Tracking, send_waiting
from pipeline.runtime.worker_logs import logged, note_run
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.lock import Lock, locked_workspace
from pipeline.workspace.manifest import Manifest, content_of, has_content
from pipeline.workspace.outage import warnings_to
from pipeline.workspace.progress import ERROR, Progress, ProgressState, duration, read_progress
from pipeline.workspace.store import INPUTS, MANIFEST, Workspace

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
_POLL_S = 0.5
_STEP_RETRIES = 2
_HEAD_START_S = 20.0
_FORECAST_S = 5.0


Admission = Callable[[StepContext, Collection[StepContext]], bool]
"""(step, submitted steps) -> whether to submit it now."""


class Observer(Protocol):
    """Receives the events of a run."""

    def started(self, step: Step) -> None:
        """A step was submitted to Ray."""

    def progressed(self, step: Step, state: ProgressState) -> None:
        """The progress of a running step was read."""

    def remaining(self, rest: Remaining) -> None:
        """The time to go of the whole run was estimated again."""

    def finished(self, step: Step, manifest: Manifest) -> None:
        """A step was committed."""

    def failed(self, step: Step, lost: Collection[str]) -> None:
        """A step failed, and the waiting steps ``lost``, which are made from it, are not run."""

    def warned(self, message: str) -> None:
        """Something went wrong that does not stop the run."""


def run_recipe(
    recipe: Recipe,
    statuses: Sequence[StepStatus],
    observer: Observer,
    *,
    address: str = "",
    retry_failed: str = "",
    force: Collection[str] = (),
) -> None:
    """Run the steps of a recipe that are not done.

    Args:
        recipe: A checked recipe.
        statuses: The steps to finish, and where they stand (``plan_status``).
        observer: Receives starts, readings, commits and warnings.
        address: Ray cluster; empty: one of our own on this machine, ended with the run.
        retry_failed: Class of the download's failures that are tried again, finished or not; empty: none.
        force: Names of steps that are made anew if they are finished; work that is under way goes on.

    Raises:
        ConfigError: If the tracker's address cannot be one, or a server reads what is to be made anew.
        DataError: If a step has a manifest that cannot be read: running it again would replace it.
        StepError: If a step failed, the cluster does not answer, another run holds the workspace, or rows that are to
            be forgotten are being read.
    """
    for status in statuses:
        if status.state == "unreadable":
            raise DataError(status.reasons[0])
    for note in passing_inputs(recipe):
        observer.warned(note)
    workspace = Workspace(recipe.workspace)
    is_all_done = all(status.state == "done" for status in statuses)
    if is_all_done and not retry_failed and not force and Pending.read(workspace.root) is None:
        send_waiting(recipe, workspace, observer.warned)
        return
    with (
        warnings_to(observer.warned),
        locked_workspace(workspace, observer.warned) as lock,
        Tracking(recipe, workspace, observer.warned) as tracking,
        connect(address),
        watched_head(address, observer.warned),
    ):
        workspace.artifact("recipes", recipe.name).write_json(RESOLVED, to_dict(recipe))
        note_run(workspace.root)
        may_start = at_once if address else fits_now
        if finish_forgetting(workspace, lock.check, recipe):
            statuses = plan_status(workspace, [status.step for status in statuses])
        if retry_failed:
            statuses = [_reopened(workspace, status, retry_failed) for status in statuses]
        _tell_retries(workspace, statuses, retry_failed, observer)
        statuses = _to_make_anew(workspace, statuses, force)
        while any(status.state != "done" for status in statuses):
            _run_steps(recipe, workspace, statuses, observer, tracking, may_start, lock, retry_failed)
            # A finished step whose input was made anew with other bytes just now is not done any more.
            statuses, retry_failed = plan_status(workspace, [status.step for status in statuses]), ""


def _run_steps(
    recipe: Recipe,
    workspace: Workspace,
    statuses: Sequence[StepStatus],
    observer: Observer,
    tracking: Tracking,
    may_start: Admission,
    lock: Lock,
    retry_failed: str = "",
) -> None:
    done = {status.step.name for status in statuses if status.state == "done"}
    waiting = [status.step for status in statuses if status.state != "done"]
    running: dict[Any, StepContext] = {}
    failures, notices = list[UnclipError](), dict[str, str]()
    servers = own_servers()
    forecast, waits = _Forecast(recipe, waiting, observer, can_grow=not servers), _Waits(servers)
    # This machine has what it needs, for it has come so far.
    machines, soon = Machines(recipe, () if servers else waiting), Soon(recipe, is_cluster=not servers)
    try:
        while waiting or running:
            require_alive(servers)
            machines.look()
            lock.check()
            for step in [step for step in waiting if set(step.inputs) <= done]:
                context = StepContext(recipe, step, workspace.root, retry_failed=retry_failed)
                if not may_start(context, running.values()):
                    continue
                waiting.remove(step)
                soon.begins(step.name)
                running[_start(context, tracking)] = context
                observer.started(step)
            ready, _ = ray.wait(list(running), timeout=_POLL_S, num_returns=1)
            readings = _readings(running.values(), observer, tracking, notices)
            forecast.update(readings, done)
            soon.update(waiting, done, readings)
            if ready:
                require_alive(servers)  # otherwise every step would report a lost worker
            late = waits.end_late({key: running[key] for key in running.keys() - ready}, readings)
            for reference in [*ready, *late]:
                lock.check()
                context = running.pop(reference)
                try:
                    manifest = _commit(context, _result(reference, context, late), tracking)
                except UnclipError as error:  # what is not made from it goes on
                    machines.look(wait_s=LONGEST_LOOK_S)  # one that has just come may be why
                    lost = dependents(waiting, context.step.name)
                    waiting = [step for step in waiting if step.name not in lost]
                    observer.failed(context.step, lost)
                    failures.append(_noted(error, context, tracking, observer if waiting or running else None))
                else:
                    done.add(context.step.name)
                    observer.finished(context.step, manifest)
    except BaseException as error:  # also Ctrl-C: no step continues without its driver
        if isinstance(error, KeyboardInterrupt):
            _end_trainings(running, observer, tracking, lock)
        for reference, context in running.items():
            _cancel(reference, servers)
            tracking.failed(context)
        raise
    finally:
        soon.end()
    if failures:
        raise type(failures[0])("; and ".join(map(str, failures)))


def _cancel(reference: Any, servers: list[psutil.Process]) -> None:
    if are_alive(servers):
        ray.cancel(reference, force=True)


def _end_trainings(running: dict[Any, StepContext], observer: Observer, tracking: Tracking, lock: Lock) -> None:
    """Let the trainings that have begun write a checkpoint and end; a second Ctrl-C does not wait for it.

    Args:
        running: The running steps, by Ray's reference; those that end are taken out.
        observer: Is told.
        tracking: Is told.
        lock: The workspace's.
    """
    servers = own_servers()
    trainings = [reference for reference, context in running.items() if _is_training(context)]
    for reference in trainings:
        request_stop(running[reference].output)
    if trainings:
        names = ", ".join(running[reference].step.name for reference in trainings)
        observer.warned(f"{names}: ends after a checkpoint; interrupt again to end at once")
    deadline = time.monotonic() + STOP_WAIT_S
    with contextlib.suppress(KeyboardInterrupt):
        while trainings and time.monotonic() < deadline and are_alive(servers):
            ready, trainings = ray.wait(trainings, timeout=_POLL_S)
            for reference in ready:
                context = running.pop(reference)
                try:
                    lock.check()
                    manifest = _commit(context, _result(reference, context, {}), tracking)
                except UnclipError as error:
                    observer.warned(str(error))
                    _noted(error, context, tracking, None)
                else:
                    observer.finished(context.step, manifest)


def _is_training(context: StepContext) -> bool:
    """Whether a step trains just now, so that it can write a checkpoint."""
    state = read_progress(context.output)
    return context.step.name in context.recipe.trained() and state is not None and state.unit == "steps"


def _start(context: StepContext, tracking: Tracking) -> Any:
    """Submit a step; returns Ray's reference to its result."""
    context.output.clear_temporaries()
    _forget_if_inputs_changed(context)
    for name in (ERROR, STOP):
        context.output.remove(name)
    # Submitted first: to submit to a Ray that is killed at the first sign of progress hangs for a minute.
    reference = _run_step.options(**controller_options(has_roles=cluster_has_roles())).remote(context)
    Progress(context.output, waits=True).update(0, 1, "", "starting", force=True)
    tracking.started(context)
    return reference


def _readings(
    running: Collection[StepContext], observer: Observer, tracking: Tracking, notices: dict[str, str]
) -> dict[str, ProgressState]:
    """The newest readings of the running steps, by name, after the observer and the tracker have them.

    Args:
        running: The running steps.
        observer: Is told, and warned once why a step begins again.
        tracking: Is told.
        notices: What the observer was warned of last, by step.
    """
    readings: dict[str, ProgressState] = {}
    for context in running:
        tracking.forward(context)
        state = read_progress(context.output)
        if state:
            readings[context.step.name] = state
            if state.notice and notices.get(context.step.name) != state.notice:
                notices[context.step.name] = state.notice
                observer.warned(f"{context.step.name}: {state.notice}")
            observer.progressed(context.step, state)
    return readings


def _noted(error: UnclipError, context: StepContext, tracking: Tracking, observer: Observer | None) -> UnclipError:
    """Write why a step failed, for `unclip status`; the observer is told at once if other steps go on."""
    if observer is not None:
        observer.warned(f"{error}; the steps that do not read it go on")
    if not context.output.exists(ERROR):
        context.output.write_bytes(ERROR, f"{error}\n".encode())
    tracking.failed(context)
    return error


def _forget_if_inputs_changed(context: StepContext) -> None:
    """Remove what a step made from other bytes of its inputs, finished or not, and note the bytes of today."""
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
        output.clear()
    elif before:
        return  # what was begun with rows that were forgotten since keeps their content: its manifest says so
    output.write_json(INPUTS, {name: content_of(manifest) for name, manifest in manifests.items()})


def _reopened(workspace: Workspace, status: StepStatus, failed_class: str) -> StepStatus:
    """The download as an unfinished step, so that it runs again; its shards stay."""
    if status.step.name != "download":
        return status
    output = artifact_of(workspace, status.step)
    ask_retry(output, failed_class)  # first, so that a run that is stopped here leaves it to the next one
    output.remove(MANIFEST)
    return dataclasses.replace(status, state="partial", manifest=None)


def _tell_retries(workspace: Workspace, statuses: Sequence[StepStatus], retry_failed: str, observer: Observer) -> None:
    """Say which other tries of failed rows this run finishes, for one that was stopped."""
    for status in statuses:
        if status.step.name == "download" and status.state != "done":
            classes = [one for one in waiting_retries(artifact_of(workspace, status.step)) if one != retry_failed]
            if classes:
                observer.warned(f"download: goes on to try failed rows again ({', '.join(classes)}), which was stopped")


def _to_make_anew(workspace: Workspace, statuses: Sequence[StepStatus], force: Collection[str]) -> list[StepStatus]:
    """The statuses with the finished steps of ``force`` as not done: what one has made is removed when it starts."""
    forced = {
        status.step.name: status.step for status in statuses if status.step.name in force and status.state == "done"
    }
    used = read_artifacts(workspace) if forced else {}
    for name, step in forced.items():
        if owner := used.get((name, step.key)):
            raise ConfigError(f"--force: {name} is in use by {owner}; end it first")
    return [
        StepStatus(status.step, "todo", ("it is made anew",), None) if status.step.name in forced else status
        for status in statuses
    ]


class _Forecast:
    """Tells the observer the time to go of the whole run, every few seconds.

    Args:
        recipe: The recipe.
        steps: The steps that are not done.
        observer: Who is told.
        can_grow: Whether machines may join, so that the resources are asked for again each time. A Ray of this run's
            own has those of this machine; asking it would hang for a minute if it were killed at that moment.
    """

    def __init__(self, recipe: Recipe, steps: Sequence[Step], observer: Observer, *, can_grow: bool) -> None:
        self._can_grow = can_grow
        self._resources = ray.cluster_resources()
        self._recipe = recipe
        self._steps = list(steps)
        self._observer = observer
        self._times, self._machine = load_times(recipe, steps)
        self._estimated_at = float("-inf")

    def update(self, readings: Mapping[str, ProgressState], done: Collection[str]) -> None:
        """Estimate again from the readings of the running steps."""
        if time.monotonic() - self._estimated_at < _FORECAST_S:
            return
        self._estimated_at = time.monotonic()
        if self._can_grow:
            self._resources = ray.cluster_resources()
        cpus, gpus = (self._resources.get(name, 0) for name in ("CPU", "GPU"))
        machine = dataclasses.replace(self._machine, cpus=cpus, gpus=gpus)
        steps = [step for step in self._steps if step.name not in done]
        self._observer.remaining(remaining(self._recipe, steps, readings, self._times, machine))


class _Waits:
    """Since when which trainings wait for machines.

    Args:
        servers: The servers of our own Ray.
    """

    def __init__(self, servers: list[psutil.Process]) -> None:
        self._servers = servers
        self._since: dict[str, float] = {}

    def end_late(
        self, running: Mapping[Any, StepContext], readings: Mapping[str, ProgressState]
    ) -> dict[Any, StepError]:
        """End the trainings that have waited for longer than their recipe allows; returns what each waited for.

        Args:
            running: The running steps, by Ray's reference.
            readings: Their newest readings, by name.
        """
        late: dict[Any, StepError] = {}
        for reference, context in running.items():
            name, trained = context.step.name, context.recipe.trained()
            if name not in trained or name not in readings or readings[name].has_begun:
                self._since.pop(name, None)
            elif time.monotonic() - self._since.setdefault(name, time.monotonic()) > trained[name].resources.max_wait_s:
                late[reference] = self._error(context)
                _cancel(reference, self._servers)
        return late

    def _error(self, context: StepContext) -> StepError:
        name = context.step.name
        resources = context.recipe.trained()[name].resources
        options = worker_options(name, resources, has_roles=cluster_has_roles())
        return StepError(
            f"{name}: waited {duration(time.monotonic() - self._since[name])} for {resources.fewest_workers} x "
            f"{describe(options)}{unoffered(options)}. Add machines, or change {name}.resources (label_selector, "
            "num_workers, max_wait_s), and run again: its checkpoints are kept"
        )


def at_once(_context: StepContext, _running: Collection[StepContext]) -> bool:
    """On a cluster, submit every ready step, so that the autoscaler sees the demand."""
    return True


def fits_now(context: StepContext, running: Collection[StepContext]) -> bool:
    """On our own Ray, submit a step when its resources are free, in the order of the plan.

    Ray places waiting tasks in no fixed order; an upsampler that starts before the decoder makes the whole run minutes
    longer.
    """
    return not running or (
        not any(_is_starting(other) for other in running)
        and all(ray.available_resources().get(name, 0) >= amount for name, amount in _needs(context).items())
    )


def _is_starting(context: StepContext) -> bool:
    """Whether a step may soon take resources that seem free."""
    state = read_progress(context.output)
    # A reading of a later time than now was written before the clock went back.
    return state is not None and not state.has_begun and 0 <= time.time() - state.updated < _HEAD_START_S


def _needs(context: StepContext) -> dict[str, float]:
    """Resources that a step needs to begin: of all workers of a training, of one worker of any other step."""
    needs = needs_of(getattr(context.recipe, context.step.name))
    return {"CPU": needs.num_workers * needs.cpus, "GPU": needs.num_workers * needs.gpus}


@ray.remote(num_cpus=0, max_retries=_STEP_RETRIES)
def _run_step(context: StepContext) -> StepResult:
    module, _, name = STEP_ROWS[context.step.name].runner.partition(":")
    function: Callable[[StepContext], StepResult] = getattr(importlib.import_module(module), name)
    with logged(context.step.name, "controller"):
        return function(context)


def _result(reference: Any, context: StepContext, ended: Mapping[Any, StepError]) -> StepResult:
    """The result of a step that Ray has finished, or that was ended before."""
    name, output = context.step.name, context.output
    if reference in ended:
        raise ended[reference]
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UnclipError):
            raise cause from None
        output.write_bytes(ERROR, "".join(traceback.format_exception(error)).encode())
        raise StepError(f"{name}: {type(cause).__name__}: {cause}; details in {output.uri}/{ERROR}") from None
    except ray.exceptions.RayError as error:
        raise StepError(
            f"{name}: lost its worker {_STEP_RETRIES + 1} times ({type(error).__name__}); "
            f"what it finished is kept in {output.uri}; run again to continue"
        ) from None


def _commit(context: StepContext, result: StepResult, tracking: Tracking) -> Manifest:
    step, output = context.step, context.output
    progress = Progress(output, waits=True)
    wall_s, is_training = progress.wall_s, step.name in context.recipe.trained()
    output.learn(result.files)
    manifest = dataclasses.replace(
        manifest_of(step, output, result.counts, wall_s=wall_s, records=output.fold_records()),
        metrics=result.metrics,
        input_contents=output.read_json(INPUTS),
        node_s=round(progress.node_s if is_training else wall_s * result.num_workers, 3),
        versions={name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        tracking_run_id=tracking.finished(context, result),
    )
    output.commit(manifest)
    return manifest

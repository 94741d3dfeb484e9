"""Run a recipe on Ray: every unfinished step starts when its inputs are done."""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray

from pipeline.data.retries import NONE, Before, ask_retry, give_up_retries, waiting_retries
from pipeline.errors import ConfigError, DataError, UnclipError
from pipeline.recipe.garbage import read_artifacts
from pipeline.recipe.last_run import renew_last_run, write_last_run
from pipeline.recipe.plan import Step, artifact_of, dependents, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.status import StepStatus, plan_status
from pipeline.recipe.user_files import passing_inputs
from pipeline.runtime.admission import Admission, Waits, at_once, fits_now, require_room
from pipeline.runtime.connection import are_alive, connect, own_servers, require_alive
from pipeline.runtime.context import StepContext
from pipeline.runtime.forget import finish_forgetting
from pipeline.runtime.head import watched_head
from pipeline.runtime.machines import Machines
from pipeline.runtime.observer import Forecast, Observer
from pipeline.runtime.soon import Soon
from pipeline.runtime.step_task import cancel_step, commit_step, result_of, start_step
from pipeline.runtime.stopping import STOP_WAIT_S, request_stop
from pipeline.runtime.tracking.run import Tracking, send_waiting
from pipeline.runtime.worker_logs import note_run
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.lock import Lock, locked_workspace
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.outage import warnings_to
from pipeline.workspace.progress import ERROR, ProgressState, read_progress
from pipeline.workspace.store import INPUTS, MANIFEST, Workspace

_POLL_S = 0.5


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
        retry_failed: Class of the download's failures that are tried again, finished or not; empty: those that wait
            since a run was stopped; "none": not even those.
        force: Names of steps that are made anew if they are finished; work that is under way goes on.

    Raises:
        ConfigError: If the tracker's address cannot be one, or a server reads what is to be made anew.
        DataError: If a step has a manifest that cannot be read: running it again would replace it.
        StepError: If a step failed, or can never run on this machine alone, the cluster does not answer, another run
            holds the workspace, or rows that are to be forgotten are being read.
    """
    for status in statuses:
        if status.state == "unreadable":
            raise DataError(status.reasons[0])
    for note in passing_inputs(recipe):
        observer.warned(note)
    workspace = Workspace(recipe.workspace)
    is_all_done = all(status.state == "done" for status in statuses)
    if is_all_done and not retry_failed and not force and Pending.read(workspace.root) is None:
        renew_last_run(recipe, observer.warned)
        send_waiting(recipe, workspace, observer.warned)
        return
    with (
        warnings_to(observer.warned),
        locked_workspace(workspace, observer.warned) as lock,
        Tracking(recipe, workspace, observer.warned) as tracking,
        connect(address),
        watched_head(address, observer.warned),
    ):
        if not address:
            names = [*_names_to_run(statuses, retry_failed, force), *_index_to_compact(recipe, workspace)]
            require_room(recipe, list(dict.fromkeys(names)))
        write_last_run(recipe)
        note_run(workspace.root)
        may_start = at_once if address else fits_now
        if work := finish_forgetting(workspace, lock.check, observer.reported, recipe):
            for step, key in work.removals:
                observer.warned(f"{step}/{key} is removed: it had pairs that are forgotten, or may have had")
            statuses = plan_status(workspace, [status.step for status in statuses])
        if retry_failed == NONE:
            _give_up_retries(workspace, statuses)
            retry_failed = ""
        if retry_failed:
            statuses = [_reopened(workspace, status, retry_failed) for status in statuses]
        _tell_retries(workspace, statuses, retry_failed, observer)
        statuses = _to_make_anew(workspace, statuses, force)
        while waiting := _names_to_run(statuses):
            if not address:
                require_room(recipe, waiting)  # also those that the last turn has made necessary
            _run_steps(recipe, workspace, statuses, observer, tracking, may_start, lock, retry_failed)
            # A finished step whose input was made anew with other bytes just now is not done any more.
            statuses, retry_failed = plan_status(workspace, [status.step for status in statuses]), ""


def _names_to_run(statuses: Sequence[StepStatus], retry_failed: str = "", force: Collection[str] = ()) -> list[str]:
    """Names of the steps that are not done, or are to be tried again or made anew."""
    again = {*force, *(["download"] if retry_failed not in {"", NONE} else [])}
    return [status.step.name for status in statuses if status.state != "done" or status.step.name in again]


def _index_to_compact(recipe: Recipe, workspace: Workspace) -> list[str]:
    """The recipe's index, by its step's name, if it is built anew because rows that are forgotten leave it."""
    pending = Pending.read(workspace.root)
    if pending is None or not pending.indexes:
        return []
    return [step.name for step in make_plan(recipe) if step.name == "index" and step.key in pending.indexes]


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
    steps = _Steps(
        [status.step for status in statuses if status.state != "done"],
        {status.step.name for status in statuses if status.state == "done"},
        observer,
        tracking,
    )
    running, notices, servers = steps.running, dict[str, str](), own_servers()
    forecast, waits = Forecast(recipe, steps.waiting, observer, can_grow=not servers), Waits(servers)
    # This machine has what it needs, for it has come so far.
    machines = Machines(recipe, () if servers else steps.waiting, observer.warned)
    soon = Soon(recipe, is_cluster=not servers)
    try:
        while steps.waiting or running:
            require_alive(servers)
            machines.look()
            lock.check()
            for step in [step for step in steps.waiting if set(step.inputs) <= steps.done]:
                context = StepContext(recipe, step, workspace.root, retry_failed=retry_failed, can_grow=not servers)
                if may_start(context, running.values()):
                    soon.begins(step.name)
                    steps.start(context)
            ready, _ = ray.wait(list(running), timeout=_POLL_S, num_returns=1)
            readings = _readings(running.values(), observer, tracking, notices)
            forecast.update(readings, steps.done)
            soon.update(steps.waiting, steps.done, readings)
            if ready:
                require_alive(servers)  # otherwise every step would report a lost worker
            late = waits.end_late({key: running[key] for key in running.keys() - ready}, readings)
            for reference in [*ready, *late]:
                lock.check()
                context = running.pop(reference)
                try:
                    result = result_of(reference, context, late)
                    manifest = commit_step(context, result, tracking)
                except UnclipError as error:
                    steps.fail(machines.explain(error), context)  # one that has just come may be why
                else:
                    steps.finish(context.step, manifest, result.warnings)
    except BaseException as error:  # also Ctrl-C: no step continues without its driver
        if isinstance(error, KeyboardInterrupt):
            _end_trainings(running, observer, tracking, lock)
        for reference, context in running.items():
            cancel_step(reference, servers)
            tracking.failed(context)
        raise
    finally:
        soon.end()
    if steps.failures:
        raise type(steps.failures[0])("; and ".join(map(str, steps.failures)))


@dataclasses.dataclass
class _Steps:
    """Where the steps of a run stand."""

    waiting: list[Step]
    """Those that have not begun."""
    done: set[str]
    """Names of the finished ones."""
    observer: Observer
    tracking: Tracking
    running: dict[Any, StepContext] = dataclasses.field(default_factory=dict[Any, StepContext])
    """By Ray's reference."""
    failures: list[UnclipError] = dataclasses.field(default_factory=list[UnclipError])

    def start(self, context: StepContext) -> None:
        """Start a waiting step; it fails if somebody reads what it made before."""
        self.waiting.remove(context.step)
        try:
            reference = start_step(context, self.tracking, self.observer.warned)
        except UnclipError as error:
            self.fail(error, context)
        else:
            self.running[reference] = context
            self.observer.started(context.step)

    def finish(self, step: Step, manifest: Manifest, warnings: Sequence[str]) -> None:
        """Note that a step is committed, and tell what its result says."""
        self.done.add(step.name)
        self.observer.finished(step, manifest)
        for warning in warnings:
            self.observer.warned(warning)

    def fail(self, error: UnclipError, context: StepContext) -> None:
        """Note that a step failed, and with it all that is made from it; the others go on."""
        behind = dependents(self.waiting, context.step.name)
        self.waiting = [step for step in self.waiting if step.name not in behind]
        self.observer.failed(context.step, behind)
        goes_on = bool(self.waiting or self.running)
        self.failures.append(_noted(error, context, self.tracking, self.observer if goes_on else None))


def _end_trainings(running: dict[Any, StepContext], observer: Observer, tracking: Tracking, lock: Lock) -> None:
    """Let the trainings that have begun write a checkpoint and end; a second Ctrl-C does not wait for it.

    Args:
        running: The running steps, by Ray's reference; those that end are taken out.
        observer: Receives what ends, and why it does.
        tracking: Receives what fails.
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
                    manifest = commit_step(context, result_of(reference, context, {}), tracking)
                except UnclipError as error:
                    observer.warned(str(error))
                    _noted(error, context, tracking, None)
                else:
                    observer.finished(context.step, manifest)


def _is_training(context: StepContext) -> bool:
    """Whether a step trains just now, so that it can write a checkpoint."""
    state = read_progress(context.output)
    return context.step.name in context.recipe.trained() and state is not None and state.unit == "steps"


def _readings(
    running: Collection[StepContext], observer: Observer, tracking: Tracking, notices: dict[str, str]
) -> dict[str, ProgressState]:
    """The newest readings of the running steps, by name, after the observer and the tracker have them.

    Args:
        running: The running steps.
        observer: Receives them, and once why a step begins again.
        tracking: Receives what the steps have measured.
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
    """Write why a step failed, for `unclip status`; the observer receives it at once if other steps go on."""
    if observer is not None:
        observer.warned(f"{error}; the steps that do not read it go on")
    if not context.output.exists(ERROR):
        context.output.write_bytes(ERROR, f"{error}\n".encode())
    tracking.failed(context)
    return error


def _reopened(workspace: Workspace, status: StepStatus, failed_class: str) -> StepStatus:
    """The download as an unfinished step, so that it runs again; its shards stay, unless its pairs are others now."""
    if status.step.name != "download":
        return status
    output = artifact_of(workspace, status.step)
    if (manifest := output.manifest()) is not None:  # it alone says from which pairs the shards were made
        output.write_json(INPUTS, manifest.input_contents)
        Before.of(manifest).write(output)
    ask_retry(output, failed_class)  # before the removal: a run that is stopped behind that leaves it to the next one
    output.remove(MANIFEST)
    return dataclasses.replace(status, state="partial", manifest=None)


def _give_up_retries(workspace: Workspace, statuses: Sequence[StepStatus]) -> None:
    for status in statuses:
        if status.step.name == "download":
            give_up_retries(artifact_of(workspace, status.step))


def _tell_retries(workspace: Workspace, statuses: Sequence[StepStatus], retry_failed: str, observer: Observer) -> None:
    """Say which other tries of failed rows this run finishes, for one that was stopped."""
    for status in statuses:
        if status.step.name == "download" and status.state != "done":
            classes = [one for one in waiting_retries(artifact_of(workspace, status.step)) if one != retry_failed]
            if classes:
                observer.warned(
                    f"download: goes on to try failed rows again ({', '.join(classes)}), which was stopped; "
                    "`--retry-failed none` gives that up, and keeps what came"
                )


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

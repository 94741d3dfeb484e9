"""Which checkpoints of a training stay, which one is continued, and how they are written while it goes on."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Self

import torch.distributed

from pipeline.allocator import is_out_of_memory
from pipeline.errors import ConfigError, ResumeError
from pipeline.recipe.initial_files import CHECKPOINTS, KEPT_STATE, steps_of_checkpoints
from pipeline.train.checkpoint import Checkpoint, DamagedCheckpointError, Snapshot, restore
from pipeline.train.results import read_beside, read_result
from pipeline.train.state import TrainState
from pipeline.workspace.store import Artifact

_SUFFIX = ".safetensors"
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""A minute in all: so long a machine may keep what NFS once told it of a folder."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay while a training runs."""

    num_newest: int = 2
    """The newest ones, at least one."""
    best_by: str = ""
    """Besides them the best of those that were validated, by this measure: of a loss the lowest, of any other measure
    the highest. Empty: none."""


@dataclass(frozen=True)
class Damage:
    """A checkpoint that was passed over."""

    step: int
    reason: str

    @property
    def text(self) -> str:
        """For people."""
        return f"the checkpoint of step {self.step} is damaged ({self.reason})"


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's first file inside its artifact."""
    return f"{CHECKPOINTS}{step:08d}{_SUFFIX}"


def state_name(step: int) -> str:
    """Name of the first file of the state that a finished training keeps."""
    return f"{KEPT_STATE}{step:08d}{_SUFFIX}"


def checkpoint_steps(artifact: Artifact) -> list[int]:
    """The steps of which an artifact has checkpoints, whole or not, the oldest first."""
    return sorted(_committed(artifact, CHECKPOINTS))


def checkpoint_stamps(artifact: Artifact) -> dict[int, str]:
    """What changes when a checkpoint is written again, by its step, of those of ``checkpoint_steps``."""
    stamps = artifact.stamps(CHECKPOINTS)
    return {step: stamps[name] for step, name in sorted(steps_of_checkpoints(stamps, CHECKPOINTS).items())}


def _committed(artifact: Artifact, folder: str) -> dict[int, str]:
    """The first files in a folder, by their step."""
    return steps_of_checkpoints(artifact.names(), folder)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, while the training goes on; one at a time.

    Every worker of a divided state has one and writes its part. No collective runs in the thread: the first worker
    looks for the files of the others. Leaving the block waits for the checkpoint that is being written.

    Args:
        artifact: The artifact of the running step.
        digest: Key of the training: seed, configuration and inputs.
        keep: Which checkpoints stay.
        damaged: Steps of checkpoints that this start has passed over: they are removed when there is a later one.
    """

    def __init__(self, artifact: Artifact, digest: str, keep: Keep, damaged: Collection[int] = ()) -> None:
        self._artifact, self._digest, self._keep, self._damaged = artifact, digest, keep, set(damaged)
        if _rank() == 0:  # before any worker of this start writes: they wait for the attempt
            artifact.clear_temporaries(CHECKPOINTS)
        self._attempt = _shared_by_all(uuid.uuid4().hex)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._ends = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._ends.set()
        if self._thread is not None:
            self._thread.join()

    def save(self, state: TrainState, before: Callable[[int], object] | None = None) -> None:
        """Copy the state, and write it in the background.

        Args:
            state: The state.
            before: Called with its step in the background before it is written; if that fails, there is no checkpoint.

        Raises:
            StepError: If the last checkpoint could not be written.
        """
        self.wait()
        if not _writes(state):
            return
        snapshot = Snapshot.of(state)
        self._thread = threading.Thread(target=self._write, args=(snapshot, before), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            StepError: If it could not be written, for example because the disk is full.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def keep_state(self, state: TrainState, before: Callable[[int], object] | None = None) -> None:
        """Write the state of the last step beside the finished network, now.

        An earlier start may have left one in another number of files: what does not belong to this one is removed, so
        that it is not committed.

        Args:
            state: The state.
            before: Called with its step before it is written.

        Raises:
            StepError: If it could not be written.
        """
        self.wait()
        if _writes(state):
            if before is not None:
                before(state.step)
            snapshot, name = Snapshot.of(state), state_name(state.step)
            snapshot.publish(self._artifact, name, self._digest, self._attempt)
            if snapshot.number == 0:
                kept = {one for one in self._artifact.names() if one.startswith(KEPT_STATE)}
                self._artifact.remove_all(sorted(kept - snapshot.file_names(name)))

    def _write(self, snapshot: Snapshot, before: Callable[[int], object] | None) -> None:
        try:
            if before is not None:
                before(snapshot.step)
            name = checkpoint_name(snapshot.step)
            snapshot.publish(self._artifact, name, self._digest, self._attempt, self._ends.is_set)
            if snapshot.number == 0:
                _remove_others(self._artifact, snapshot.step, self._keep, self._damaged - {snapshot.step})
                self._damaged = {step for step in self._damaged if step > snapshot.step}
        except Exception as error:  # noqa: BLE001  (it is raised where the training waits)
            self._failure = error


def save_checkpoint(state: TrainState, artifact: Artifact, digest: str, keep: Keep) -> None:
    """Publish a state, and remove the checkpoints that are not to be kept; see ``CheckpointWriter``."""
    with CheckpointWriter(artifact, digest, keep) as writer:
        writer.save(state)
        writer.wait()


def _remove_others(artifact: Artifact, step: int, keep: Keep, damaged: Collection[int]) -> None:
    """Remove the checkpoints that are not to be kept, and what is left of those that were never whole.

    Later ones stay, whether they were seen at the start or not: they may be all there is of many days, and one that was
    passed over may be whole after all (a machine with bad memory). Of the earlier ones, those are no newest ones.
    """
    committed = _committed(artifact, CHECKPOINTS)
    earlier = [number for number in sorted(committed) if number <= step and number not in damaged]
    in_validation = read_beside(artifact).running
    stays = {_best_of(artifact, earlier, keep.best_by), in_validation, *earlier[-keep.num_newest :]}
    for number, name in committed.items():
        if number <= step and number not in stays:  # its other files go, or are overwritten
            artifact.remove(name)
    for name in artifact.names():
        number = name.removeprefix(CHECKPOINTS).partition(".")[0]
        if name.startswith(CHECKPOINTS) and number.isdigit() and int(number) < step and int(number) not in stays:
            artifact.remove(name)


def load_newest_checkpoint(
    state: TrainState,
    artifact: Artifact,
    digest: str,
    warn: Callable[[Damage], None] = lambda _: None,
    *,
    last_step: int | None = None,
    instead: str = "",
) -> bool:
    """Continue from the newest whole checkpoint; False if there is none at all. Every worker calls this.

    Args:
        state: The state to load into.
        artifact: The artifact of the running step, or of the training that it continues.
        digest: Key of that training.
        warn: Receives each damaged checkpoint that is passed over.
        last_step: The newest step that may be taken; None: any.
        instead: What a person may do where none is whole; empty: let another step be the last, or start again.

    Raises:
        ResumeError: If a checkpoint belongs to another configuration or does not fit the network, if all of them are
            damaged (the work of days must not start again without a word), all of them are later than ``last_step``, or
            workers see different ones.
        MemoryError, RuntimeError: If memory does not suffice for it; see ``is_out_of_memory``.
    """
    steps, damages = _seen_by_all(artifact), dict[str, str]()
    for step, name in sorted(steps.items(), reverse=True):
        if last_step is not None and step > last_step:
            continue
        where, put, damage = f"{artifact.uri}/{name}", None, ""
        try:
            checkpoint = Checkpoint(artifact, name)
            if checkpoint.digest != digest:
                raise ResumeError(
                    f"{where}: was written under another recipe; bring it back to where it was, or move {artifact.uri} "
                    "away to start again"
                )
            put = restore(state, checkpoint)
        except DamagedCheckpointError as error:
            damage = str(error)
        damage = next(filter(None, _gathered(damage)), "")  # all workers take the same one
        if damage or put is None:
            damages[name] = damage
            warn(Damage(step, damage))
            continue
        try:
            put()
        except RuntimeError as error:
            if is_out_of_memory(error):  # it may pass, or need smaller parts: a start for that has a budget of its own
                raise
            raise ResumeError(f"{where}: does not fit the network: {error}") from error
        return True
    if damages:
        early = "" if last_step is None else f" up to step {last_step}"
        reasons = "; ".join(f"{artifact.uri}/{name}: {damage}" for name, damage in damages.items())
        later = [step for step, name in steps.items() if name not in damages]
        instead = instead or _way_on(artifact, damages, later)
        raise ResumeError(f"no checkpoint{early} is whole: {reasons}; bring one back from a copy, or {instead}")
    if steps:
        raise ResumeError(
            f"{artifact.uri}: its first checkpoint is of step {min(steps)}, later than the phase that begins at step "
            f"{last_step}; let the phase begin there"
        )
    return False


def _way_on(artifact: Artifact, damaged: Collection[str], later: Collection[int]) -> str:
    """What may be done without the checkpoints that are damaged.

    Args:
        artifact: Their artifact.
        damaged: Their names.
        later: The steps of those that are too late for the phase that begins there.
    """
    if later:
        return f"let the phase begin at step {min(later)}, of which there is one"
    folders = sorted({f"{artifact.uri}/{name.rpartition('/')[0]}/" for name in damaged})
    return f"move {' and '.join(folders)} away to start again"


def _seen_by_all(artifact: Artifact) -> dict[int, str]:
    """The first files of the checkpoints, by their step; all workers must continue from the same one.

    Raises:
        ResumeError: If workers see different ones, also after a minute, as they do if the workspace is not shared.
    """
    views = list[str]()
    for wait_s in (*_WAITS_S, None):
        steps = _committed(artifact, KEPT_STATE) | _committed(artifact, CHECKPOINTS)
        views = sorted(set(_gathered(", ".join(map(str, sorted(steps))) or "none")))
        if len(views) == 1:
            return steps
        if wait_s is not None:  # storage over a network shows a file to other machines some seconds later
            time.sleep(wait_s)
    raise ResumeError(
        f"workers see different checkpoints (steps {' and '.join(views)}): put the workspace on storage that all "
        "nodes share"
    )


def require_measure(name: str, measures: Collection[str]) -> None:
    """Refuse a measure that a training does not take.

    Raises:
        ConfigError: Names those that it takes.
    """
    if name not in measures:
        names = ", ".join(measures) or "none, because there are no validation rows"
        raise ConfigError(f"resources.keep_best = {name!r}: the measures of this training are {names}")


def _best_of(artifact: Artifact, steps: list[int], name: str) -> int | None:
    """The best of some checkpoints by a measure, the earliest of equals; None if there is no measure, or no result."""
    if not name:
        return None
    sign = 1 if name.endswith("loss") else -1
    values = {step: sign * float(read_result(artifact, step).get(name, math.nan)) for step in steps}
    numbers = {step: value for step, value in values.items() if not math.isnan(value)}
    return min(numbers, key=lambda step: (numbers[step], step), default=None)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _writes(state: TrainState) -> bool:
    """Whether this worker has a part that no other one writes."""
    return _rank() == 0 if state.sharding is None else state.sharding.writes


def _shared_by_all(value: str) -> str:
    """The first worker's value."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def _gathered(value: str) -> list[str]:
    """The values of all workers."""
    values = [value]
    if torch.distributed.is_initialized():
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values

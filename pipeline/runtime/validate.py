"""Validations beside a training: of each checkpoint that it commits, one at a time, on what is free at that moment.

Workers on CPUs leave nothing free: there a validation shares their CPUs, and gives way to them. A training knows
nothing of its validations and waits for none. A thread beside it looks for new checkpoints and starts a Ray task
for one; the task writes the result, which the training puts into its curves at its next log line. Only the validation
of the finished network is waited for, when the training's own workers are free again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Self

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime.context import StepContext
from pipeline.runtime.lost_workers import machine_of_first
from pipeline.runtime.placement import amounts_of, cluster_has_roles, machine_has, machines_that_stay, worker_options
from pipeline.runtime.stopping import is_stop_requested
from pipeline.runtime.worker_logs import logged
from pipeline.train.results import read_beside, result_steps, write_beside
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

_POLL_S = 2.0
_NICE = 5
"""By how much a validation gives way to the trainings of its machine."""
_MAX_REASON_CHARS = 200
_ENDS = "the run was asked to end"
_RUN_ENDED = "the run ended before it"


@dataclass(frozen=True)
class Task:
    """A validation that was started."""

    step: int
    future: Future[bool]
    """Whether there was a checkpoint to validate."""
    cancel: Callable[[], None]
    begun: float
    """On the monotonic clock."""


class Validations:
    """Which checkpoints of a training are validated, and what became of the others.

    Args:
        output: The artifact of the training.
        start: Starts the validation of a step, which writes its result.
        lacks: What is not free for one now; empty if there is room.
        limit_s: Seconds after which one counts as failed.
    """

    def __init__(
        self, output: Artifact, start: Callable[[int], Task], lacks: Callable[[], str], limit_s: float
    ) -> None:
        # Loaded here, before a thread looks: Ray Train loads torch in this one, and two at once end the process.
        from pipeline.train.resume import checkpoint_stamps

        self._output, self._start, self._lacks, self._limit_s = output, start, lacks, limit_s
        # Of an earlier start: what is free before this one's workers are placed is what they are about to take.
        before, there, results = read_beside(output), checkpoint_stamps(output), result_steps(output)
        failed = before.running not in {-1, *results}
        missed = [] if before.last_look is None else _new_since(there, before.last_look, results)
        self._task: Task | None = None
        self.state = replace(before, running=-1, last_look=there)
        if failed or missed:
            self._note(skipped=len(missed), failed=int(failed), reason=_RUN_ENDED)
        else:
            write_beside(output, self.state)

    def look(self) -> None:
        """Take the result of the running validation if it has one, and start that of the newest new checkpoint.

        Only a checkpoint that has just been committed is validated: then the training has its workers, and nothing is
        taken from it that it waits for. One that is written again, because it was damaged, is a new one.
        """
        from pipeline.train.resume import checkpoint_stamps

        self._collect()
        there, last_look = checkpoint_stamps(self._output), self.state.last_look or {}
        if not _new_since(there, last_look):
            return
        new = _new_since(there, last_look, result_steps(self._output))
        reason = "" if not new else "the one before still ran" if self._task else self._lacks()
        begins = new[-1:] if not reason else []
        fields: Json = {"last_look": there}
        if passed_over := len(new) - len(begins):
            words = reason or "a newer checkpoint was there"
            fields |= {"skipped": self.state.skipped + passed_over, "reason": words}
        if begins:
            self._begin(begins[0], **fields)
        else:
            self._change(**fields)

    def finish(self, last_step: int, wants_end: Callable[[], bool]) -> None:
        """Wait for the running validation, and for that of the finished network, unless the run is asked to end."""
        self._wait(wants_end)
        if last_step in result_steps(self._output):
            return
        if wants_end():
            self._note(skipped=1, reason=_ENDS)
        else:
            self._begin(last_step)
            self._wait(wants_end)

    def end(self, reason: str = _RUN_ENDED) -> None:
        """End the running validation, which counts as failed."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._change(running=-1)
            self._note(failed=1, reason=reason)

    def fails(self, error: Exception) -> None:
        """Say that looking itself has failed, once for each cause."""
        if _reason(error) != self.state.reason:
            self._note(failed=1, reason=_reason(error))

    def _begin(self, step: int, **fields: Any) -> None:
        self._task = self._start(step)
        self._change(running=step, **fields)

    def _wait(self, wants_end: Callable[[], bool]) -> None:
        self._collect()
        while self._task is not None:
            if wants_end():
                self.end(_ENDS)
                return
            left_s = self._task.begun + self._limit_s - time.monotonic()
            with contextlib.suppress(Exception):  # ``_collect`` reads it
                self._task.future.result(timeout=max(0.0, min(left_s, _POLL_S)))
            self._collect()

    def _collect(self) -> None:
        """Read the result of the running validation, or end it after its time."""
        task = self._task
        if task is None:
            return
        if not task.future.done():
            if time.monotonic() - task.begun < self._limit_s:
                return
            task.cancel()
            self._note(failed=1, reason=f"it took more than {self._limit_s:g} s")
        else:
            try:
                if not task.future.result():
                    self._note(skipped=1, reason="a newer checkpoint had replaced it")
            except Exception as error:  # noqa: BLE001  (whatever a validation raises, nobody stops)
                self._note(failed=1, reason=_reason(error))
        self._task = None
        self._change(running=-1)

    def _note(self, *, skipped: int = 0, failed: int = 0, reason: str) -> None:
        self._change(skipped=self.state.skipped + skipped, failed=self.state.failed + failed, reason=reason)

    def _change(self, **fields: Any) -> None:
        self.state = replace(self.state, **fields)
        write_beside(self._output, self.state)


def _new_since(there: Mapping[int, str], last_look: Mapping[int, str], results: Collection[int] = ()) -> list[int]:
    """The steps whose checkpoints were not there as they are now, and that have no result."""
    return [step for step, stamp in there.items() if last_look.get(step) != stamp and step not in results]


class ValidationsBeside:
    """The validations of one training, as Ray tasks, inside a block that trains.

    Args:
        context: The step.
        resources: Of its training.
    """

    def __init__(self, context: StepContext, resources: TrainResources) -> None:
        self._context, self._resources = context, resources
        self._options = validation_options(context.step.name, resources, has_roles=cluster_has_roles())
        self._validations = Validations(context.output, self._start, self._lacks, resources.hang_timeout_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="validations", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._validations.end()

    def finish(self) -> Json:
        """Wait for the validation of the finished network; returns the last measures, and what was left out.

        A validation that fails is counted, and the network is finished without its numbers.
        """
        from pipeline.train.job import MetricsLog

        self._stop.set()
        self._thread.join()
        output, name = self._context.output, self._context.step.name
        last_step = self._context.recipe.trained()[name].train.total_steps
        progress = Progress(output)
        progress.update(last_step, last_step, "steps", "trained; the network is validated", force=True)
        self._validations.finish(last_step, lambda: is_stop_requested(output))
        state = self._validations.state
        text = f"trained; {state.text}" if state.text else "trained"
        progress.update(last_step, last_step, "steps", text, force=True)
        log = MetricsLog(output, last_step)
        log.flush(last_step)
        measures = {name: value for name, value in log.summary().items() if name.startswith("val_")}
        counts = {"num_skipped_validations": state.skipped, "num_failed_validations": state.failed}
        return measures | {name: count for name, count in counts.items() if count}

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._validations.look()
            except Exception as error:  # noqa: BLE001  (an object store that does not answer for once, say)
                with contextlib.suppress(Exception):
                    self._validations.fails(error)

    def _start(self, step: int) -> Task:
        name = f"{self._context.step.name}: validate step {step}"
        options = placed(self._options, machine_of_first(self._context.output))
        reference = _validate.options(name=name, **options).remote(self._context, step)
        return Task(step, reference.future(), lambda: ray.cancel(reference, force=True), time.monotonic())

    def _lacks(self) -> str:
        return lacks(self._options)


def validation_options(step: str, resources: TrainResources, *, has_roles: bool) -> Json:
    """Ray's options for a validation beside a training: on the machines that are there for its workers, too."""
    cpus = 0.0 if resources.shares_cpus_with_validation else resources.cpus_of_validation
    amounts = {"num_cpus": cpus, "num_gpus": resources.validation_gpus}
    labels = worker_options(step, resources, has_roles=has_roles).get("label_selector")
    return amounts | ({"label_selector": labels} if labels else {})


def placed(options: Json, machine: str | None) -> Json:
    """The same options; if they ask for nothing that only a worker's machine has, with that of the first worker.

    A machine without CPUs, such as a head, may have little memory, and Ray would take it for such a task.
    """
    if machine is None or amounts_of(options) or "label_selector" in options:
        return options
    return options | {"scheduling_strategy": NodeAffinitySchedulingStrategy(machine, soft=True)}


def lacks(options: Json) -> str:
    """What no machine has free for a task with these options at this moment; empty if one has room for it."""
    free, amounts = available_resources_per_node(), amounts_of(options)
    rooms = [free.get(node["NodeID"], {}) for node in machines_that_stay() if machine_has(node, amounts, options)]
    if any(all(room.get(name, 0.0) >= amount for name, amount in amounts.items()) for room in rooms):
        return ""
    return f"no machine had {' and '.join(f'{amount:g} {name}' for name, amount in amounts.items())} free"


# A process of its own, because it gives way to others for as long as it lives. It can be tried again because of such
# tasks Ray ends the youngest first when a machine is short of memory: this one, and no worker of the training.
@ray.remote(max_calls=1, max_retries=1)
def _validate(context: StepContext, step: int) -> bool:
    os.nice(_NICE)
    import torch

    from pipeline.networks.cores import use_cores
    from pipeline.train.assemble import TrainJob
    from pipeline.train.validation import validate_beside

    name = context.step.name
    resources = context.recipe.trained()[name].resources
    num_threads = use_cores(resources.cpus_of_validation)
    job = TrainJob(
        name=name,
        recipe=context.recipe,
        inputs=context.inputs,
        output=context.output,
        digest=context.step.key,
        device=torch.device("cuda" if resources.validation_gpus else "cpu"),
        num_threads=num_threads,
    )
    with logged(name, f"validate-{step}"):
        return validate_beside(job, step)


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    line = next((line for line in reversed(str(cause).splitlines()) if line.strip()), "")
    return f"{type(cause).__name__}: {line.strip()}"[:_MAX_REASON_CHARS]

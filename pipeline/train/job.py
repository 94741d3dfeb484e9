"""One network from its first weights, or its newest checkpoint, to its artifact: on one worker, with no Ray."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batch import Batch
from pipeline.data.batches import iterate_batches, plan_order
from pipeline.data.order import Share
from pipeline.data.samples import Samples
from pipeline.errors import ResumeError
from pipeline.networks.diffusion_loss import draws_of
from pipeline.networks.files import num_parameters
from pipeline.recipe.continued import made_anew
from pipeline.train.accumulation import Place
from pipeline.train.assemble import Parts, TrainJob, assemble
from pipeline.train.diagnosis import describe, find_culprits, find_culprits_together, of_all_workers
from pipeline.train.loop import learning_rate, make_step, random_of_step, train
from pipeline.train.origin import note_begun_with, note_continued, origin_of, source_of
from pipeline.train.results import read_beside, read_result, result_steps
from pipeline.train.resume import CheckpointWriter, Damage, Keep, load_newest_checkpoint, require_measure
from pipeline.train.sharding import create_mesh, is_sharded, shard
from pipeline.train.speed import Speed, describe_speed
from pipeline.train.state import TrainState, create_state
from pipeline.train.stop import StoppedError, StopVote, WantsStop, never
from pipeline.train.validation import Validation
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import LIVE, MANIFEST, Artifact

Json = dict[str, Any]
_DAMAGED = f"{LIVE}damaged.json"
_PASSED = f"{LIVE}passed.jsonl"
"""Rows of the curves beyond the checkpoint that a start continued from: if it has passed over a later one that is whole
after all (a machine with bad memory), the next start goes on from there."""
_FLUSH_S = 5.0
Watch = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, message) by rank 0 at every log line."""
Value = TypeVar("Value")
Pulse = Callable[[bool], None]
"""Called with True when a step begins, and with False when something begins that has no steps."""


def _no_pulse(is_step: bool) -> None:
    """Nobody looks whether the training hangs."""


def run_job(job: TrainJob, watch: Watch, wants_stop: WantsStop = never, pulse: Pulse = _no_pulse) -> Json:
    """Train, or continue, and publish the averaged network; every worker of the training calls this.

    Args:
        job: What to train, and which worker this is.
        watch: Receives progress; called on rank 0 only.
        wants_stop: Why this worker's training should end early; see ``pipeline.train.stop``.
        pulse: Receives what this worker is at.

    Returns:
        Metrics: the last losses, parameters, steps; empty on ranks above 0.

    Raises:
        DataError: If the input artifacts are damaged, or hold no row.
        StepError: If more steps than ``max_bad_steps`` are not finite.
        ResumeError: If a checkpoint does not fit, or none is whole.
        StoppedError: If a worker wants to end early: after a checkpoint, on all workers.
    """
    section, is_first = job.section, job.rank == 0
    config, resources = section.train, section.resources
    parts = assemble(job)
    objective, state = start_training(job, parts)
    damages: list[Damage] = []
    log = continue_training(state, job, damages.append)
    note, num_damaged = _note_of_start(state.step, log, damages), _count_damaged(job, damages)
    order = plan_order(parts.train, job.seed, where=job.name, batch_size=config.batch_size)
    share = Share(config.batch_size, job.rank, job.world_size)
    validation = Validation(job, parts.clip, parts.validation)
    writer = CheckpointWriter(job.output, job.digest, _keep(job, parts.validation), [damage.step for damage in damages])
    # Before each checkpoint: what it holds is not trained again, so no later start writes the rows of its curves.
    flush = log.flush if is_first else None

    def report(state: TrainState) -> None:
        if is_first:
            text = log.add_losses(state, learning_rate(config, state.step - 1), speed.read(state.step), job.world_size)
            note_of_skips = f", {int(state.num_bad)} steps not finite and skipped" if state.num_bad else ""
            watch(state.step, config.total_steps, f"{text}{note_of_skips}{log.note}{note}")

    def validate(average: nn.Module | None) -> None:
        """Measure the network, unless others do."""
        if is_first and average is not None and not resources.validates_beside:
            validation.write(average, state.step)

    def save(state: TrainState) -> None:
        is_due = state.step % resources.save_every_steps == 0  # else the training ends early, and may have little time
        validate(state.average if is_due and not resources.validates_beside else None)
        writer.save(state, flush)

    def explain(state: TrainState) -> str:
        number = int(state.bad_step) - 1
        locations = order.locations(number * config.batch_size + share.start, number * config.batch_size + share.stop)
        return _explain(objective, job, number, parts.train.batch(locations))

    if is_first:
        watch(state.step, config.total_steps, f"training{note}")
    speed = Speed(job, state.step)
    vote = StopVote(wants_stop, job.world_size)
    step_fn = make_step(objective, section, share, seed=job.seed, vote=vote)
    reader = iterate_batches(parts.train, order, share, state.step, prefetch=_prefetches(job))
    with writer, closing(reader) as batches:
        steps, aside = _with_pulse(speed.timed(batches), pulse), partial(_aside, pulse)
        train(state, step_fn, steps, config, resources, partial(aside, save), report, partial(aside, explain))
        pulse(False)
        reason = vote.reason() if state.step < config.total_steps else ""
        writer.wait()
        if resources.keep_state and not reason:
            writer.keep_state(state, flush)
    if reason:
        raise _stopped(job, state, log, reason)
    average = state.average
    if not is_first or average is None:
        return {}
    validate(average)
    log.flush(state.step)
    parts.publish(average)
    return log.summary() | _counts(average, state, num_damaged) | origin_of(job)


def _counts(average: nn.Module, state: TrainState, num_damaged: int) -> Json:
    """What a finished training has counted, for the manifest; what never happened is left out."""
    events = {"num_damaged_checkpoints": num_damaged, "num_skipped_steps": int(state.num_bad)}
    counts = {"num_parameters": num_parameters(average), "num_steps": state.step}
    return counts | {name: number for name, number in events.items() if number}


def _with_pulse(batches: Iterator[Batch], pulse: Pulse) -> Iterator[Batch]:
    """The same batches; a step begins when its batch is asked for."""
    while True:
        pulse(True)
        yield next(batches)


def _aside(pulse: Pulse, function: Callable[[TrainState], Value], state: TrainState) -> Value:
    """Call what is no step, however long it takes."""
    pulse(False)
    return function(state)


def _count_damaged(job: TrainJob, damages: list[Damage]) -> int:
    """How many checkpoints this start and those before have passed over, of which a note is left for those after."""
    before = set[int](job.output.find_json(_DAMAGED) or [])
    steps = before | {damage.step for damage in damages}
    if job.rank == 0 and steps != before:
        job.output.write_json(_DAMAGED, sorted(steps))
    return len(steps)


def _note_of_start(step: int, log: MetricsLog, damages: list[Damage]) -> str:
    """What a person should know of where a training begins."""
    if damages:
        return f"; continued from step {step}: {'; '.join(damage.text for damage in damages)}"
    if step == 0 and log.reached:
        return f"; begun at step 0: there is no checkpoint, though the curves reach step {log.reached}"
    return f"; begun at step 0: {log.not_continued}" if step == 0 and log.not_continued else ""


def _stopped(job: TrainJob, state: TrainState, log: MetricsLog, reason: str) -> StoppedError:
    """The end of a training whose last checkpoint is written, and its curves with it."""
    if job.rank == 0:
        log.flush(state.step)
    return StoppedError(state.step, reason)


def start_training(job: TrainJob, parts: Parts) -> tuple[nn.Module, TrainState]:
    """The loss module, in parallel with the other workers', and the state at step 0."""
    resources, config = job.section.resources, job.section.train
    mesh = create_mesh(resources, job.device, job.world_size)
    network = parts.network.to(job.device) if mesh is None else parts.network
    objective, blocks = parts.objective(network).train(), job.kind.blocks(network)
    if resources.compiled:
        for module in job.kind.compiled(network) if mesh is None else blocks:
            module.compile()  # lazily and in place, so that state_dict names do not change
    sharding = None if mesh is None else shard(objective, network, blocks, mesh, config, job.device)
    state = create_state(network if sharding is None else sharding.part, config, job.device, sharding)
    state.draws = draws_of(objective)
    if job.world_size > 1 and sharding is None:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    return objective, state


def _explain(objective: nn.Module, job: TrainJob, number: int, batch: Batch) -> str:
    """Why step ``number`` (0-based) was not finite, of which ``batch`` is this worker's share."""
    config = job.section.train
    share = Share(config.batch_size, job.rank, job.world_size)
    random, place = random_of_step(job.seed, number, share), Place(job.device, config.at(number).precision)
    if is_sharded(objective):
        return describe(of_all_workers(find_culprits_together(objective, batch, random, place, share)))
    bare: nn.Module = objective.module if isinstance(objective, DistributedDataParallel) else objective
    parts = share.parts(job.section.resources.samples_a_pass)
    return describe(of_all_workers(find_culprits(bare, batch, random, place, parts)))


def continue_training(state: TrainState, job: TrainJob, warn: Callable[[Damage], None]) -> MetricsLog:
    """Load the newest checkpoint of this training, or of the one that its last phases continue; returns its metrics.

    A training of other inputs, which were made anew under their keys since, is not continued: what is made from such
    inputs begins anew everywhere.

    Raises:
        DataError: If the manifest of an earlier training, or of an input, cannot be read.
        ResumeError: If a checkpoint does not fit, none is whole, or the earlier training has none that is early enough.
    """
    if load_newest_checkpoint(state, job.output, job.digest, warn):
        return MetricsLog(job.output, state.step)
    note_begun_with(job)
    finished, not_continued = None, list[str]()
    if hasattr(job.section, "init_from"):
        instead = "start from its weights instead: init_from, without phases"
    else:
        instead = "train without phases, from the beginning"
    for earlier in job.earlier:
        source = source_of(earlier.artifact)
        if changed := _changed_since(source["input_contents"], job.inputs):
            not_continued.append(
                f"{earlier.artifact.uri} is not continued: it was trained on another {' and '.join(changed)}, made "
                "anew since"
            )
            continue
        is_finished = earlier.artifact.exists(MANIFEST)
        if load_newest_checkpoint(
            state,
            earlier.artifact,
            earlier.key,
            warn,
            last_step=earlier.last_step,
            instead=instead if is_finished else "",
        ):
            note_continued(job, {"key": earlier.key, "step": state.step, **source})
            return MetricsLog(job.output, state.step, before=earlier.artifact)
        if is_finished:
            finished = finished or earlier
    if finished is not None:
        raise ResumeError(
            f"{finished.artifact.uri}: the training that phases from step {finished.last_step} on would continue is "
            f"finished and kept no state of its optimizer (resources.keep_state); {instead}"
        )
    note_continued(job, {})
    log = MetricsLog(job.output, 0)
    log.not_continued = "; ".join(not_continued)
    return log


def _changed_since(contents: dict[str, str], inputs: dict[str, Artifact]) -> list[str]:
    """Names of the inputs that were made anew since they had these contents."""
    manifests = {name: manifest for name in contents.keys() & inputs.keys() if (manifest := inputs[name].manifest())}
    return made_anew(contents, manifests)


class MetricsLog:
    """``metrics.jsonl``: one row a log line; a resumed run continues it as if it had never stopped.

    One thread may add rows while another one publishes them.

    Args:
        artifact: The artifact of the running step.
        step: Step of the checkpoint that is continued; rows beyond it are dropped.
        before: The artifact whose rows are continued, if it is another one.
    """

    def __init__(self, artifact: Artifact, step: int, before: Artifact | None = None) -> None:
        self._artifact, before = artifact, before or artifact
        rows = _rows(before, METRICS)
        self.reached: int = _last_step(rows)
        """Last step of the curves of the start before."""
        if step > self.reached:
            rows += [row for row in _rows(before, _PASSED) if row["step"] > self.reached]
        first: Json = rows[0] if rows and step else {}
        self._begun: float = first.pop("begun", first.get("time", _now()))  # also where no row is old enough to stay
        self.rows = [row for row in rows if row["step"] <= step] if step else []
        self._passed = [row for row in rows if row["step"] > step] if step and before is artifact else []
        self.not_continued = ""
        """Why no earlier training is continued that is there."""
        self.note = ""
        """What to say of validations that did not take place."""
        self._validated = {row["step"] for row in self.rows if "val_loss" in row}
        self._due = 0.0
        self._lock = threading.Lock()  # of the rows, for a moment
        self._file_lock = threading.Lock()

    def add_losses(self, state: TrainState, rate: float, speed: dict[str, float], workers: int) -> str:
        """Add the mean loss since the last log line, the last gradient norm, rate and speed; returns it in words.

        A loss or a norm that is not finite is left out: JSON has no such numbers, and 0 would be a wrong one.
        """
        total, count = state.loss_sum.tolist()
        row = {"step": state.step, "time": _now()}
        row |= {"loss": total / count} if count else {}
        norm = float(state.grad_norm)
        row |= {"grad_norm": norm} if math.isfinite(norm) else {}
        row |= {"lr": rate, "workers": workers}
        with self._lock:
            self.rows.append(row | {name: float(f"{value:.4g}") for name, value in speed.items()})
        self._flush_if_due(state.step)
        words = f"loss {total / count:.4f}" if count else "no step with a finite loss since the last line"
        return f"{words}, {describe_speed(speed)}"

    def _flush_if_due(self, step: int) -> None:
        """Publish the rows so often that curves are seen as they happen, and writing takes at most 1 % of the time."""
        start = time.monotonic()
        if start >= self._due and self._file_lock.acquire(blocking=False):  # else they are being published
            try:
                self._publish(step)
            finally:
                self._file_lock.release()
            now = time.monotonic()
            self._due = now + max(_FLUSH_S, 100 * (now - start))

    def flush(self, step: int) -> None:
        """Publish all rows, with the results of the validations up to a step, whoever computed them."""
        with self._file_lock:
            self._publish(step)

    def _publish(self, step: int) -> None:
        results = self._new_results(step)
        with self._lock:
            self.rows = sorted((row for row in self.rows + results if len(row) > 2), key=lambda row: row["step"])
            rows = [row | ({} if number else {"begun": self._begun}) for number, row in enumerate(self.rows)]
        self._keep_passed()
        self._artifact.write_bytes(METRICS, _as_lines(rows))

    def _keep_passed(self) -> None:
        """Write the rows beyond the checkpoint aside, once, before the curves are written without them."""
        if self._passed:
            last = _last_step(self._passed)
            rows = self._passed + [row for row in _rows(self._artifact, _PASSED) if row["step"] > last]
            self._artifact.write_bytes(_PASSED, _as_lines(rows))
            self._passed = []

    def _new_results(self, step: int) -> list[Json]:
        numbers = [n for n in result_steps(self._artifact) if n <= step and n not in self._validated]
        results = [{"step": number, **read_result(self._artifact, number)} for number in numbers]
        self._validated.update(numbers)
        text = read_beside(self._artifact).text
        self.note = f"; {text}" if text else ""
        return results

    def summary(self) -> Json:
        """The last loss of each kind, and the last measures."""
        last: Json = {}
        for row in self.rows:
            last |= {name: value for name, value in row.items() if name == "loss" or name.startswith("val_")}
        return last


def _rows(artifact: Artifact, name: str) -> list[Json]:
    """The rows of a file of lines; none if there is no such file."""
    return [json.loads(line) for line in (artifact.find_bytes(name) or b"").decode().splitlines()]


def _as_lines(rows: Sequence[Json]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _last_step(rows: Sequence[Json]) -> int:
    return max((row["step"] for row in rows), default=0)


def _prefetches(job: TrainJob) -> bool:
    """Whether another thread reads ahead: on one core it would only take the time of the training."""
    return job.num_threads > 1 or job.device.type != "cpu"


def _now() -> float:
    """Seconds since the epoch, to a millisecond."""
    return round(time.time(), 3)


def _keep(job: TrainJob, validation: Samples) -> Keep:
    """Which checkpoints stay.

    Raises:
        ConfigError: If the best is to be kept by a measure that the training does not take: now, not after hours.
    """
    resources = job.section.resources
    if resources.keep_best:
        measures = ("val_loss", *(f"val_{name}" for name in job.kind.measures))
        require_measure(resources.keep_best, measures if validation.num_rows else ())
    return Keep(resources.num_checkpoints, resources.keep_best)

"""One network from its first weights, or its newest checkpoint, to its artifact: on one worker, with no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batches import iterate_batches, plan_order
from pipeline.data.order import Share
from pipeline.errors import ResumeError
from pipeline.networks.diffusion_loss import draws_of
from pipeline.networks.files import num_parameters
from pipeline.train.accumulation import Place
from pipeline.train.assemble import TrainJob, assemble
from pipeline.train.checkpoint import (
    Keep,
    load_newest_checkpoint,
    require_measure,
    save_checkpoint,
    state_name,
    write_state,
)
from pipeline.train.diagnosis import describe, find_culprits, of_all_workers
from pipeline.train.loop import learning_rate, make_step, random_of_step, train
from pipeline.train.speed import Speed, describe_speed
from pipeline.train.state import TrainState, create_state
from pipeline.train.validation import Validation
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import LIVE, MANIFEST, Artifact

Json = dict[str, Any]
_ORIGIN = f"{LIVE}origin.json"
_FLUSH_S = 5.0
Watch = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, message) by rank 0 at every log line."""


def run_job(job: TrainJob, watch: Watch) -> Json:
    """Train, or continue, and publish the averaged network; every worker of the training calls this.

    Args:
        job: What to train, and which worker this is.
        watch: Receives progress; called on rank 0 only.

    Returns:
        Metrics: the last losses, parameters, steps; empty on ranks above 0.

    Raises:
        DataError: If the input artifacts are damaged, or hold no row.
        StepError: If more steps than ``max_bad_steps`` are not finite.
        ResumeError: If a checkpoint does not fit, or none is whole.
    """
    section, is_first = job.section, job.rank == 0
    config, resources = section.train, section.resources
    parts = assemble(job)
    state = create_state(parts.network, config, job.device)
    bare = objective = parts.objective(state.network).train()
    state.draws = draws_of(objective)
    damages: list[str] = []
    log = continue_training(state, job, damages.append)
    note = f"; continued from step {state.step}: {'; '.join(damages)}" if damages else ""
    _require_same_step(state)
    if resources.compiled:
        for module in job.kind.compiled(state.network):
            module.compile()  # lazily and in place, so that state_dict names do not change
    if job.world_size > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    order = plan_order(parts.train, job.seed, where=job.name)
    share = Share(config.batch_size, job.rank, job.world_size)
    validation = Validation(job, parts)
    keep = _keep(job, validation, state)

    def report(state: TrainState) -> None:
        if is_first:
            text = log.add_losses(state, learning_rate(config, state.step - 1), speed.read(state.step))
            note_of_skips = f", {int(state.num_bad)} steps not finite and skipped" if state.num_bad else ""
            watch(state.step, config.total_steps, f"{text}{note_of_skips}{note}")

    def save(state: TrainState) -> None:
        if is_first:
            measures = validation(state.ema)
            log.add_validation(state.step, measures)
            log.flush()
            save_checkpoint(state, job.output, job.digest, keep, measures)

    def explain(state: TrainState) -> str:
        first = (int(state.bad_step) - 1) * config.batch_size
        batch = parts.train.batch(order.locations(first + share.start, first + share.stop))
        random = random_of_step(job.seed, int(state.bad_step) - 1, share)
        place = Place(job.device, config.at(int(state.bad_step) - 1).precision)
        divided = share.parts(resources.micro_batch_size)
        return describe(of_all_workers(find_culprits(bare, batch, random, place, divided)))

    if is_first:
        watch(state.step, config.total_steps, f"training{note}")
    speed = Speed(job, state.step)
    step_fn = make_step(objective, section, share, seed=job.seed)
    with closing(iterate_batches(parts.train, order, share, state.step, prefetch=_prefetches(job))) as batches:
        train(state, step_fn, speed.timed(batches), config, resources, save, report, explain)
    if not is_first:
        return {}
    log.add_validation(state.step, validation(state.ema))
    log.flush()
    parts.publish(state.ema)
    if resources.keep_state:
        write_state(state, job.output, state_name(state.step), job.digest)
    counts = {"num_parameters": num_parameters(state.network), "num_steps": state.step}
    events = {"num_damaged_checkpoints": len(damages), "num_skipped_steps": int(state.num_bad)}
    return log.summary() | counts | {name: number for name, number in events.items() if number} | origin_of(job)


def continue_training(state: TrainState, job: TrainJob, warn: Callable[[str], None]) -> MetricsLog:
    """Load the newest checkpoint of this training, or of the one that its last phases continue; returns its metrics.

    Raises:
        ResumeError: If a checkpoint does not fit, none is whole, or the earlier training has none that is early enough.
    """
    if load_newest_checkpoint(state, job.output, job.digest, warn):
        return MetricsLog(job.output, state.step)
    finished = None
    for earlier in job.earlier:
        if load_newest_checkpoint(state, earlier.artifact, earlier.key, warn, last_step=earlier.last_step):
            if job.rank == 0:
                job.output.write_json(_ORIGIN, {"key": earlier.key, "step": state.step})
            return MetricsLog(job.output, state.step, before=earlier.artifact)
        if earlier.artifact.exists(MANIFEST):
            finished = finished or earlier
    if finished is not None:
        instead = (
            "start from its weights instead: init_from, without phases"
            if hasattr(job.section, "init_from")
            else ("train without phases, from the beginning")
        )
        raise ResumeError(
            f"{finished.artifact.uri}: the training that phases from step {finished.last_step} on would continue is "
            f"finished and kept no state of its optimizer (resources.keep_state); {instead}"
        )
    return MetricsLog(job.output, 0)


def origin_of(job: TrainJob) -> Json:
    """The training that this one continued, for the manifest."""
    return {"continued": job.output.read_json(_ORIGIN)} if job.output.exists(_ORIGIN) else {}


class MetricsLog:
    """``metrics.jsonl``: one row a log line; a resumed run continues it as if it had never stopped.

    Args:
        artifact: The artifact of the running step.
        step: Step of the checkpoint that is continued; rows beyond it are dropped.
        before: The artifact whose rows are continued, if it is another one.
    """

    def __init__(self, artifact: Artifact, step: int, before: Artifact | None = None) -> None:
        self._artifact, before = artifact, before or artifact
        lines = before.path(METRICS).read_text(encoding="utf-8").splitlines() if step and before.exists(METRICS) else []
        self.rows: list[Json] = [row for row in map(json.loads, lines) if row["step"] <= step]
        self._due = 0.0

    def add_losses(self, state: TrainState, rate: float, speed: dict[str, float]) -> str:
        """Add the mean loss since the last log line, the last gradient norm, rate and speed; returns it in words."""
        total, count = state.loss_sum.tolist()
        loss = total / max(count, 1)
        row = {"step": state.step, "time": _now(), "loss": loss, "grad_norm": float(state.grad_norm), "lr": rate}
        self.rows.append(row | {name: float(f"{value:.4g}") for name, value in speed.items()})
        self._flush_if_due()
        return f"loss {loss:.4f}, {describe_speed(speed)}"

    def add_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Add loss and measures on the validation split, if there is one; their names begin with ``val_``."""
        if metrics:
            earlier = [row for row in self.rows if row["step"] != step or "loss" in row]  # a run that ended after this
            self.rows = [*earlier, {"step": step, "time": _now(), **metrics}]

    def _flush_if_due(self) -> None:
        """Publish the rows so often that curves are seen as they happen, and writing takes at most 1 % of the time."""
        begun = time.monotonic()
        if begun >= self._due:
            self.flush()
            now = time.monotonic()
            self._due = now + max(_FLUSH_S, 100 * (now - begun))

    def flush(self) -> None:
        """Publish all rows."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        self._artifact.write_bytes(METRICS, text.encode())

    def summary(self) -> Json:
        """The last loss of each kind, and the last measures."""
        last: Json = {}
        for row in self.rows:
            last |= {name: value for name, value in row.items() if name == "loss" or name.startswith("val_")}
        return last


def _prefetches(job: TrainJob) -> bool:
    """Whether another thread reads ahead: on one core it would only take the time of the training."""
    return job.num_threads > 1 or job.device.type != "cpu"


def _now() -> float:
    """Seconds since the epoch, to a millisecond."""
    return round(time.time(), 3)


def _keep(job: TrainJob, validation: Validation, state: TrainState) -> Keep:
    """Which checkpoints stay.

    Raises:
        ConfigError: If the best is to be kept by a measure that the training does not take: now, not after hours.
    """
    resources = job.section.resources
    if job.rank == 0 and resources.keep_best:
        require_measure(resources.keep_best, validation(state.ema))
    return Keep(resources.num_checkpoints, resources.keep_best)


def _require_same_step(state: TrainState) -> None:
    """All workers must continue from the same checkpoint; they cannot if the workspace is not shared.

    Raises:
        ResumeError: If they do not.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    steps = torch.tensor([state.step, -state.step], device=state.bad_step.device)
    torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
    if steps.sum() != 0:
        raise ResumeError(
            f"workers see different checkpoints (steps {-int(steps[1])} and {int(steps[0])}): "
            "put the workspace on storage that all nodes share"
        )

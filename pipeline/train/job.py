"""One network from its first weights, or its newest checkpoint, to its artifact: on one worker, with no Ray."""

from __future__ import annotations

import json
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
from pipeline.train.assemble import TrainJob, assemble
from pipeline.train.loop import learning_rate, make_step, train
from pipeline.train.state import TrainState, create_state, load_newest_checkpoint, save_checkpoint
from pipeline.train.validation import Validation
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Artifact

Json = dict[str, Any]
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
        StepError: If a loss is not finite.
        ResumeError: If a checkpoint does not fit.
    """
    section, is_first = job.section, job.rank == 0
    config, resources = section.train, section.resources
    parts = assemble(job)
    state = create_state(parts.network, config, job.device)
    objective = parts.objective(state.network).train()
    state.draws = draws_of(objective)
    load_newest_checkpoint(state, job.output, job.digest)
    _require_same_step(state)
    if resources.compiled:
        for module in job.kind.compiled(state.network):
            module.compile()  # lazily and in place, so that state_dict names do not change
    if job.world_size > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    order = plan_order(parts.train, job.seed, where=job.name)
    share = Share(config.batch_size, job.rank, job.world_size)
    prefetch = job.num_threads > 1 or job.device.type != "cpu"
    log = MetricsLog(job.output, state.step)
    validation = Validation(job, parts)

    def report(state: TrainState) -> None:
        if is_first:
            loss = log.add_losses(state, learning_rate(config, state.step - 1))
            watch(state.step, config.num_steps, f"loss {loss:.4f}")

    def save(state: TrainState) -> None:
        if is_first:
            log.add_validation(state.step, validation(state.ema))
            log.flush()
            save_checkpoint(state, job.output, job.digest, resources.num_checkpoints)

    if is_first:
        watch(state.step, config.num_steps, "training")
    step_fn = make_step(objective, section, share, seed=job.seed)
    with closing(iterate_batches(parts.train, order, share, state.step, prefetch=prefetch)) as batches:
        train(state, step_fn, batches, config, resources, save, report)
    if not is_first:
        return {}
    log.add_validation(state.step, validation(state.ema))
    log.flush()
    parts.publish(state.ema)
    return log.summary() | {"num_parameters": num_parameters(state.network), "num_steps": state.step}


class MetricsLog:
    """``metrics.jsonl``: one row a log line; a resumed run continues it as if it had never stopped.

    Args:
        artifact: The artifact of the running step.
        step: Step of the checkpoint that is continued; rows beyond it are dropped.
    """

    def __init__(self, artifact: Artifact, step: int) -> None:
        self._artifact = artifact
        lines = (
            artifact.path(METRICS).read_text(encoding="utf-8").splitlines() if step and artifact.exists(METRICS) else []
        )
        self.rows: list[Json] = [row for row in map(json.loads, lines) if row["step"] <= step]

    def add_losses(self, state: TrainState, rate: float) -> float:
        """Add the mean loss since the last log line, with the last gradient norm and rate; returns the loss."""
        total, count = state.loss_sum.tolist()
        loss = total / max(count, 1)
        self.rows.append({"step": state.step, "loss": loss, "grad_norm": float(state.grad_norm), "lr": rate})
        return loss

    def add_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Add loss and measures on the validation split, if there is one; their names begin with ``val_``."""
        if metrics:
            self.rows.append({"step": step, **metrics})

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

"""The training loop in plain torch: it knows no model and no Ray. The step function is passed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.diffusion.noise import derive_seed
from models.layers.ema import update_average
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.errors import StepError
from pipeline.networks.diffusion_loss import diffusion_losses_of
from pipeline.recipe.recipe import TrainedSection
from pipeline.recipe.train_sections import TrainConfig, TrainResources
from pipeline.train.accumulation import Place, make_accumulate
from pipeline.train.state import TrainState
from pipeline.train.stop import StopVote, never

StepFunction = Callable[[TrainState, Batch], None]


def train(
    state: TrainState,
    step_fn: StepFunction,
    batches: Iterator[Batch],
    config: TrainConfig,
    resources: TrainResources,
    save: Callable[[TrainState], None],
    report: Callable[[TrainState], None],
    explain: Callable[[TrainState], str] = lambda _: "",
) -> None:
    """Train from ``state.step`` to the end, or to the step after which all workers have agreed to end.

    Args:
        state: The state of the training.
        step_fn: One optimizer step; see ``make_step``.
        batches: Batches from step ``state.step`` on.
        config: Number of steps.
        resources: Steps between logs and saves.
        save: Called between steps, every ``save_every_steps`` and when the workers end early, not after the last.
        report: Called every ``log_every_steps`` and after the last step; reads the device.
        explain: Says where a step was not finite.

    Raises:
        StepError: If more steps than ``max_bad_steps`` were not finite; names the step, which changed no weight.
    """
    while state.step < config.total_steps and not state.ends:
        step_fn(state, next(batches))  # forward, backward, finite check, clip, optimizer, average
        state.step += 1
        is_last = state.step == config.total_steps
        saves = (state.ends or state.step % resources.save_every_steps == 0) and not is_last
        logs = state.step % resources.log_every_steps == 0 or is_last
        if saves or logs or state.bad_step.device.type == "cpu":
            require_finite(state, explain)  # on a GPU this waits for it, so not at every step
        if logs:
            report(state)
            state.loss_sum.zero_()
        if saves:
            save(state)


def make_step(
    objective: nn.Module, section: TrainedSection, share: Share, *, seed: int, vote: StopVote | None = None
) -> StepFunction:
    """The step function of one training.

    A step whose loss or gradient is not finite updates nothing, and once there were more of them than
    ``max_bad_steps``, neither do later steps. The check runs on the device; ``require_finite`` reads its result.

    Args:
        objective: (batch, random numbers) -> mean loss of the samples; wrapped for data parallelism where needed.
        section: Optimisation, and the largest part of the batch that is worked off at a time.
        share: This worker's share of the global batch.
        seed: Seed of the training's random numbers.
        vote: How the workers agree to end early; None: they never do.
    """
    config, vote = section.train, vote or StopVote(never, share.world_size)
    accumulate = make_accumulate(objective, share, section.resources.samples_a_pass)
    losses = diffusion_losses_of(objective)
    depends_on_buckets = isinstance(objective, DistributedDataParallel) and share.world_size > 2

    def lay_out_buckets(state: TrainState, batch: Batch, place: Place) -> None:
        """Take a pass that changes nothing, behind which torch lays out its buckets as gradients come.

        Where a ring of three or more workers begins to add up a number depends on its place in its bucket. Without
        this pass the first step of a start would be rounded in another way than if the training had not stopped.
        """
        statistics = statistics_of(state.network)
        before = [buffer.clone() for buffer in statistics]
        accumulate(batch, random_of_step(seed, state.step, share), place)
        for diffusion_loss in losses:
            diffusion_loss.forget_step()
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
        state.optimizer.zero_grad(set_to_none=True)

    def step(state: TrainState, batch: Batch) -> None:
        nonlocal depends_on_buckets
        random = random_of_step(seed, state.step, share)
        now = config.at(state.step)
        if depends_on_buckets:
            lay_out_buckets(state, batch, Place(state.bad_step.device, now.precision))
            depends_on_buckets = False
        statistics = statistics_of(state.network) if section.resources.max_bad_steps else []
        before = [buffer.clone() for buffer in statistics]
        loss = accumulate(batch, random, Place(state.bad_step.device, now.precision))
        for diffusion_loss in losses:
            diffusion_loss.end_step(share)
        loss = vote.add_up(loss)
        state.ends = vote.is_decided
        state.clip_gradients(now.grad_clip_norm)
        skips = _note(state, loss, section.resources.max_bad_steps)
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(skips, value, buffer))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        may_skip = section.resources.max_bad_steps > 0
        update_average(state.average_pairs, config.ema_decay, state.step + 1, skips if may_skip else None)

    return step


def statistics_of(network: nn.Module) -> list[Tensor]:
    """The running statistics of batch norms, which a forward pass changes and not the optimizer."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [buffer for module in network.modules() if isinstance(module, norms) for buffer in module.buffers()]


def random_of_step(seed: int, step: int, share: Share) -> SampleRandom:
    """Everything random of a worker's samples in one step (0-based); a resumed run repeats it."""
    return SampleRandom.of_samples(derive_seed(seed, f"train/{step}"), range(share.start, share.stop))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate in step ``step`` (0-based): a linear rise, then constant or half a cosine down to zero."""
    now, (start, warmup_steps) = config.at(step), config.schedule_at(step)
    num_steps_taken = step - start
    if num_steps_taken < warmup_steps:
        return now.learning_rate * (num_steps_taken + 1) / warmup_steps
    if now.lr_schedule == "constant":
        return now.learning_rate
    share = (num_steps_taken - warmup_steps) / max(1, now.num_steps - start - warmup_steps)
    return now.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def require_finite(state: TrainState, explain: Callable[[TrainState], str]) -> None:
    """Stop a training after more steps than allowed whose loss or gradient was not finite.

    Raises:
        StepError: Names the step; no weight was changed by it.
    """
    bad_step = int(state.bad_step)
    if bad_step >= 0:
        skips = int(state.num_bad) - 1
        before = f", after {skips} that were skipped" if skips else ""
        phase = f" in a phase (train.phases, from_step = {bad_step - 1})" if bad_step > 1 else ""
        raise StepError(
            f"step {bad_step}: loss or gradient is not finite (gradient norm {float(state.grad_norm):g}){before}"
            f"{explain(state)}; no weight was changed by it. Change learning_rate or precision{phase}, or skip such "
            f"steps (resources.max_bad_steps = {skips + 10})"
        )


def _note(state: TrainState, loss: Tensor, max_bad_steps: int) -> Tensor:
    """Add up the loss, and let the optimizer skip this step (on the device) if it or an earlier stop is not finite.

    Returns:
        Whether it skips, a bool of shape ().
    """
    is_bad = ~(torch.isfinite(loss) & torch.isfinite(state.grad_norm))
    stopped = state.bad_step >= 0
    state.num_bad = state.num_bad + (is_bad & ~stopped)
    stops = is_bad & ~stopped & (state.num_bad > max_bad_steps)
    state.bad_step = torch.where(stops, state.step + 1, state.bad_step)
    terms = torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    state.loss_sum += torch.where(is_bad, 0.0, terms)
    # The fused AdamW looks for these two attributes, which torch's GradScaler sets, and skips its step by the second.
    optimizer: Any = state.optimizer
    optimizer.grad_scale, optimizer.found_inf = None, (is_bad | stopped).float()
    return is_bad | stopped

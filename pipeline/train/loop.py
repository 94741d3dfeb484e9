"""The training loop in plain torch: it knows no model and no Ray. The step function is passed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from models.diffusion.noise import derive_seed
from models.layers.ema import update_average
from models.sample_random import SampleRandom
from pipeline.data.batches import Batch
from pipeline.data.order import Share
from pipeline.errors import StepError
from pipeline.networks.diffusion_loss import diffusion_losses_of
from pipeline.recipe.recipe import TrainedSection
from pipeline.recipe.sections import TrainConfig, TrainResources
from pipeline.train.accumulation import make_accumulate
from pipeline.train.state import TrainState

StepFunction = Callable[[TrainState, Batch], None]


def train(
    state: TrainState,
    step_fn: StepFunction,
    batches: Iterator[Batch],
    config: TrainConfig,
    resources: TrainResources,
    save: Callable[[TrainState], None],
    report: Callable[[TrainState], None],
) -> None:
    """Train from ``state.step`` to the end.

    Args:
        state: The state of the training.
        step_fn: One optimizer step; see ``make_step``.
        batches: Batches from step ``state.step`` on.
        config: Number of steps.
        resources: Steps between logs and saves.
        save: Called between steps, every ``save_every_steps``, not after the last.
        report: Called every ``log_every_steps`` and after the last step; reads the device.

    Raises:
        StepError: If a loss or gradient is not finite; names the step, which changed no weight.
    """
    while state.step < config.num_steps:
        step_fn(state, next(batches))  # forward, backward, finite check, clip, optimizer, average
        state.step += 1
        is_last = state.step == config.num_steps
        saves = state.step % resources.save_every_steps == 0 and not is_last
        logs = state.step % resources.log_every_steps == 0 or is_last
        if saves or logs or state.bad_step.device.type == "cpu":
            require_finite(state)  # on a GPU this waits for it, so not at every step
        if logs:
            report(state)
            state.loss_sum.zero_()
        if saves:
            save(state)


def make_step(objective: nn.Module, section: TrainedSection, share: Share, *, seed: int) -> StepFunction:
    """The step function of one training.

    A step whose loss or gradient is not finite updates nothing, and neither do later steps. The check runs on the
    device; ``require_finite`` reads its result.

    Args:
        objective: (batch, random numbers) -> mean loss of the samples; wrapped for data parallelism where needed.
        section: Optimisation, and the largest part of the batch that is worked off at a time.
        share: This worker's share of the global batch.
        seed: Seed of the training's random numbers.
    """
    config = section.train
    max_norm = config.grad_clip_norm or math.inf
    accumulate = make_accumulate(objective, share, section.resources.micro_batch_size, config.precision)
    losses = diffusion_losses_of(objective)

    def step(state: TrainState, batch: Batch) -> None:
        random = SampleRandom.of_samples(step_seed(seed, state.step), range(share.start, share.stop))
        loss = accumulate(batch, random, state.bad_step.device)
        for diffusion_loss in losses:
            diffusion_loss.end_step(share)
        if share.world_size > 1:
            torch.distributed.all_reduce(loss)
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        state.grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        _note(state, loss)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        update_average(state.ema, state.network, config.ema_decay, state.step + 1)

    return step


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random in one step, on all workers; a resumed run repeats it."""
    return derive_seed(seed, f"train/{step}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate in step ``step`` (0-based): a linear rise, then constant or half a cosine down to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def require_finite(state: TrainState) -> None:
    """Stop a training after a loss or gradient that is not finite.

    Raises:
        StepError: Names the first bad step; no weight was changed by it.
    """
    bad_step = int(state.bad_step)
    if bad_step >= 0:
        raise StepError(
            f"step {bad_step}: loss or gradient is not finite (gradient norm {float(state.grad_norm):g}); "
            "no weight was changed by it; lower learning_rate, or use precision float32"
        )


def _note(state: TrainState, loss: Tensor) -> None:
    """Add up the loss, and let the optimizer skip this step (on the device) if it or an earlier one is not finite."""
    is_bad = ~(torch.isfinite(loss) & torch.isfinite(state.grad_norm))
    state.bad_step = torch.where(is_bad & (state.bad_step < 0), state.step + 1, state.bad_step)
    state.loss_sum += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    # The fused AdamW looks for these two attributes, which torch's GradScaler sets, and skips its step by the second.
    optimizer: Any = state.optimizer
    optimizer.grad_scale, optimizer.found_inf = None, (state.bad_step >= 0).float()

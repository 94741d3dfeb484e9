"""Ends a training before its last step: all workers after the same one, with a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor

WantsStop = Callable[[], str]
"""Why the training of this worker should end early; empty while it need not. It is called at every step."""
_LAG_STEPS = {"cpu": 0, "cuda": 2}


def never() -> str:
    """Nothing ends the training early."""
    return ""


class StoppedError(Exception):
    """A training has ended early, after a checkpoint.

    Args:
        step: Steps done, which the checkpoint holds.
        reason: Why, in words.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"ended after step {step}, with a checkpoint: {reason}")
        self.step = step
        self.reason = reason


class StopVote:
    """Lets all workers end after the same step.

    The number of workers that want to end is added up together with the loss, so it costs no message of its own. A GPU
    copies the sum to the host behind its other work, and every worker reads it two steps later: reading it at once
    would let the GPU wait for the host at every step.

    Args:
        wants_stop: What this worker wants.
        world_size: Number of workers.
    """

    def __init__(self, wants_stop: WantsStop, world_size: int) -> None:
        self._wants_stop, self._world_size = wants_stop, world_size
        self._counts: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.is_decided = False
        """Whether all workers end after this step; the same on each of them."""

    def add_up(self, loss: Tensor) -> Tensor:
        """The sum of the workers' losses, of shape (); every worker calls this once a step."""
        wish = bool(self._wants_stop())
        if self._world_size == 1:
            self.is_decided = wish
            return loss
        both = torch.stack([loss, torch.full_like(loss, float(wish))])
        torch.distributed.all_reduce(both)
        total, count = both.unbind()
        self._counts.append((count, None) if count.device.type == "cpu" else _copy_behind(count))
        if len(self._counts) > _LAG_STEPS[count.device.type]:
            earlier, copied = self._counts.popleft()
            if copied is not None:
                copied.synchronize()
            self.is_decided = bool(earlier)
        return total

    def reason(self) -> str:
        """Why the workers end, in words; every worker calls this after the decision."""
        reasons = [self._wants_stop()]
        if self._world_size > 1:
            reasons *= self._world_size
            torch.distributed.all_gather_object(reasons, reasons[0])
        return "; ".join(dict.fromkeys(filter(None, reasons))) or "a worker had to end"


def _copy_behind(count: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy of a GPU's number on the host, and the event after which it is there."""
    copy, copied = torch.empty((), pin_memory=True), torch.cuda.Event()
    copy.copy_(count, non_blocking=True)
    copied.record()
    return copy, copied

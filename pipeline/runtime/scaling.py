"""How many workers a start of a training on several has, and how they are placed: what Ray Train asks us at each try.

Ray Train's own policy for a range of workers counts what the machines have in all: also those without the workers'
labels, and what others use. A group of a number that does not fit is never formed, and a healthy one is ended for it.
So we count, and a training that can have more workers ends with a checkpoint first. A number that is fixed is placed
anew at each try, because the machine on which it was to stay may have gone. Machines on which the run knows that steps
fail are left out, and one that the run has not looked at yet is no room for more workers.

This module loads Ray Train; Ray has no public way to pass a policy.
"""

import contextlib
import time
from typing import Any

from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from pipeline.errors import UnclipError
from pipeline.runtime.context import StepContext
from pipeline.runtime.machines import machine_verdicts
from pipeline.runtime.placement import amounts_of, free_room, needed, not_on_machines, on_machines, packing
from pipeline.runtime.stopping import tell_of_room
from pipeline.workspace.progress import Progress

_LOOK_S = 1.0


class RoomPolicy(ScalingPolicy):
    """As many workers as there is room for, within the recipe's range; it travels to Ray Train's controller.

    Args:
        scaling_config: Ray Train's settings, with the recipe's range.
        context: The step.
        options: Ray's options for each worker.
    """

    def __init__(self, scaling_config: ScalingConfig, context: StepContext, options: dict[str, Any]) -> None:
        super().__init__(scaling_config)
        self._context, self._options = context, options
        self._resources = context.recipe.trained()[context.step.name].resources
        self._verdicts: dict[str, str] | None = None
        """See ``machine_verdicts``."""
        self._said = needed(self._resources.fewest_workers, options)
        self._room = -1
        self._looked_at = float("-inf")

    def on_controller_start_worker_group(
        self,
        *,
        scaling_config: ScalingConfig,  # noqa: ARG002  (Ray's signature)
        num_workers: int,  # noqa: ARG002
    ) -> dict[str, str] | None:
        """Called before each try to form a group; returns labels of its machines in place of those of the settings.

        They cannot change there: Ray Train has a copy of them.
        """
        options = self._fit_options()
        return None if options is self._options else options["label_selector"]

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Called before each try to form a group; Ray Train tries again after a minute in which it had no room.

        A group of the fewest is tried also without room: Ray's autoscalers see what waits.
        """
        self._read_verdicts()
        options = self._fit_options()
        self.scaling_config.label_selector = options.get("label_selector")  # what the autoscalers are asked for
        self._maybe_send_resource_request()
        self._say(options)
        fewest, most = self._resources.workers
        self.scaling_config.placement_strategy = "PACK" if fewest < most else packing(options, most)
        if fewest < most:
            before, self._room = self._room, self._room_now()
            # What an earlier group has left may be free a moment later.
            if self._room < most and self._room != before:
                time.sleep(_LOOK_S)
                return NoopDecision()
            fewest = max(fewest, min(self._room, most))
        self._room = -1
        return ResizeDecision(fewest, amounts_of(self._options))

    def make_decision_for_running_worker_group(
        self,
        worker_group_state: WorkerGroupState,
        worker_group_status: WorkerGroupPollStatus,  # noqa: ARG002  (Ray's signature)
    ) -> ScalingDecision:
        """Called every second while a group trains: it ends with a checkpoint if there is room for more workers."""
        self._maybe_send_resource_request()
        looked_at = max(worker_group_state.start_time, self._looked_at)
        is_due = time.monotonic() - looked_at >= self._resources.resize_every_s
        if is_due and worker_group_state.num_workers < self._resources.most_workers:
            self._looked_at = time.monotonic()
            with contextlib.suppress(Exception):  # whatever it is, the training goes on, and the next look comes
                self._read_verdicts()
                if self._room_now():
                    worker_group_state.workers[0].execute_async(tell_of_room)
        return NoopDecision()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._resources.most_workers

    def _read_verdicts(self) -> None:
        with contextlib.suppress(UnclipError):  # a store that is away: what is known stays
            self._verdicts = machine_verdicts(self._context.recipe)

    def _fit_options(self) -> dict[str, Any]:
        """Ray's options for each worker, which is on no machine that the run knows to be unfit."""
        return not_on_machines(self._options, [one for one, words in (self._verdicts or {}).items() if words])

    def _room_now(self) -> int:
        """Workers for which Ray has room, on machines that the run has found fit, if it looks at them."""
        if self._verdicts is None:
            return free_room(self._options)
        return free_room(on_machines(self._options, [one for one, words in self._verdicts.items() if not words]))

    def _say(self, options: dict[str, Any]) -> None:
        """Let the progress say what is missing, if that has changed."""
        words = needed(self._resources.fewest_workers, options)
        if words != needed(self._resources.fewest_workers, self._options):
            words += f" and is fit: {'; '.join(sorted(filter(None, (self._verdicts or {}).values())))}"
        if words != self._said:
            self._said = words
            progress = Progress(self._context.own_output, waits=True, notice=self._context.notice)
            progress.update(0, 1, "", f"waiting for {words}", force=True)


class RoomTrainer(TorchTrainer):
    """Ray Train's trainer with our policy.

    Args:
        function: What each worker runs.
        policy: How many of them there are.
        settings: As ``TorchTrainer`` takes them.
    """

    def __init__(self, function: Any, *, policy: RoomPolicy, **settings: Any) -> None:
        super().__init__(function, **settings)
        self._policy = policy

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        return super()._initialize_and_run_controller(**{**settings, "scaling_policy": self._policy})

"""Which pictures take the next step together, and how many of them a stage is given."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from pipeline.serve.in_progress import Picture
from pipeline.serve.step_times import StepTimes

_STEPS_TO_TRUST = 64
"""Steps without a failure after which a stage is given twice as many pictures again."""


@dataclass
class _StageLoad:
    """What is learned of one stage."""

    limit: int
    """Pictures that take a step together."""
    times: StepTimes = field(default_factory=StepTimes)
    """Of its steps."""
    good_steps: int = 0
    """Steps since the last failure."""
    steps: int = 0
    """Steps of the last picture that left it."""


class Schedule:
    """Chooses a stage for each step, and learns from the steps that were taken.

    Args:
        num_stages: Stages that pictures pass.
        max_batch_size: Most pictures in one step.
    """

    def __init__(self, num_stages: int, max_batch_size: int) -> None:
        self._loads = [_StageLoad(max_batch_size) for _ in range(num_stages)]
        self._max_batch_size = max_batch_size

    def choose(self, by_stage: Mapping[int, Sequence[Picture]]) -> Sequence[Picture]:
        """The pictures that take the next step together, all of one stage.

        The stage whose step makes the best use of its time goes first: one with few pictures waits for others, while
        another stage has more. Of stages that are about equally good, the earliest goes first, so that late pictures
        catch up. But nobody waits for others longer than a full batch takes through all stages.

        Args:
            by_stage: The pictures in progress, by the number of their stage; at least one.
        """
        moved_s = {number: min(picture.moved_s for picture in pictures) for number, pictures in by_stage.items()}
        number = min(moved_s, key=moved_s.__getitem__)
        if len(by_stage) == 1 or monotonic() - moved_s[number] <= self._longest_wait_s():
            number = max(by_stage, key=lambda number: (round(self._use(number, len(by_stage[number])), 1), -number))
        limit = self._loads[number].limit
        pictures = by_stage[number]
        if len(pictures) > limit:  # those that are nearest to their end
            pictures = sorted(pictures, key=lambda picture: picture.chain.position if picture.chain else -1)[-limit:]
        return pictures

    def note_step(self, number: int, count: int, time_s: float) -> None:
        """Learn from a step of ``count`` pictures that succeeded."""
        load = self._loads[number]
        load.times.add(count, time_s)
        load.good_steps += 1
        if load.good_steps % _STEPS_TO_TRUST == 0:
            load.limit = min(2 * load.limit, self._max_batch_size)

    def note_failure(self, number: int, count: int) -> None:
        """Give a stage half of the ``count`` pictures with which a step failed."""
        load = self._loads[number]
        load.good_steps = 0
        if count > 1:
            load.limit = count // 2

    def note_left(self, number: int, num_steps: int) -> None:
        """Learn how many steps a picture has taken in a stage that it left."""
        self._loads[number].steps = num_steps

    def estimate_s(self, steps: Mapping[int, int], count: int, num_ahead: int) -> float:
        """How long a request takes from now to its last picture, in seconds: it passes its stages in full batches.

        Args:
            steps: Steps of the request in each stage, by its number; 0: as many as the last picture there.
            count: Its pictures.
            num_ahead: Pictures in progress, and those that are admitted before the last one of the request.
        """
        total = count + num_ahead
        batch = min(total, self._max_batch_size)
        pass_s = 0.0
        for number, num_steps in steps.items():
            load = self._loads[number]
            size = min(batch, load.limit)
            pass_s += (num_steps or load.steps) * load.times.of(size) * math.ceil(batch / size)
        return pass_s * total / batch

    def _use(self, number: int, count: int) -> float:
        """How well a step of a stage with ``count`` pictures would use its time: 1 is as well as the largest step."""
        load = self._loads[number]
        most = min(load.limit, self._max_batch_size)
        return load.times.share(min(count, most), most)

    def _longest_wait_s(self) -> float:
        """The time that a full batch takes through all stages, in seconds."""
        return sum(load.steps * load.times.of(load.limit) for load in self._loads)

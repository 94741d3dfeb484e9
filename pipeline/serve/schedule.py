"""Which pictures take the next step together, and how many of them a stage is given."""

from collections.abc import Mapping, Sequence
from time import monotonic

from pipeline.serve.estimate import StageLoad
from pipeline.serve.in_progress import Picture

_STEPS_TO_TRUST = 64
"""Full steps without a failure after which a stage is given more pictures again."""
_STEPS_TO_FORGET = 4096
"""Full steps without a failure after which as many pictures as have failed are tried again: memory may be free now."""


class Schedule:
    """Chooses a stage for each step, and learns from the steps that were taken.

    Args:
        num_stages: Stages that pictures pass.
        max_batch_size: Most pictures in one step.
    """

    def __init__(self, num_stages: int, max_batch_size: int) -> None:
        self.loads = [StageLoad(max_batch_size) for _ in range(num_stages)]
        """What is learned of each stage."""
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
        # Those that are nearest to their end; of equal ones those that came first.
        return sorted(by_stage[number], key=lambda one: one.position, reverse=True)[: self.loads[number].limit]

    def note_step(self, number: int, count: int, time_s: float) -> None:
        """Learn from a step of ``count`` pictures that succeeded."""
        load = self.loads[number]
        load.times.add(count, time_s)
        if count < load.limit:  # it says nothing of larger steps
            return
        load.good_steps += 1
        if load.good_steps >= _STEPS_TO_FORGET:
            load.too_many = 0
        most = (load.limit + load.too_many) // 2 if load.too_many else min(2 * load.limit, self._max_batch_size)
        if most > load.limit and load.good_steps >= _STEPS_TO_TRUST:
            load.limit, load.good_steps = most, 0

    def note_failure(self, number: int, count: int) -> None:
        """Give a stage half of the ``count`` pictures with which a step failed, and later as many as do not fail."""
        load = self.loads[number]
        load.good_steps = 0
        if count > 1:
            load.limit, load.too_many = count // 2, count
        else:  # this picture was what failed in the steps before, too
            load.limit, load.too_many = self._max_batch_size, 0

    def note_left(self, number: int, num_steps: int) -> None:
        """Learn how many steps a picture has taken in a stage that it left."""
        self.loads[number].steps = num_steps

    def _use(self, number: int, count: int) -> float:
        """How well a step of a stage with ``count`` pictures would use its time: 1 is as well as the largest step."""
        load = self.loads[number]
        most = min(load.limit, self._max_batch_size)
        return load.times.share(min(count, most), most)

    def _longest_wait_s(self) -> float:
        """The time that a full batch takes through all stages, in seconds."""
        return sum(load.steps * load.times.of(load.limit) for load in self.loads)

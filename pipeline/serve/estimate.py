"""How long a request would take, from what each part of the cascade has to do.

It loads no torch: the process that speaks HTTP passes on what the parts say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.serve.step_times import StepTimes


@dataclass
class StageLoad:
    """What is learned of one stage."""

    limit: int
    """Pictures that take a step together."""
    times: StepTimes = field(default_factory=StepTimes)
    """Of its steps."""
    good_steps: int = 0
    """Steps of so many pictures since the limit was changed."""
    too_many: int = 0
    """Pictures with which a step failed, the fewest lately; 0: none."""
    steps: int = 0
    """Steps of the last picture that left it."""


@dataclass(frozen=True)
class PartLoad:
    """What the engines with the same stages have to do: all stages of the cascade, or those of one part of a chain."""

    stages: Mapping[int, StageLoad]
    """By number."""
    max_batch_size: int
    """Most pictures in one step."""
    pictures: float
    """Pictures in progress or waiting there, those of all its engines."""
    num_engines: int = 1
    """Engines among which they are shared."""


def load_of_all(engines: Sequence[PartLoad]) -> PartLoad:
    """The load of a part from those of its engines, of which the one that has taken most steps says what they cost."""
    oldest = max(engines, key=lambda one: sum(load.times.num_steps for load in one.stages.values()))
    return replace(oldest, pictures=sum(one.pictures for one in engines), num_engines=len(engines))


def estimate_s(parts: Sequence[PartLoad], steps: Mapping[int, int], count: int) -> float:
    """How long a request takes from now to its last picture, in seconds.

    It passes its stages in full batches. The parts work at the same time, so it passes each, and waits where most has
    to be done; what is in a part will be in the parts after it.

    Args:
        parts: In the order in which they are passed.
        steps: Steps of the request in each stage, by its number; 0: as many as the last picture there.
        count: Its pictures.
    """
    ahead = passes_s = longest_wait_s = 0.0
    for part in parts:
        ahead += part.pictures
        total = count + ahead / part.num_engines
        batch = min(total, part.max_batch_size)
        pass_s = 0.0
        for number in steps.keys() & part.stages.keys():
            load = part.stages[number]
            size = min(batch, load.limit)
            pass_s += (steps[number] or load.steps) * load.times.of(size) * math.ceil(batch / size)
        passes_s += pass_s
        longest_wait_s = max(longest_wait_s, pass_s * (total / batch - 1))
    return passes_s + longest_wait_s

"""The largest recipe whose forecast fits into a given time on this machine, with room for what forecasts miss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError
from pipeline.init.sizes import Size
from pipeline.recipe.estimate import StepTime, remaining
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import this_machine
from pipeline.timing.units import Units, step_times
from pipeline.workspace.progress import duration

FREE_SHARE = 0.25
"""Share of the minutes that stays free: a run may take longer than its forecast, which was up to 24 % below it
(docs/lab.md) and does not count the start of Ray (10 to 18 s)."""
Watch = Callable[[str], None]
"""Called with what is measured next."""
MakeRecipe = Callable[[Size, int], Recipe]
"""(size, steps) -> recipe."""


@dataclass(frozen=True)
class Fit:
    """A size and a number of steps, with the time that they take."""

    size: Size
    steps: int
    times: dict[str, StepTime] = field(default_factory=dict[str, StepTime])
    """Of each step; empty if nothing was measured."""
    crowding: float = 1.0
    seconds: float = 0.0
    """Forecast of the run's time; 0 if nothing was measured."""


def fit(
    make: MakeRecipe, sizes: Sequence[Size], most_steps: int, minutes: float, measure: Callable[[Recipe], Units]
) -> Fit:
    """Choose the largest size that has enough steps in the time, and as many steps as the time allows.

    The forecast of the run takes no more than the minutes without ``FREE_SHARE`` of them.

    Args:
        make: Makes a recipe.
        sizes: From the largest to the smallest.
        most_steps: More steps are of no use.
        minutes: Longest time of the whole run.
        measure: Measures a recipe; called once for each size that is tried.

    Raises:
        ConfigError: If even the least recipe takes longer; names its time, and the minutes that it needs.
    """
    limit_s = 60 * minutes * (1 - FREE_SHARE)
    least: Fit | None = None
    for size in sizes:
        units = measure(make(size, size.least_steps))
        least = _timed(make, size, size.least_steps, units)
        if least.seconds <= limit_s:
            steps = most_within(
                lambda steps, size=size, units=units: _timed(make, size, steps, units).seconds,
                limit_s,
                size.least_steps,
                most_steps,
            )
            return _timed(make, size, steps, units)
    assert least is not None
    raise ConfigError(
        f"--minutes {minutes:g}: too few; the least recipe that makes sense for these pairs ({least.size.text}, "
        f"{least.steps} steps) takes about {duration(least.seconds)} on this machine, and {FREE_SHARE:.0%} of the time "
        f"stays free, because a run may take longer: --minutes {math.ceil(least.seconds / (1 - FREE_SHARE) / 60)}"
    )


def most_within(seconds: Callable[[int], float], limit_s: float, least: int, most: int) -> int:
    """The largest number of steps in ``least`` .. ``most`` that takes no more than ``limit_s``; ``least`` does."""
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if seconds(middle) <= limit_s else (low, middle - 1)
    return low


def _timed(make: MakeRecipe, size: Size, steps: int, units: Units) -> Fit:
    recipe = make(size, steps)
    times = step_times(recipe, units)
    rest = remaining(recipe, make_plan(recipe), {}, times, this_machine(units.crowding))
    return Fit(size, steps, times, units.crowding, rest.seconds)

"""How long a step of a stage takes, as a line over the number of its pictures.

Calling the network costs some time, and each picture adds some. The engine asks how well a step would use its time.
"""

from dataclasses import dataclass

_NEWEST = 0.1
"""Weight of the newest step in the running means."""


@dataclass
class StepTimes:
    """A line fitted by least squares to the steps so far, of which older ones count less and less."""

    num_steps: int = 0
    """Steps seen."""
    count: float = 0.0
    """Mean number of pictures of a step."""
    time_s: float = 0.0
    """Mean time of a step, in seconds."""
    variance: float = 0.0
    """Of the number of pictures."""
    covariance: float = 0.0
    """Of the number of pictures and the time, in seconds."""

    def add(self, count: int, time_s: float) -> None:
        """Learn from a step of ``count`` pictures."""
        weight = max(_NEWEST, 1 / (self.num_steps + 1))
        more, longer = count - self.count, time_s - self.time_s
        self.count += weight * more
        self.time_s += weight * longer
        self.variance = (1 - weight) * (self.variance + weight * more * more)
        self.covariance = (1 - weight) * (self.covariance + weight * more * longer)
        self.num_steps += 1  # last, because other threads read the line

    def of(self, count: float) -> float:
        """Expected time of a step of ``count`` pictures, in seconds; 0 before the first step."""
        if not self.num_steps:
            return 0.0
        # No picture saves time, and none costs more than all time; steps of one size say nothing, so half is fixed.
        most = self.time_s / self.count
        slope = min(most, max(0.0, self.covariance / self.variance)) if self.variance > 0 else most / 2
        return self.time_s + slope * (count - self.count)

    def share(self, count: int, full: int) -> float:
        """How well a step of ``count`` pictures uses its time: 1 if each costs what it costs in a step of ``full``."""
        if not self.num_steps:
            return count / full
        return (self.of(full) / full) / (self.of(count) / count)

"""A shard that took its worker down twice is made in parts: halves, until the row is found.

What is done and what is not stands in a small JSON file, which the worker writes before and after each part, and the
driver when a worker was lost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Part = tuple[int, int]
"""First row, and the row after the last."""


@dataclass
class Split:
    """The parts of one shard."""

    todo: list[Part]
    running: Part | None = None
    """The part that a worker makes, or was making when it was lost."""
    done: list[Part] = field(default_factory=list[Part])
    lost_once: list[int] = field(default_factory=list[int])
    """Single rows that lost one worker: it may have been lost for another reason."""
    killers: list[int] = field(default_factory=list[int])
    """Rows that took two workers down alone; they are failed rows."""

    def begin(self) -> Part | None:
        """The next part to make; None if all are made."""
        if self.running is None and self.todo:
            self.running = self.todo.pop(0)
        return self.running

    def finish(self) -> None:
        """The running part is made."""
        assert self.running is not None
        self.done = sorted([*self.done, self.running])
        self.running = None

    def lose(self) -> None:
        """The worker of the running part was lost: halve it, or remember its only row."""
        if self.running is None:
            return
        start, stop = self.running
        middle = (start + stop) // 2
        self.running = None
        if stop - start > 1:
            self.todo = [(start, middle), (middle, stop), *self.todo]
        elif start in self.lost_once:
            self.killers.append(start)
        else:
            self.lost_once.append(start)
            self.todo.insert(0, (start, stop))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Split:
        """From JSON, which has lists in place of tuples."""
        todo, done = ([(start, stop) for start, stop in data[name]] for name in ("todo", "done"))
        running = data["running"] and (data["running"][0], data["running"][1])
        return cls(todo, running, done, data["lost_once"], data["killers"])

"""The live table of a run: what runs, what waits and the time to go.

`unclip run` draws it below its lines. A run that is a job publishes it instead, and `unclip submit --follow` draws the
same one on another machine.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TextIO

from pipeline.errors import DataError
from pipeline.workspace.manifest import parse_record
from pipeline.workspace.progress import clock_time

_NAME_COLUMNS = 17
_INDENT = " " * 8


@dataclass(frozen=True)
class Board:
    """One state of the table."""

    elapsed_s: int
    """Seconds since the run began."""
    rest: str
    """Time to go of the whole run in words; empty while it is not known."""
    num_done: int
    num_steps: int
    running: tuple[tuple[str, str], ...]
    """Name and newest reading of each running step, in the order in which they were started."""
    waiting: tuple[str, ...]
    """Names of the steps that have not begun, in the order of the plan."""

    def lines(self) -> list[str]:
        """The table for people."""
        rest = f"{self.rest}; " if self.rest else ""
        head = f"{clock_time(self.elapsed_s):>6}  run: {rest}{self.num_done} of {self.num_steps} steps done"
        rows = [f"{_INDENT}{name:<{_NAME_COLUMNS}} {reading}" for name, reading in self.running]
        waiting = [f"{_INDENT}{'next':<{_NAME_COLUMNS}} {', '.join(self.waiting)}"] if self.waiting else []
        return [head, *rows, *waiting]

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Board":
        """What ``to_json`` wrote.

        Raises:
            DataError: If it is none, for example that of another release.
        """
        try:
            return parse_record(Board, json.loads(text))
        except ValueError as error:
            raise DataError(f"no table of a run: {error}") from None


class LiveLines:
    """The last lines of a terminal, written again and again.

    Args:
        stream: Where they are written; unless it is a terminal, nothing is.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._num_lines = 0

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal."""
        return self._stream.isatty()

    def show(self, lines: list[str]) -> None:
        """Replace the lines; those that do not fit into the terminal are cut."""
        if not self.is_live:
            return
        size = shutil.get_terminal_size()
        shown = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
        self._stream.write(self._up() + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J")
        self._stream.flush()
        self._num_lines = len(shown)

    def clear(self) -> None:
        """Remove the lines, so that what is printed next stands in their place."""
        if self._num_lines:
            self._stream.write(f"{self._up()}\x1b[J")
            self._stream.flush()
            self._num_lines = 0

    def _up(self) -> str:
        """Moves the cursor to the first of the lines."""
        return f"\x1b[{self._num_lines}A\r" if self._num_lines else ""

"""Prints a run: a line when a step starts, readings while it runs, a line when it ends."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, Self, TextIO

import typer

from jobs.board import Board, LiveLines
from jobs.options import with_recipe
from pipeline.errors import DataError
from pipeline.recipe.estimate import Remaining
from pipeline.recipe.plan import Step
from pipeline.recipe.status import StepStatus
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import ProgressState, clock_time, duration

_EVERY_S = 15.0
_DRAW_S = 0.5
_READING = re.compile(r" *\d+:\d\d  \w+: (\d+/\d+ \w+ \(\d+ %\), |starting|waiting for |choosing rows)")


def is_reading(line: str) -> bool:
    """Whether a line of a run is one that a table shows better: the progress of a step, said every 15 s."""
    return _READING.match(line) is not None


class Watcher:
    """Prints to standard error, so that standard output stays for results.

    On a terminal a table of the running and waiting steps stands below the lines; elsewhere each step prints its
    progress every 15 s.

    Args:
        statuses: The steps of the run, and where they stand.
        publish: Receives the table, as ``Board.to_json`` writes it, for those who follow the run from elsewhere.
        recipe: The recipe as words of a command, for what is proposed.
    """

    def __init__(
        self,
        statuses: Sequence[StepStatus] = (),
        publish: Callable[[str], None] | None = None,
        *,
        recipe: str = "RECIPE",
    ) -> None:
        self._start = time.monotonic()
        self._states: dict[str, str] = {}
        self._waiting = [status.step.name for status in statuses if status.state != "done"]
        self._steps = {status.step.name for status in statuses}
        self._done = {status.step.name for status in statuses if status.state == "done"}
        self._printed_at: dict[str, float] = {}
        self._drawn_at = float("-inf")
        self._lines = LiveLines(sys.stderr)
        self._rest: Remaining | None = None
        self._publish, self._recipe = publish, recipe

    def started(self, step: Step) -> None:
        """A step was submitted to Ray."""
        self._printed_at[step.name] = time.monotonic()
        self._states[step.name] = "starts"
        self._steps.add(step.name)
        self._done.discard(step.name)
        self._waiting = [name for name in self._waiting if name != step.name]
        self._print(f"{step.name}: starts")

    def progressed(self, step: Step, state: ProgressState) -> None:
        """The progress of a running step was read."""
        self._states[step.name] = f"{state.text}{state.where}"
        if self._lines.is_live:
            if time.monotonic() - self._drawn_at > _DRAW_S:
                self._draw()
        elif state.text and time.monotonic() - self._printed_at[step.name] > _EVERY_S:
            self._printed_at[step.name] = time.monotonic()
            rest = f"; run: {self._rest.text}" if self._rest else ""
            self._print(f"{step.name}: {state.text}{rest}")
        if self._publish is not None:
            self._publish(self._board().to_json())

    def remaining(self, rest: Remaining) -> None:
        """The time to go of the whole run was estimated again."""
        if self._rest is None:
            self._print(f"run: {rest.explain(self._recipe)}")
        self._rest = rest

    def finished(self, step: Step, manifest: Manifest) -> None:
        """A step was committed."""
        self._states.pop(step.name, None)
        self._done.add(step.name)
        counts = ", ".join(f"{value} {name}" for name, value in manifest.counts.items())
        self._print(f"{step.name}: done in {manifest.wall_s:.1f} s" + (f" ({counts})" if counts else ""))

    def failed(self, step: Step, dependents: Collection[str]) -> None:
        """A step failed, and the waiting steps ``dependents`` are not run; why is said elsewhere."""
        self._states.pop(step.name, None)
        self._waiting = [name for name in self._waiting if name not in dependents]

    def reported(self, message: str) -> None:
        """How far work is that is of no step."""
        self._print(message)

    def warned(self, message: str) -> None:
        """Something went wrong that does not stop the run."""
        self._print(f"warning: {with_recipe(message, self._recipe)}")

    def close(self) -> None:
        """Remove the table."""
        self._lines.clear()

    def _board(self) -> Board:
        return Board(
            elapsed_s=int(time.monotonic() - self._start),
            rest=self._rest.text if self._rest else "",
            num_done=len(self._done),
            num_steps=len(self._steps),
            running=tuple(self._states.items()),
            waiting=tuple(self._waiting),
        )

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        self._lines.show(self._board().lines())

    def _print(self, text: str) -> None:
        self._lines.clear()
        typer.echo(f"{clock_time(time.monotonic() - self._start):>6}  {text}", err=True)
        if self._states:
            self._draw()


class Follower:
    """Prints the lines of a run that is a job elsewhere, and on a terminal its table below them.

    Args:
        stream: Where it prints.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines = LiveLines(stream)
        self._begun_line = ""
        self._table, self._changed_at = "", float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.clear()
        self._stream.write(self._begun_line)
        self._stream.flush()

    @property
    def is_live(self) -> bool:
        """Whether it shows the table."""
        return self._lines.is_live

    def write(self, text: str) -> None:
        """Print a piece of the log, as soon as its lines are whole where there is a table."""
        if not self.is_live:
            self._stream.write(text)
            self._stream.flush()
            return
        *whole, self._begun_line = (self._begun_line + text).split("\n")
        lines = [line for line in whole if not (self._table and is_reading(line))]
        if lines:
            self._lines.clear()
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._draw()

    @contextlib.contextmanager
    def aside(self) -> Generator[None]:
        """Take the table away inside the block, in which other lines are printed."""
        self._lines.clear()
        self._stream.write(f"{self._begun_line}\n" if self._begun_line else "")
        self._stream.flush()
        self._begun_line = ""
        yield

    def show(self, table: str) -> None:
        """Draw the newest table that the run has published."""
        if table != self._table:
            self._table, self._changed_at = table, time.monotonic()
        self._draw()

    def _draw(self) -> None:
        """Draw the table, and its age if nothing new came for a while."""
        with contextlib.suppress(DataError):  # a run of another release: its lines are all there is
            lines = Board.from_json(self._table).lines() if self._table else []
            age_s = time.monotonic() - self._changed_at
            if lines and age_s > _EVERY_S:
                lines[0] += f"; last heard {duration(age_s)} ago"
            self._lines.show(lines)


class SamplingWatcher:
    """Prints the sampling step of the current stage: one line, rewritten, on a terminal; elsewhere one every 15 s."""

    def __init__(self) -> None:
        self._line = _Line()
        self._printed_at = time.monotonic()

    def __enter__(self) -> "SamplingWatcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._line.clear()

    def __call__(self, step: Any) -> None:
        """Print a ``models.stage.StageStep`` (not named here: its module loads torch)."""
        text = f"{step.stage} {step.done}/{step.total}"
        if self._line.is_live:
            self._line.write(text)
        elif time.monotonic() - self._printed_at > _EVERY_S:
            self._printed_at = time.monotonic()
            typer.echo(text, err=True)


class _Line:
    """The last line of a terminal on standard error, written again and again."""

    def __init__(self) -> None:
        self.is_live = sys.stderr.isatty()
        self._width = 0

    def write(self, text: str) -> None:
        """Replace the line."""
        typer.echo("\r" + text.ljust(self._width), err=True, nl=False)
        self._width = max(self._width, len(text))

    def clear(self) -> None:
        """Clear the line."""
        if self._width:
            typer.echo("\r" + " " * self._width + "\r", err=True, nl=False)
            self._width = 0

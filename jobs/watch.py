"""Prints a run: a line when a step starts, readings while it runs, a line when it ends."""

import sys
import time
from typing import Any

import typer

from pipeline.recipe.estimate import Remaining
from pipeline.recipe.plan import Step
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import ProgressState

_EVERY_S = 15.0


class Watcher:
    """Prints to standard error, so that standard output stays for results.

    On a terminal the readings of all running steps share one line that is rewritten; elsewhere each step prints its
    progress every 15 s.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._states: dict[str, ProgressState] = {}
        self._printed_at: dict[str, float] = {}
        self._line = _Line()
        self._rest: Remaining | None = None

    def started(self, step: Step) -> None:
        """A step was submitted to Ray."""
        self._printed_at[step.name] = time.monotonic()
        self._print(f"{step.name}: starts")

    def progressed(self, step: Step, state: ProgressState) -> None:
        """The progress of a running step was read."""
        self._states[step.name] = state
        if self._line.is_live:
            readings = [f"{name} {reading.text}" for name, reading in self._states.items()]
            self._line.write("  ".join([*([f"run: {self._rest.text}"] if self._rest else []), *readings])[:118])
        elif state.unit and time.monotonic() - self._printed_at[step.name] > _EVERY_S:
            self._printed_at[step.name] = time.monotonic()
            rest = f"; run: {self._rest.text}" if self._rest else ""
            self._print(f"{step.name}: {state.text}{rest}")

    def remaining(self, rest: Remaining) -> None:
        """The time to go of the whole run was estimated again."""
        if self._rest is None:
            self._print(f"run: {rest.explain('RECIPE')}")
        self._rest = rest

    def finished(self, step: Step, manifest: Manifest) -> None:
        """A step was committed."""
        self._states.pop(step.name, None)
        counts = ", ".join(f"{value} {name}" for name, value in manifest.counts.items())
        self._print(f"{step.name}: done in {manifest.wall_s:.1f} s" + (f" ({counts})" if counts else ""))

    def warned(self, message: str) -> None:
        """Something went wrong that does not stop the run."""
        self._print(f"warning: {message}")

    def close(self) -> None:
        """Clear the progress line."""
        self._line.clear()

    def _print(self, text: str) -> None:
        self._line.clear()
        elapsed = time.monotonic() - self._start
        typer.echo(f"{int(elapsed) // 60:3d}:{int(elapsed) % 60:02d}  {text}", err=True)


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

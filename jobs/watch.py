"""What a person sees of a run: a line when a step starts, readings while it runs, a line when it ends."""

import sys
import time

import typer

from pipeline.recipe.plan import Step
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import ProgressState

_EVERY_S = 15.0


class Watcher:
    """Prints to standard error, so that standard output stays for results.

    On a terminal the readings of all running steps share one line that is rewritten; elsewhere each step says where it
    stands every 15 s.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._states: dict[str, ProgressState] = {}
        self._said: dict[str, float] = {}
        self._live = sys.stderr.isatty()
        self._width = 0

    def started(self, step: Step) -> None:
        """A step was given to Ray."""
        self._said[step.name] = time.monotonic()
        self._print(f"{step.name}: starts")

    def progressed(self, step: Step, state: ProgressState) -> None:
        """A running step was read."""
        self._states[step.name] = state
        if self._live:
            line = "  ".join(f"{name} {reading.text}" for name, reading in self._states.items())
            self._rewrite(line[:118])
        elif state.unit and time.monotonic() - self._said[step.name] > _EVERY_S:
            self._said[step.name] = time.monotonic()
            self._print(f"{step.name}: {state.text}")

    def finished(self, step: Step, manifest: Manifest) -> None:
        """A step was committed."""
        self._states.pop(step.name, None)
        counts = ", ".join(f"{value} {name}" for name, value in manifest.counts.items())
        self._print(f"{step.name}: done in {manifest.wall_s:.1f} s" + (f" ({counts})" if counts else ""))

    def warned(self, message: str) -> None:
        """Something went wrong that does not stop the run."""
        self._print(f"warning: {message}")

    def close(self) -> None:
        """Leave the line."""
        if self._live and self._width:
            self._rewrite("")

    def _print(self, text: str) -> None:
        if self._live:
            self._rewrite("")
        elapsed = time.monotonic() - self._start
        typer.echo(f"{int(elapsed) // 60:3d}:{int(elapsed) % 60:02d}  {text}", err=True)

    def _rewrite(self, line: str) -> None:
        typer.echo("\r" + line.ljust(self._width) + ("\r" if not line else ""), err=True, nl=False)
        self._width = len(line)

"""What a person sees while pictures are drawn: on standard error, so that standard output stays for results."""

import sys
import time
from types import TracebackType
from typing import Any

import typer

_EVERY_S = 15.0


class DrawingWatcher:
    """Says which step of which stage is reached: one line that is rewritten on a terminal, elsewhere one every 15 s."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._said = time.monotonic()
        self._width = 0

    def __enter__(self) -> "DrawingWatcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._width:
            typer.echo("\r" + " " * self._width + "\r", err=True, nl=False)

    def __call__(self, step: Any) -> None:
        """Take note of a ``models.cascade.StageStep`` (not named here: its module loads torch)."""
        line = f"{step.stage} {step.done}/{step.total}"
        if self._live:
            typer.echo("\r" + line.ljust(self._width), err=True, nl=False)
            self._width = max(self._width, len(line))
        elif time.monotonic() - self._said > _EVERY_S:
            self._said = time.monotonic()
            typer.echo(line, err=True)

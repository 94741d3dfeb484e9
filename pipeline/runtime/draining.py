"""How a server ends: it finishes what is under way, and refuses what is new."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from pipeline.errors import StepError, UnclipError
from pipeline.runtime.front import Front
from pipeline.serve.gate import Gate

Announce = Callable[[str], None]
"""Takes lines for people."""


def write_line(line: str) -> None:
    """Announce on standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def named(error: BaseException) -> str:
    """An error for people: those that are not ours need their names, because their texts may be one word."""
    return str(error) if isinstance(error, UnclipError) else f"{type(error).__name__}: {error}"


@contextmanager
def finishing(front: Front, timeout_s: float, announce: Announce) -> Generator[None]:
    """After the block, finish what is under way; if Ray or the application has ended, it is answered with 503."""
    try:
        yield
    except StepError:
        front.end("the server has ended")
        raise
    except BaseException:
        _drain(front.gate, timeout_s, announce)
        raise


def _drain(gate: Gate, timeout_s: float, announce: Announce) -> None:
    """Finish what is under way, and refuse what is new; a second Ctrl-C ends it at once."""
    gate.close("the server is stopping")
    if not gate.num_requests:
        announce("stopping")
        return
    announce(f"stopping; requests under way: {gate.num_requests} - Ctrl-C again ends them at once")
    if not gate.wait_until_idle(timeout_s):
        announce(f"not finished within {timeout_s:g} s (serve.drain_s): {gate.num_requests}")

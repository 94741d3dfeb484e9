"""Storage that is mounted from another machine and does not answer for a moment, or any more; a disk that is full."""

import contextlib
import errno
import io
import os
import resource
from collections.abc import Callable, Generator
from typing import Any

import pytest

from pipeline.workspace import disk


def fail_calls(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    *,
    code: int = errno.ESTALE,
    times: int = 1,
    ends: tuple[str, ...] = ("",),
) -> list[str]:
    """Let a call of the system fail.

    Args:
        monkeypatch: Undoes it.
        name: ``open`` of a file, or a function of ``os``.
        code: The error.
        times: For how many calls; above 2 the patience of the project is short.
        ends: Ends of the paths for which it fails.

    Returns:
        The paths for which it has failed so far.
    """
    module: Any = io if name == "open" else os
    call: Callable[..., Any] = getattr(module, name)
    failed: list[str] = []

    def fail(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(ends) and len(failed) < times:
            failed.append(str(path))
            raise OSError(code, os.strerror(code), str(path))
        return call(path, *arguments, **options)

    monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(disk, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(disk, "_PATIENCE_S", 0.1 if times > 2 else 60)
    return failed


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Generator[None]:
    """A disk that is full when a file has this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

"""Storage that does not answer for a while: who waits for it says so, once, when it is no short moment any more."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator

from pipeline.addresses import without_password, without_secrets

_SILENCE_S = 10.0
_log = logging.getLogger(__name__)


class Outage:
    """The time since one action on storage was tried first.

    Args:
        where: Path or URI, for the warning.
    """

    def __init__(self, where: str) -> None:
        self._where = without_password(where)
        self._began = time.monotonic()
        self._is_said = False

    @property
    def lasted_s(self) -> float:
        """Seconds since the first try."""
        return time.monotonic() - self._began

    def wait(self, seconds: float, error: Exception) -> None:
        """Wait before the action is tried again; after ten seconds a warning says why, once."""
        if not self._is_said and self.lasted_s >= _SILENCE_S:
            self._is_said = True
            reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
            _log.warning(
                "%s: no answer for %.0f s (%s); it is asked again for some minutes",
                self._where,
                self.lasted_s,
                without_secrets(reason) or type(error).__name__,
            )
        time.sleep(seconds)


@contextlib.contextmanager
def warnings_to(warn: Callable[[str], None]) -> Generator[None]:
    """Hand the warnings of this process to a function inside the block, and not to its log."""
    handler = _Handler(warn)
    before = _log.propagate
    _log.addHandler(handler)
    _log.propagate = False
    try:
        yield
    finally:
        _log.propagate = before
        _log.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        self._warn(record.getMessage())

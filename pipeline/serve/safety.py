"""The safety hook of a recipe: a function of the user's that looks at prompts and pictures, and may hang."""

import importlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from pipeline.errors import ConfigError
from pipeline.serve.deadlines import until, while_wanted
from pipeline.serve.protocols import DeadlinePassed, Images

_log = logging.getLogger(__name__)

NUM_THREADS = 32
"""Calls at a time. A thread is made when it is needed; one whose call hangs is gone until the call ends."""
_LONGEST_S = 60.0
"""Until a call is given up, the wait for a thread included."""

SafetyHook = Callable[[str, Images | None], str | None]
"""(prompt, picture) -> the reason to refuse it, or None.

It is called with the prompt alone before pictures are sampled, and with every preview and picture, (H, W, 3), before
it is sent; a picture that it refuses is sent black. It is called in threads, several at once. What it takes is time of
the request.
"""


def load_hook(name: str) -> SafetyHook:
    """The hook that a recipe names.

    Args:
        name: ``module:function``; the module must be importable where the server runs.

    Raises:
        ConfigError: If there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"serve.safety_hook: {name!r}: {error}; it is MODULE:FUNCTION") from None
    if not callable(hook):
        raise ConfigError(f"serve.safety_hook: {name!r} is not a function")
    return cast("SafetyHook", hook)


class SafetyCalls:
    """Calls a hook in threads of its own, so that one that hangs holds none of those that write pictures' files.

    Args:
        hook: What is called.
    """

    def __init__(self, hook: SafetyHook) -> None:
        self.hook = hook
        self._threads = ThreadPoolExecutor(NUM_THREADS, "unclip-hook")
        self._begun_s: dict[object, float] = {}
        """When each call that has not ended began, by ``time.monotonic``."""
        self._is_hanging = False
        """What the log says."""

    async def reason(self, prompt: str, image: Images | None) -> str | None:
        """What the hook says of a picture, (H, W, 3), or of the prompt alone (None).

        Raises:
            DeadlinePassed: If it has not answered after a minute.
        """
        answer = while_wanted(lambda _: self._call(prompt, image), self._threads)
        try:
            return await until(time.monotonic() + _LONGEST_S, answer)
        except DeadlinePassed:
            raise DeadlinePassed(f"the server's safety hook has not answered within {_LONGEST_S:g} s") from None
        finally:
            self.look()

    def look(self) -> str:
        """See whether calls hang, and log it when that begins and ends.

        Returns:
            What is amiss, for whoever asks; empty: nothing.
        """
        now_s = time.monotonic()
        number = sum(now_s - begun_s >= _LONGEST_S for begun_s in tuple(self._begun_s.values()))
        if number and not self._is_hanging:
            _log.error(
                "serve.safety_hook has not answered for %g s; such a call keeps one of %d threads until it ends, and "
                "without a thread no picture is sent",
                _LONGEST_S,
                NUM_THREADS,
            )
        elif self._is_hanging and not number:
            _log.warning("serve.safety_hook: no call hangs any more")
        self._is_hanging = number > 0
        return f"calls of the safety hook hang: {number} of {NUM_THREADS}" if number else ""

    def _call(self, prompt: str, image: Images | None) -> str | None:
        this = object()
        self._begun_s[this] = time.monotonic()
        try:
            return self.hook(prompt, image)
        finally:
            del self._begun_s[this]


def open_safety(name: str, before: SafetyCalls | None) -> SafetyCalls | None:
    """Calls of the hook that a recipe names.

    Args:
        name: As ``load_hook`` takes it; empty: there is none.
        before: Those that this process has made until now. If the hook is the same, they go on: calls that hang keep
            their threads.

    Raises:
        ConfigError: If there is no such function.
    """
    if not name:
        return None
    hook = load_hook(name)
    return before if before is not None and before.hook is hook else SafetyCalls(hook)

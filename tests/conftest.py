"""What every test process does first."""

import os
import signal

import pytest

# One thread a process: two processes of two threads each, on two cores, wait for one another most of the time. Set
# before any test imports torch; Ray and its workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Children of a script's background job ignore Ctrl-C, which is among what is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: the others fill the time beside it."""
    items.sort(key=lambda item: "faults" not in item.path.parts)

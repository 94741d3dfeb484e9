"""Read by each Python process that has this folder in PYTHONPATH, before its first line: a clock that a test sets.

``UNCLIP_TEST_CLOCK`` names a file with the seconds by which the time of day is off; the test may change it at any moment.
"""

import os
import time
from pathlib import Path

_file = Path(os.environ.get("UNCLIP_TEST_CLOCK", os.devnull))
_time, _time_ns, _localtime = time.time, time.time_ns, time.localtime


def _off_s() -> int:
    return int(_file.read_text() or 0)


time.time = lambda: _time() + _off_s()
time.time_ns = lambda: _time_ns() + _off_s() * 1_000_000_000
time.localtime = lambda seconds=None: _localtime(time.time() if seconds is None else seconds)

"""One thread a process: two test processes of two threads each on two cores wait for one another most of the time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch; Ray and Ray's workers inherit it

"""How a process that computes networks uses its machine: the threads of torch, and the memory that a step has freed."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch

# Parameters of glibc's mallopt (malloc.h) and their values in bytes; 32 MiB is the largest threshold that it takes.
_KEEP_FREED_MEMORY = {
    -1: 1 << 30,  # M_TRIM_THRESHOLD: give the end of the heap back to the system only beyond this
    -3: 32 << 20,  # M_MMAP_THRESHOLD: take what is larger from the system, and give it back when it is freed
}


def use_cores(num_cpus: float) -> int:
    """Compute with as many threads as a process has cores, one at least, and keep the memory that a step frees.

    A step on the CPU frees the same activations as the step before it, and the next one asks for them again. glibc
    returns such memory to the system, most of all that of a thread that is not the main one, and then every page of it
    is a page fault and is filled with zeros again (docs/lab.md: about 18,000 a step of a small upsampler). A process
    keeps up to 1 GiB more than it uses instead. Whoever sets glibc's own variables (``MALLOC_TRIM_THRESHOLD_``, say) is
    not overruled.

    Args:
        num_cpus: Cores of this process, whole or in part.

    Returns:
        The number of threads.
    """
    num_threads = max(1, int(num_cpus))
    torch.set_num_threads(num_threads)
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # where the C library is another one
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, num_bytes in _KEEP_FREED_MEMORY.items():
                mallopt(parameter, num_bytes)
    return num_threads

"""How a process that computes networks uses its machine: the threads of torch, and the memory that a step has freed."""

from __future__ import annotations

import torch

from pipeline.allocator import keep_freed_memory

_KEPT_BYTES = 1 << 30


def use_cores(num_cpus: float) -> int:
    """Compute with as many threads as a process has whole cores, one at least, and keep what a step frees.

    A step on the CPU frees its activations, and the next one asks for the same again. A process keeps up to 1 GiB more
    than it uses for that.

    Returns:
        The number of threads.
    """
    num_threads = max(1, int(num_cpus))
    torch.set_num_threads(num_threads)
    keep_freed_memory(_KEPT_BYTES)
    return num_threads

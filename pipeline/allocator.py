"""The memory of a process: what it has freed, kept for its next picture or step; and errors that say that it lacks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re

# Parameters of glibc's mallopt (malloc.h); the last takes at most this.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_BLOCK_BYTES = 32 << 20
_HEAP_BYTES = 64 << 20  # of which the memory of a thread that is not the main one is made


def keep_freed_memory(num_bytes: int) -> None:
    """Let this process keep what it frees, up to so many bytes, in blocks of up to 32 MiB.

    Work that repeats frees memory and asks for the same again. glibc gives such memory back to the system in between,
    most readily that of a thread that is not the main one, and then each of its pages is a page fault and is filled
    with zeros again: a quarter of the time of decoding a photograph, up to a quarter of a training's step on a CPU
    (docs/lab.md). Whoever sets glibc's own variables (``MALLOC_TRIM_THRESHOLD_``, say) is not overruled; other C
    libraries stay as they are.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, num_bytes)


def keep_freed_heaps() -> None:
    """Let threads that are not the main one keep all that they free: that of a training holds its largest step anyway.

    glibc gives a heap of theirs that is free back to the system whatever the limit of ``keep_freed_memory`` is, unless
    as much as a heap is to stay.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_TOP_PAD, _HEAP_BYTES)


def return_freed_memory() -> None:
    """Give back to the system what this process has freed and keeps, of all its threads; glibc alone can be asked."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator"
    r"|(CUDA|HIP)( driver)? error: out of memory"
    r"|STATUS_ALLOC_FAILED|_ALLOCATION_FAILED|FFT_ALLOC_FAILED"  # cuBLAS, cuSOLVER, cuDNN, cuFFT
    r"|Cuda failure (\d+ )?'out of memory'|Failed to CUDA [mc]alloc"  # NCCL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of a GPU or of the machine.

    torch has a class of its own for a GPU's alone, and for its own allocator's alone: contexts, handles and buffers of
    CUDA's libraries are made beside it, and when they find no room, the words alone say so.
    """
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_NO_MEMORY.search(str(error)))

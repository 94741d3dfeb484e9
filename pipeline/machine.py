"""What this process may use of its machine: CPUs and memory within the limits of its container, pod or job; a port.

A limit is that of a control group, of version 1 or 2. It binds everything in the group and in the groups inside of it,
so the smallest counts of a process's own group and those around it. A container sees its own group as the outermost.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")
_VMSTAT = Path("/proc/vmstat")


def num_cpus() -> int:
    """Logical CPUs: as many of those that this process may run on as it may keep busy, rounded up; at least one."""
    of_process = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([of_process, *map(_quota, _groups("cpu"))])))


def memory_bytes() -> int:
    """Memory that this process and its neighbours in its group may have together, in bytes."""
    import psutil  # here, because a plan asks for CPUs alone and answers at once

    return int(min([psutil.virtual_memory().total, *map(_limit, _groups("memory"))]))


def free_memory_bytes() -> int:
    """Memory that is left, in bytes. The pages of files that were read count as free: they give way to a program's."""
    import psutil

    left = [_limit(group) - _used(group) for group in _groups("memory")]
    return int(max(0, min([psutil.virtual_memory().available, *left])))


def own_memory_bytes() -> int:
    """Memory of this process alone, in bytes: without pages of files, and without what it shares with others."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def num_oom_kills() -> int:
    """Processes that the kernel has ended so far because memory ran out; 0 where nobody counts them.

    They are those of this process's group; only where groups do not count them, those of the whole machine, whoever
    started them.
    """
    for group in _groups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            counts = _counts(group / name)
            if "oom_kill" in counts:
                return counts["oom_kill"]
    return _counts(_VMSTAT).get("oom_kill", 0)


def free_port() -> int:
    """Number of a TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process that a controller may limit, the innermost first."""
    for line in _text(_OF_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        outermost = _GROUPS / controller if controllers else _GROUPS
        own = outermost / path.strip("/")  # in some containers its path outside of them, which is not there
        yield from (group for group in (own, *own.parents) if group.is_relative_to(outermost) and group.is_dir())


def _quota(group: Path) -> float:
    """CPUs that a group may keep busy."""
    of_v1 = f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
    numbers = (_text(group / "cpu.max") or of_v1).split()
    return int(numbers[0]) / int(numbers[1]) if numbers and numbers[0].isdigit() else math.inf  # else "max", or -1


def _limit(group: Path) -> float:
    """Bytes that a group may have."""
    text = (_text(group / "memory.max") or _text(group / "memory.limit_in_bytes")).strip()
    return int(text) if text.isdigit() else math.inf


def _used(group: Path) -> int:
    """Bytes that a group has and that do not give way: not the pages of files, however often they were read."""
    text = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes") or "0"
    stat = _counts(group / "memory.stat")
    pages = (stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
    return int(text) - sum(pages)


def _counts(file: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    lines = [line.split() for line in _text(file).splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def _text(file: Path) -> str:
    """The content of a file of the kernel; empty if there is none that can be read."""
    with contextlib.suppress(OSError, UnicodeError):
        return file.read_text(encoding="ascii")
    return ""

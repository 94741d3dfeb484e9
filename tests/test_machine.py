"""CPUs and memory that a process may use: those of its machine, or as much as its control groups leave it."""

import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import machine

_GB = 10**9
_NO_LIMIT = 9223372036854771712
"""What version 1 says where there is none."""


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the groups of a machine with 64 CPUs and 256 GB, of which 200 are free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=256 * _GB, available=200 * _GB))
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OF_PROCESS", tmp_path / "of_process")
    monkeypatch.setattr(machine, "_VMSTAT", tmp_path / "vmstat")
    (tmp_path / "vmstat").write_text("nr_free_pages 9\noom_kill 7\n")
    return tmp_path / "cgroup"


def _write(groups: Path, of_process: str, files: dict[str, object]) -> None:
    (groups.parent / "of_process").write_text(of_process)
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{content}\n")


def _usable() -> tuple[int, float, float, int]:
    """CPUs, GB, free GB, and processes that were ended."""
    return (
        machine.num_cpus(),
        machine.memory_bytes() / _GB,
        machine.free_memory_bytes() / _GB,
        machine.num_oom_kills(),
    )


def test_without_groups_all_of_the_machine_is_there(groups: Path) -> None:
    assert not groups.exists()
    assert _usable() == (64, 256, 200, 7)


def test_a_container_of_version_2_has_what_its_group_leaves(groups: Path) -> None:
    files = {
        "cpu.max": "800000 100000",
        "memory.max": 16 * _GB,
        "memory.current": 10 * _GB,
        "memory.stat": f"anon 1\ninactive_file {4 * _GB}",
        "memory.events": "oom 3\noom_kill 2\noom_group_kill 1",
    }
    _write(groups, "0::/\n", files)
    assert _usable() == (8, 16, 10, 2)


def test_pages_of_files_that_are_read_again_and_again_count_as_free(groups: Path) -> None:
    """An index or weights that are mapped: version 1 says what is in the groups inside, too."""
    files: dict[str, object] = {"memory.max": 16 * _GB, "memory.current": 14 * _GB}
    _write(groups, "0::/\n", files | {"memory.stat": f"inactive_file {_GB}\nactive_file {11 * _GB}"})
    assert machine.free_memory_bytes() == 14 * _GB
    of_version_1 = f"active_file 1\ntotal_inactive_file {_GB}\ntotal_active_file {11 * _GB}"
    _write(groups, "0::/\n", files | {"memory.stat": of_version_1})
    assert machine.free_memory_bytes() == 14 * _GB


def test_a_group_without_limits_has_those_of_the_groups_around_it(groups: Path) -> None:
    unlimited = {"cpu.max": "max 100000", "memory.max": "max", "memory.current": _GB, "memory.events": "oom_kill 1"}
    around = {
        "cpu.max": "250000 100000",
        "memory.max": 8 * _GB,
        "memory.current": 3 * _GB,
        "memory.events": "oom_kill 5",
    }
    files = {f"job/step/{name}": content for name, content in unlimited.items()}
    _write(groups, "0::/job/step\n", files | {f"job/{name}": content for name, content in around.items()})
    assert _usable() == (3, 8, 5, 1)  # two CPUs and a half keep three busy in turns


@pytest.mark.parametrize("path", ["/docker/f00", "/"])  # the first is the path outside, which the container has not
def test_a_container_of_version_1_has_what_its_groups_leave(groups: Path, path: str) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": 200000,
        "cpu/cpu.cfs_period_us": 100000,
        "memory/memory.limit_in_bytes": 16 * _GB,
        "memory/memory.usage_in_bytes": 10 * _GB,
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * _GB}",
        "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4",
    }
    _write(groups, f"5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::{path}\n", files)
    assert _usable() == (2, 16, 10, 4)


def test_what_version_1_says_of_a_group_without_limits_is_no_limit(groups: Path) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100000,
        "memory/memory.limit_in_bytes": _NO_LIMIT,
        "memory/memory.usage_in_bytes": 10 * _GB,
    }
    _write(groups, "5:memory:/\n4:cpu,cpuacct:/\n", files)
    assert _usable() == (64, 256, 200, 7)


def test_a_process_that_is_bound_to_some_cpus_has_no_others(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(groups, "0::/\n", {"cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert machine.num_cpus() == 1


def test_a_process_has_what_it_made_and_not_the_pages_of_files_that_it_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1" * 64_000_000)
    before = machine.own_memory_bytes()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped.find(b"2") == -1
        assert machine.own_memory_bytes() < before + 32_000_000
    # Not from the allocator, which may have kept as much of what other tests have freed.
    with mmap.mmap(-1, 64_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert machine.own_memory_bytes() > before + 32_000_000

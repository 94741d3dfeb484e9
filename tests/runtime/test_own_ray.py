"""A Ray of our own: its CPUs, and what runs beside the workers."""

import subprocess
import sys
from typing import Any

import pytest
from ray.dashboard.modules.reporter import reporter_consts

from pipeline.recipe import schedule
from pipeline.runtime import connection

_CHILDREN = """
import contextlib
import psutil
from pipeline.runtime.connection import connect

with connect():
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            print(child.name(), *child.cmdline())
"""


def test_a_ray_of_our_own_has_the_cpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in connection._OWN_RAY.items():
        monkeypatch.setenv(name, value)
    started = dict[str, Any]()
    monkeypatch.setattr(connection.ray, "init", lambda **options: started.update(options))
    for num_cpus, logical in ((3, 3), (1, 2)):
        monkeypatch.setattr(schedule, "num_cpus", lambda num_cpus=num_cpus: num_cpus)
        connection._start_here()
        assert started["num_cpus"] == logical


@pytest.mark.ray
def test_a_ray_of_our_own_sends_nobody_what_its_workers_print() -> None:
    children = subprocess.run([sys.executable, "-c", _CHILDREN], check=True, capture_output=True, text=True).stdout
    assert "raylet" in children
    assert "log_monitor" not in children


def test_what_is_set_for_a_ray_of_our_own_is_what_ray_reads() -> None:
    assert all(hasattr(reporter_consts, name) for name in connection._OWN_RAY)

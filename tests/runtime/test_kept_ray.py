"""What a server is told of a Ray that another process holds; tests/faults kills the server beside a real one."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Generator

import pytest

from pipeline.errors import StepError
from pipeline.runtime import connection
from pipeline.runtime.kept_ray import KeptRay
from pipeline.serve.keeper import Kept


def test_a_ray_that_does_not_start_is_the_servers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def fail() -> Generator[None]:
        raise StepError("Ray did not start on this machine")
        yield

    monkeypatch.setattr(connection, "connect", fail)
    own_ray = KeptRay(print, has_spare=False)
    with socket.socket() as listener:
        own_ray.hold(Kept(listener, 0))
    for _ in range(2):  # a server that is started again reads the same
        with pytest.raises(StepError, match="Ray did not start on this machine"), own_ray.join():
            pass


def test_a_ray_that_has_ended_is_named() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own_ray = KeptRay(print, has_spare=False)
    own_ray._notes.write({"address": "127.0.0.1:1", "servers": [ended.pid]})
    with pytest.raises(StepError, match=rf"Ray has ended with the server \(process {ended.pid}\)"), own_ray.join():
        pass


def test_a_ray_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.kept_ray._LONGEST_START_S", 0.1)
    with pytest.raises(StepError, match=r"Ray has not started within 0.1 s"), KeptRay(print, has_spare=False).join():
        pass

"""The spare process of a Ray of our own, and the actor that takes it."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from pipeline.runtime import connection, spare
from pipeline.runtime.kept_ray import KeptRay
from pipeline.serve.keeper import Kept

_TAKE = """
import contextlib, json, sys, time
import psutil, ray
from pipeline.runtime import spare
from pipeline.runtime.connection import connect, own_servers

@ray.remote(num_cpus=0)
class Replica:
    def look(self):
        return psutil.Process().pid, "torch" in sys.modules

def idle():
    return [child.pid for child in raylet.children() if spare._is_idle(child)]

def has_loaded(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[:1] == ["ray::IDLE"]

def wait_for_one():
    while not any(map(has_loaded, raylet.children())):
        time.sleep(0.1)
    time.sleep(2 * spare._LOOK_EVERY_S)  # others would have come, or have ended after a second
    return idle()

spare.load_ahead()
with connect(), contextlib.ExitStack() as keeping:
    servers, lines = own_servers(), []
    [raylet] = (server for server in servers if server.name() == "raylet")
    result = {"first": idle()}
    keeping.enter_context(spare.keeping_spare(servers, lines.append))
    result["idle"] = wait_for_one()
    replicas = [Replica.remote() for _ in result["idle"]]
    result["replicas"] = ray.get([replica.look.remote() for replica in replicas])
    result["next"] = wait_for_one()
    print(json.dumps({**result, "lines": lines}))
"""


@pytest.mark.ray
def test_actors_take_the_idle_processes_which_have_loaded_torch_and_one_more_comes() -> None:
    done = subprocess.run([sys.executable, "-c", _TAKE], check=True, capture_output=True, text=True, timeout=200)
    result = json.loads(done.stdout)
    [other] = result["next"]
    assert (result["first"], len(result["idle"]), result["lines"]) == ([], 2, [])  # for the controller and a replica
    assert sorted(result["replicas"]) == [[pid, True] for pid in sorted(result["idle"])]
    assert other not in result["idle"]


_OPEN_NO_GPU = """
import importlib, torch
from pipeline.runtime import spare

def refuse(*_):
    raise AssertionError("a GPU is opened before Ray says which one")

for name in ("init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, refuse)
for module in spare.RAY["RAY_preload_python_modules"].split(","):
    importlib.import_module(module)
"""


def test_what_is_loaded_ahead_opens_no_gpu() -> None:
    subprocess.run([sys.executable, "-c", _OPEN_NO_GPU], check=True, timeout=100)


@contextlib.contextmanager
def process_without_children(file: Path) -> Generator[psutil.Process]:
    """A process with the name of a file, which is made."""
    file.symlink_to(sys.executable)
    with subprocess.Popen([file, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


_NODE = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1}


@pytest.mark.parametrize(
    ("nodes", "name", "module"),
    [
        ([_NODE], "raylet", ""),
        ([{}], "raylet", ""),
        ([_NODE, _NODE], "raylet", ""),
        ([_NODE], "ray", ""),
        ([_NODE], "raylet", "ray._private.grpc_utils"),
        ([_NODE], "raylet", "ray.core.generated"),
    ],
    ids=["nobody listens", "other words", "two machines", "no raylet", "a module", "a package"],
)
def test_that_ray_starts_none_is_said_once_whatever_the_reason(
    nodes: list[dict[str, object]], name: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Parts of Ray that are private may be others in its next release."""
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    looks, lines = list[float](), list[str]()
    with process_without_children(tmp_path / name) as raylet:

        def end_after_three(seconds: float) -> bool:
            looks.append(seconds)
            if len(looks) == 3:
                raylet.kill()
                raylet.wait()
            return False

        spare._keep([raylet], lines.append, _ended(end_after_three))
    assert len(looks) == 3
    assert len(lines) == 1
    assert lines[0].startswith("Ray keeps no spare process, so a replica that dies takes longer to be back: ")


def _ended(wait: Callable[[float], bool], *, is_set: bool = False) -> Any:
    return SimpleNamespace(wait=wait, is_set=lambda: is_set)


def test_nothing_is_said_of_a_ray_that_is_being_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [_NODE])
    looks, lines = list[float](), list[str]()
    with process_without_children(tmp_path / "raylet") as raylet:
        spare._keep(
            [raylet], lines.append, _ended(lambda seconds: looks.append(seconds) or len(looks) == 3, is_set=True)
        )
    assert (len(looks), lines) == (3, [])


_IMPORTS = """
import sys
import pipeline.runtime.connection, pipeline.runtime.kept_ray, pipeline.runtime.spare
print([name for name in sys.modules if name.startswith(("ray._private.grpc", "ray.core.generated.node_manager"))])
"""


def test_what_only_the_spare_needs_of_ray_is_imported_for_it_alone() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTS], check=True, capture_output=True, text=True, timeout=100)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("has_spare", [True, False])
def test_a_recipe_says_whether_there_is_one(monkeypatch: pytest.MonkeyPatch, *, has_spare: bool) -> None:
    asked = list[str]()
    monkeypatch.setattr(spare, "load_ahead", lambda: asked.append("modules"))
    monkeypatch.setattr(spare, "keeping_spare", lambda *_: asked.append("process") or contextlib.nullcontext())
    monkeypatch.setattr(connection, "connect", contextlib.nullcontext)
    monkeypatch.setattr(connection, "own_servers", list)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    with socket.socket() as listener:
        KeptRay(print, has_spare=has_spare).hold(Kept(listener, 0))
    assert asked == (["modules", "process"] if has_spare else [])

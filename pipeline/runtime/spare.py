"""A spare process of our own Ray: a replica that was killed is started again in it.

Most of the time until a replica is back goes into a new process, which loads Python, Ray Serve and torch. Ray starts a
process before there is work for it, if it is asked to, and lets it load modules meanwhile.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from pipeline.runtime.connection import are_alive

RAY = {
    "RAY_preload_python_modules": "ray.serve._private.replica,pipeline.runtime.replicas,pipeline.serve.engine",
    # Without these Ray keeps an idle process for each CPU that is free, which would load the same.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
}
"""Environment variables of a Ray whose processes are replicas."""
_KEEP_S = 10 * 365 * 86400
_ANSWERS_S = 5.0
_LOOK_EVERY_S = 2.0
_FIRST = 2
"""Ray Serve's controller and a replica are asked for at once, and load on a core each."""
_FAILURES_TO_SAY = 2
"""One look may be at a Ray that just ends."""


def load_ahead() -> None:
    """Have all processes of a Ray that is started after this load what a replica does, before they are one.

    No module of these opens a GPU: which one a replica has is said when it begins.
    """
    os.environ.update({name: value for name, value in RAY.items() if name not in os.environ})


@contextmanager
def keeping_spare(servers: Sequence[psutil.Process], announce: Callable[[str], None]) -> Generator[None]:
    """Have one process of our own Ray idle inside a block; it takes about .45 GB of memory.

    Args:
        servers: Of our own Ray.
        announce: Takes a line if Ray starts none, for whatever reason: a replica that is killed then takes longer to be
            back, and nothing else is amiss.
    """
    ended = threading.Event()
    threading.Thread(target=_keep, args=(servers, announce, ended), name="unclip-spare", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _keep(servers: Sequence[psutil.Process], announce: Callable[[str], None], ended: threading.Event) -> None:
    address, num_failures, number = "", 0, _FIRST
    while are_alive([*servers]):
        try:
            [raylet] = (server for server in servers if server.name() == "raylet")
            address = address or _address()
            if not any(map(_is_idle, raylet.children())):
                _start(address, number)
                number = 1
        except Exception as error:  # noqa: BLE001  (private parts of Ray, which no request depends on)
            num_failures += 1
            if num_failures == _FAILURES_TO_SAY and not ended.is_set():
                announce(f"Ray keeps no spare process, so a replica that dies takes longer to be back: {error!r}")
        else:
            num_failures = 0
        if ended.wait(_LOOK_EVERY_S):
            return


def _address() -> str:
    """Of the raylet, ``host:port``."""
    import ray

    [node] = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _start(address: str, number: int) -> None:
    """Ask the raylet for processes, by a call for which Ray has no Python function."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    messages: Any = node_manager_pb2  # its classes are made when it is imported
    request = messages.PrestartWorkersRequest(num_workers=number, keep_alive_duration_secs=_KEEP_S)
    request.runtime_env_info.serialized_runtime_env = "{}"
    channel: Any = init_grpc_channel(address)
    with channel:
        stub: Any = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        stub.PrestartWorkers(request, timeout=_ANSWERS_S)


def _is_idle(process: psutil.Process) -> bool:
    """Whether a process of Ray waits for work, or starts."""
    with contextlib.suppress(psutil.Error):
        title = process.cmdline()
        return title[:1] == ["ray::IDLE"] or any(part.endswith("default_worker.py") for part in title)
    return False

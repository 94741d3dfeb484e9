"""The drawn source's picture servers: one on every node of the cluster, since its URLs say 127.0.0.1."""

import contextlib
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import ConfigError
from pipeline.shapes.server import HOST, serve_pictures

_PORT_WAIT_S = 10.0


@contextlib.contextmanager
def served_pictures(port: int) -> Generator[None]:
    """Serve the drawn pictures on this node and on every other that is alive now, inside the block.

    Args:
        port: The port that the URLs name.

    Raises:
        ConfigError: If the port is taken by something else.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_serve_patiently(port))
        actors: list[Any] = []
        for node in others:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            actors.append(cast("Any", _Server).options(scheduling_strategy=strategy).remote())
            stack.callback(ray.kill, actors[-1])
        ray.get([actor.start.remote(port) for actor in actors])
        yield


@ray.remote(num_cpus=0)
class _Server:
    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def start(self, port: int) -> None:
        """Serve, unless this machine serves already: the nodes of a test may share one machine."""
        if not answers(port):
            self._stack.enter_context(_serve_patiently(port))


@contextlib.contextmanager
def _serve_patiently(port: int) -> Generator[None]:
    """Serve, waiting for the port: the server of a killed run frees it after a moment."""
    give_up = time.monotonic() + _PORT_WAIT_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(serve_pictures(port))
                break
            except ConfigError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.3)
        yield


def answers(port: int) -> bool:
    """Whether a picture server is there, on this machine."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=2) as answer:
            return answer.read() == b"ok\n"
    except (urllib.error.URLError, OSError):
        return False

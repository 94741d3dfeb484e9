"""A Ray cluster of several nodes on this machine."""

import contextlib
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.tiny.command import ROOT


@contextlib.contextmanager
def cluster_without_cpus() -> Generator[Cluster]:
    """A head as that of cluster.yaml, to which machines come later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield cluster
        finally:
            cluster.shutdown()


@contextlib.contextmanager
def joined_cluster() -> Generator[Cluster]:
    """The same with one machine of two CPUs; this process is its driver."""
    with cluster_without_cpus() as cluster:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()


def drain(cluster: Cluster, node: Any, *, seconds: int) -> None:
    """What a watcher of spot notices does."""
    options = {"--address": cluster.address, "--node-id": node.node_id, "--deadline-remaining-seconds": str(seconds)}
    options |= {"--reason": "DRAIN_NODE_REASON_PREEMPTION", "--reason-message": "a spot notice"}
    words = [word for option in options.items() for word in option]
    ray_command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    subprocess.run([*ray_command, "drain-node", *words], check=True, timeout=60)

"""The Ray that this process uses: a cluster, or one of its own on this machine, and whether that one is still there."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import psutil
import ray
from ray._private.worker import global_worker

from pipeline.errors import StepError, UnclipError, first_line
from pipeline.recipe.schedule import logical_cpus
from pipeline.runtime.placement import DISK
from pipeline.workspace.cache import free_bytes, recipe_variables

PUT_TOKEN = (
    "put it into ~/.ray/auth_token, or into a file that RAY_AUTH_TOKEN_PATH names; on the head node "
    "`ray get-auth-token` prints it"
)
"""What to do with the token of a cluster."""
_CONNECT_TIMEOUT_S = 5.0
_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_OWN_RAY = {
    # Its agent looks at every process of the machine for a dashboard, which is not there. Every 5 s that took 1 % of a
    # core.
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
}
"""Environment variables of a Ray of our own."""


@contextlib.contextmanager
def connect(address: str = "") -> Generator[None]:
    """Connect to Ray inside a block: to a cluster, or to one of our own that ends with the block.

    Args:
        address: Cluster address (``auto``, ``host:port``, ``ray://...``); empty: our own, on this machine's loopback.

    Raises:
        StepError: If no cluster answers at the address, or none could be started here.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Our own Ray uses a token by default; its long notice about that helps nobody here.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    # Workers import this tree by name, in whatever folder the command runs. They inherit the path through the
    # environment, because Ray cannot use its prestarted workers with a runtime_env.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if address:
        _require_listener(address)
        _send_token_if_asked(address)
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            variables = recipe_variables()
            ray.init(address=address, runtime_env={"env_vars": variables} if variables else None, **quiet)
        else:
            _start_here(**quiet)
            _end_log_monitor()
    except Exception as error:  # noqa: BLE001  (Ray itself raises a bare Exception when a busy machine starts it slowly)
        reason = first_line(error)
        if address:
            raise StepError(f"no Ray cluster at {address}: {reason}") from None
        raise StepError(f"Ray did not start on this machine: {reason} Run again; finished work is kept") from None
    # Ray's handler of SIGTERM ends the process with a stack dump: restore the handler of before.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(**options: Any) -> None:
    """Start a Ray of our own; where the machine is so busy that its first server is given up, once more."""
    os.environ.update({name: value for name, value in _OWN_RAY.items() if name not in os.environ})
    for tries_left in (1, 0):
        try:
            ray.init(address="local", num_cpus=logical_cpus(), resources=_disk(), include_dashboard=False, **options)
        except Exception:
            ray.shutdown()  # ends what was started
            if not tries_left:
                raise
        else:
            return


def _end_log_monitor() -> None:
    """It sends what workers print to drivers that ask for it, as ours do not, and took 2 % of a core."""
    with contextlib.suppress(Exception):  # a private method of Ray, which nothing depends on
        cast(Any, global_worker.node).kill_log_monitor(check_alive=False)


def _disk() -> dict[str, float]:
    """What this machine offers of disk to steps that ask for it: none if the cache's folder cannot be used."""
    with contextlib.suppress(UnclipError, OSError):
        return {DISK: free_bytes() // 1e9}
    return {}


def _require_listener(address: str) -> None:
    """Check the port first, because Ray waits for minutes if nobody listens.

    Raises:
        StepError: If nobody listens at ``host:port``.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StepError(f"no Ray cluster at {address}: {error}; start one with `ray start --head`") from None


def _send_token_if_asked(address: str) -> None:
    """Let this process use the token of its home folder with a cluster that asks for one.

    Ray does so by itself only for the address ``auto``. With a cluster that asks for none it must not be used: workers
    there have no token to call this process with.

    Raises:
        StepError: If the cluster asks for a token and there is none here.
    """
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_CLUSTER_ID)(b"", timeout=_CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            if cast(Any, error).code() is not grpc.StatusCode.UNAUTHENTICATED:
                return  # ray.init says what is wrong
        else:
            return
    if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        raise StepError(f"the cluster at {address} asks for its token: {PUT_TOKEN}")


def own_servers() -> list[psutil.Process]:
    """The servers of our own Ray; empty on a cluster, whose servers are no children of this process."""
    return [child for child in psutil.Process().children() if child.name() in {"gcs_server", "raylet"}]


def _is_alive(server: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return server.status() != psutil.STATUS_ZOMBIE
    return False


def are_alive(servers: list[psutil.Process]) -> bool:
    """Whether all servers of a Ray run."""
    return all(map(_is_alive, servers))


def require_alive(servers: list[psutil.Process]) -> None:
    """Notice at once that Ray is gone; Ray itself waits a minute and then ends the process without a message.

    Raises:
        StepError: If a server has ended.
    """
    if not are_alive(servers):
        raise StepError(
            "Ray on this machine has ended in the middle of the run (killed, or the machine is out of memory); "
            "what is finished is kept, run the same command again to continue"
        )

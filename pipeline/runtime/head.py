"""Watches the head of a cluster for a driver, which Ray ends without a word if the head stays away for a minute."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator

import ray

from pipeline.errors import StepError

_LOOK_S, _CONNECT_S = 2.0, 3.0
_SAY_AFTER_S, _SPARE_S = 5.0, 10.0
_PATIENCE_OF_RAY = "RAY_gcs_rpc_server_reconnect_timeout_s"


@contextlib.contextmanager
def watched_head(address: str, warned: Callable[[str], None]) -> Generator[None]:
    """While the block runs, say that the cluster's head went away; if it stays away, end the process, exit code 4.

    Calls to Ray hang while the head is away, so nothing in them could raise an error. What the process leaves behind is
    what ``kill -9`` of it leaves: the next run continues.

    Args:
        address: As ``connect``; without one, or with Ray's client, nothing is watched.
        warned: Receives the sentences.
    """
    if not address or address.startswith("ray://"):
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(ray.get_runtime_context().gcs_address, warned, ended), name="head", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(head: str, warned: Callable[[str], None], ended: threading.Event) -> None:
    patience_s, since, is_said = float(os.environ.get(_PATIENCE_OF_RAY, "60")) - _SPARE_S, 0.0, False
    while not ended.wait(_LOOK_S):
        if _listens(head):
            if is_said:
                warned(f"the head of the cluster, {head}, answers again")
            since, is_said = 0.0, False
            continue
        since = since or time.monotonic()
        away_s = time.monotonic() - since
        if away_s > patience_s:
            warned(f"the cluster went away: its head, {head}, has not answered for {away_s:.0f} s; {_KEPT}")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(StepError.exit_code)
        if away_s > _SAY_AFTER_S and not is_said:
            is_said = True
            warned(
                f"the head of the cluster, {head}, does not answer; this command ends in {patience_s - away_s:.0f} s"
            )


_KEPT = "what is finished is kept, run the same command again when the cluster is back"


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        return True
    return False

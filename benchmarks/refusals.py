"""The cost of search bodies of 23 MB that the server refuses: time until the answer, processor time, memory.

    python -m benchmarks.refusals [--rounds 20]

A text of many characters, one of many escapes, many numbers, base64 of no picture, and what is no JSON: each just below
the route's limit of 24 MB, sent to a server in a process of its own, over one connection. The wall time begins with the
first byte that is sent. Memory is the highest above that before the requests. Required: less than 200 ms and 100 MB.
"""

import argparse
import multiprocessing
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import psutil

from benchmarks.side_by_side import publish
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import PICTURE_BODY_LIMIT_BYTES, ApiSettings, create_app
from pipeline.serve.guards import Guards
from pipeline.serve.http_server import HttpServer, listen
from pipeline.serve.protocols import Neighbours, PictureModel
from tests.ports import free_port

_NUM_BYTES = PICTURE_BODY_LIMIT_BYTES - (1 << 20)
_HEAD = b'{"modality": "image", "num_images": 3, '
BODIES = {
    "one long text": _HEAD + b'"text": "' + b"x" * _NUM_BYTES + b'"}',
    "a text of escapes": _HEAD + b'"text": "' + b"a\\n" * (_NUM_BYTES // 3) + b'"}',
    "numbers": _HEAD + b'"embedding_input": [' + b"1," * (_NUM_BYTES // 2) + b"1]}",
    "base64 of no picture": _HEAD + b'"image": "' + b"AAAA" * (_NUM_BYTES // 4) + b'"}',
    "no JSON": b"{" * _NUM_BYTES,
}
_LONGEST_MS = 200.0
_MOST_MB = 100.0


def _serve(port: int, pipe: Connection) -> None:
    """The server's process; no request gets as far as its networks."""
    nobody: Any = object()
    app = create_app(cast("PictureModel", nobody), cast("Neighbours", nobody), ApiSettings(ModelCard("none", 64)))
    with HttpServer(Guards(app), listen("127.0.0.1", port)):
        pipe.send("listens")
        pipe.recv()


@contextmanager
def running() -> Generator[tuple[str, psutil.Process]]:
    """A server in a process of its own: the address of its search, and the process."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(port, there), daemon=True)
    process.start()
    try:
        here.recv()
        yield f"http://127.0.0.1:{port}/knn-service", psutil.Process(process.pid)
        here.send("end")
        process.join(20)
    finally:
        process.kill()


def measure(what: str, body: bytes, url: str, server: psutil.Process, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    walls_ms, processor_ms = list[float](), list[float]()
    with httpx.Client(timeout=60) as client:
        client.post(url, content=b"{}")
        before_mb = _forget_peak_mb(server)
        for _ in range(rounds):
            busy_s, started_s = sum(server.cpu_times()[:2]), time.perf_counter()
            status = client.post(url, content=body).status_code
            walls_ms.append(1000 * (time.perf_counter() - started_s))
            processor_ms.append(1000 * (sum(server.cpu_times()[:2]) - busy_s))
    if status not in {400, 413}:
        raise RuntimeError(f"{what}: answered with {status}")
    median, most = np.percentile(walls_ms, (50, 90))
    return {
        "body": what,
        "status": status,
        "wall_ms": float(median),
        "wall_ms_90": float(most),
        "floor_ms": _LONGEST_MS,
        "processor_ms": float(np.median(processor_ms)),
        "memory_mb": _peak_mb(server) - before_mb,
        "floor_mb": _MOST_MB,
    }


def _forget_peak_mb(server: psutil.Process) -> float:
    """Let the kernel measure the highest memory anew; what the process has now, in MB."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    return _peak_mb(server)


def _peak_mb(server: psutil.Process) -> float:
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) * 1024 / 1e6


def main() -> None:
    """Send each body, and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with running() as (url, server):
        rows = [measure(what, body, url, server, arguments.rounds) for what, body in BODIES.items()]
    publish("refusals", rows, vars(arguments))


if __name__ == "__main__":
    main()

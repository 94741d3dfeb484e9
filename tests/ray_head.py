"""A real Ray cluster on one machine: on free ports, in a folder of its own, ended by its processes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ports import free_ports


@dataclass(frozen=True)
class RayHead:
    """Where it can be reached: ``address`` for ray.init, ``dashboard`` for jobs."""

    address: str
    dashboard: str
    folder: Path
    pid: int
    """Of the process whose children are the cluster."""


@contextlib.contextmanager
def ray_head(
    *,
    num_cpus: int = 2,
    environment: dict[str, str] | None = None,
    ports: Sequence[int] = (),
    python: str = sys.executable,
) -> Generator[RayHead]:
    """``ray start --head --block``; RAY_AUTH_MODE is off unless ``environment`` says otherwise.

    ``ports``: six, so that a head is where one before it was. ``python``: that of every process of the cluster.
    """
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # socket paths must stay short
    gcs, dashboard, agent, agent_grpc, client, metrics = ports or free_ports(6)
    command = [
        python, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={folder}", f"--num-cpus={num_cpus}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
        "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    settings = inherited | {"RAY_AUTH_MODE": "disabled"} | (environment or {})
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(url, process, folder / "start.log")
        yield RayHead(f"127.0.0.1:{gcs}", url, folder, process.pid)
    finally:
        end_with_children(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
        except urllib.error.HTTPError:  # it asks for its token: it is up
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"no dashboard after 60 s: {log.read_text()}")


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a process and every one that it started, and no other."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for member in psutil.wait_procs(family, timeout=3)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=5)
    if process.poll() is None:
        process.kill()
        process.wait(5)

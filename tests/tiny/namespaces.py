"""A Ray cluster whose machines are network namespaces of this one, each on a cable that can be pulled.

A bridge in the head's namespace joins the cables. Files are shared, as on a cluster with one file system.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.runtime.placement import ROLE
from tests.ray_head import end_with_children
from tests.tiny.command import ROOT

_NETWORK = "10.77.83"
_PORT = 6379
_START_S = 120
# A machine counts as lost after 3 missed answers in place of Ray's 5, each awaited for 2 s in place of 10.
_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "2000",
    "PYTHONPATH": str(ROOT),
}


def why_not() -> str:
    """Why this machine does not let us make network namespaces; empty if it does."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "there is no ip (iproute2) or no unshare (util-linux) here"
    name = f"unclip-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Machines:
    """The machines of a cluster, by number: 0 is the head, which has no CPUs."""

    prefix: str
    folder: Path
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict[int, "subprocess.Popen[bytes]"])

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{_NETWORK}.1:{_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of the cluster."""
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | _SETTINGS

    def command(self, number: int, words: Sequence[str]) -> list[str]:
        """A command as it runs on a machine."""
        return ["ip", "netns", "exec", self.space(number), *words]

    def space(self, number: int) -> str:
        """Name of the namespace of a machine."""
        return f"{self.prefix}-{number}"

    def name(self, number: int) -> str:
        """What the machine calls itself."""
        return "head" if number == 0 else f"far-{number}"

    def start(self, number: int) -> None:
        """Start Ray on a machine."""
        of_head = [
            "--head",
            f"--port={_PORT}",
            f"--temp-dir={self.folder}",
            "--include-dashboard=false",
            "--num-cpus=0",
        ]
        words = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={_NETWORK}.{number + 1}",
            *(of_head if number == 0 else [f"--address={self.address}", "--num-cpus=1"]),
            f"--labels={ROLE}={'head' if number == 0 else 'far'}",
            "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name(number)} && exec "$@"', "sh", *words]
        with (self.folder / f"start-{number}.log").open("ab") as log:
            self.processes[number] = subprocess.Popen(
                self.command(number, named), env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def cut(self, number: int) -> None:
        """Pull the cable of a machine."""
        _ip("-n", self.space(0), "link", "set", f"cable-{number}", "down")

    def mend(self, number: int) -> None:
        """Plug it in again."""
        _ip("-n", self.space(0), "link", "set", f"cable-{number}", "up")

    def workers(self, number: int, title: str) -> list[psutil.Process]:
        """Ray's workers on a machine whose title has this word."""
        found = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.processes[number].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(part.startswith("ray::") and title in part for part in child.cmdline()):
                        found.append(child)
        return found

    def end(self, number: int) -> None:
        """End what runs on a machine."""
        end_with_children(self.processes.pop(number))


@contextlib.contextmanager
def machines(num_far: int) -> Generator[Machines]:
    """A head without CPUs, and machines of one CPU."""
    made = Machines(f"unclip-{os.getpid()}", Path(tempfile.mkdtemp(prefix="n", dir="/tmp")))  # sockets: short paths
    try:
        for number in range(num_far + 1):
            _ip("netns", "add", made.space(number))
            _ip("-n", made.space(number), "link", "set", "lo", "up")
        _ip("-n", made.space(0), "link", "add", "bridge", "type", "bridge")
        _plug(made.space(0), "bridge", f"{_NETWORK}.1")
        for number in range(1, num_far + 1):
            ends = (f"cable-{number}", "netns", made.space(0), "type", "veth")
            _ip("link", "add", *ends, "peer", "name", "plug", "netns", made.space(number))
            _ip("-n", made.space(0), "link", "set", f"cable-{number}", "master", "bridge")
            made.mend(number)
            _plug(made.space(number), "plug", f"{_NETWORK}.{number + 1}")
        for number in range(num_far + 1):
            made.start(number)
            _wait_for_log(made, number)
        yield made
    finally:
        for number in sorted(made.processes, reverse=True):
            made.end(number)
        for number in range(num_far + 1):
            subprocess.run(["ip", "netns", "del", made.space(number)], check=False, capture_output=True)
        shutil.rmtree(made.folder, ignore_errors=True)


def _plug(space: str, device: str, address: str) -> None:
    _ip("-n", space, "address", "add", f"{address}/24", "dev", device)
    _ip("-n", space, "link", "set", device, "up")
    # Ray finds a machine's own address by the way to the internet, which nothing here has.
    _ip("-n", space, "route", "add", "default", "via", f"{_NETWORK}.254", "dev", device)


def _wait_for_log(made: Machines, number: int) -> None:
    log, end = made.folder / f"start-{number}.log", time.monotonic() + _START_S
    while "Ray runtime started" not in log.read_text():
        if time.monotonic() > end or made.processes[number].poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.2)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")

"""What each worker of a run has printed, by the name of its step and its own.

Ray keeps a log of each process, under numbers that only Ray knows. So a worker that begins gives its process' log a
name, as a link beside it on its machine, and writes a line into it: a process that does one task after another has one
log, and these lines divide it. The logs of a job on a cluster are listed and read through its dashboard; those of a run
on this machine are files here, also when its Ray has ended.
"""

import contextlib
import json
import re
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import requests
from ray._common.utils import get_default_ray_temp_dir
from ray._private.worker import global_worker

from pipeline.addresses import without_secrets
from pipeline.errors import ConfigError, StepError
from pipeline.runtime.dashboard import DEFAULT_ADDRESS, dashboard_client
from pipeline.runtime.jobs import find_job

_PREFIX, _RUN = "unclip-log", "unclip-run"
_STREAMS = ("out", "err")
_BEGINS = re.compile(r"^== unclip (\S+) begins ==$", re.MULTILINE)
_OF_RAY = re.compile(r"^:(?:job_id|task_name|actor_name):.*\n", re.MULTILINE)
"""Lines that Ray writes for itself."""
_TIMEOUT_S = 20.0
_MOST_SAME = 1000


@dataclass(frozen=True)
class WorkerLog:
    """The log of one worker."""

    step: str
    worker: str
    machine: str
    """Name or address of its machine; empty: this one."""
    read: Callable[[], str]
    """Reads what it has printed so far."""

    @property
    def name(self) -> str:
        """How a person asks for it."""
        return f"{self.step}/{self.worker}"


@contextlib.contextmanager
def logged(step: str, worker: str) -> Generator[None]:
    """Name the log of this process inside the block; an error of the block is written into it, too.

    Args:
        step: Name of the step.
        worker: Name of the worker, unique on its machine at that moment. Where another process of the run had it before
            (a training that began again), a number is appended.
    """
    out, err = global_worker.get_out_file_path(), global_worker.get_err_file_path()
    if ray.is_initialized() and out and err:
        name = f"{step}.{re.sub(r'[^A-Za-z0-9]+', '-', worker)}"
        with contextlib.suppress(OSError):  # a full disk is no reason to end a worker
            name = _link(Path(out), Path(err), name)
        for stream in (sys.stdout, sys.stderr):
            print(f"== unclip {name} begins ==", file=stream, flush=True)
    with failures_logged():
        yield


@contextlib.contextmanager
def failures_logged() -> Generator[None]:
    """Write an error of the block into the log of this process; Ray hands it to the driver alone."""
    try:
        yield
    except Exception:
        sys.stderr.write(without_secrets(traceback.format_exc()))
        raise


def _link(out: Path, err: Path, name: str) -> str:
    """Link both files under the first name that is free, or theirs already; returns it."""
    job = ray.get_runtime_context().get_job_id()
    for number in range(1, _MOST_SAME):
        numbered = name if number == 1 else f"{name}-{number}"
        links = [out.parent / f"{_PREFIX}.{job}.{numbered}.{stream}" for stream in _STREAMS]
        try:
            for link, file in zip(links, (out, err), strict=True):
                link.symlink_to(file.name)
        except FileExistsError:
            if links[0].resolve() == out.resolve():
                return numbered
        else:
            return numbered
    return name


def note_run(workspace: str) -> None:
    """Note in the folder of Ray's logs on this machine whose run it is, for ``logs_here``."""
    node: Any = global_worker.node
    file = Path(node.get_logs_dir_path()) / f"{_RUN}.{ray.get_runtime_context().get_job_id()}.json"
    with contextlib.suppress(OSError):
        file.write_text(json.dumps({"workspace": workspace}), encoding="utf-8")


def logs_here(workspace: str) -> list[WorkerLog]:
    """The logs of the newest run in a workspace that has been on this machine, as far as they are on this machine.

    Raises:
        StepError: If there has been none, or its logs have been removed.
    """
    notes = Path(get_default_ray_temp_dir()).glob(f"session_2*/logs/{_RUN}.*.json")
    ours = [note for note in notes if _workspace_of(note) == workspace]
    if not ours:
        raise StepError(
            f"no logs of a run in {workspace} on this machine: none has run here since its temporary folder was "
            "emptied; those of a job are read by its id: unclip logs JOB"
        )
    newest = max(ours, key=lambda note: note.stat().st_mtime)
    job, folder = newest.name.split(".")[1], newest.parent
    names = [file.name for file in folder.glob(f"{_PREFIX}.{job}.*.out")]

    def read(name: str) -> str:
        try:
            return (folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # its link is left: what empties temporary folders goes by the age of each
            return f"== unclip {'.'.join(name.split('.')[2:-1])} begins ==\n(removed from {folder})\n"

    return _logs(names, "", read)


def _workspace_of(note: Path) -> str:
    try:
        return json.loads(note.read_text(encoding="utf-8"))["workspace"]
    except (OSError, ValueError, KeyError):  # removed, or being written
        return ""


def logs_of_job(job_id: str, address: str = DEFAULT_ADDRESS) -> tuple[list[WorkerLog], list[str]]:
    """The logs of a job's workers on the machines that are there, and the names of machines that have gone.

    Args:
        job_id: Its id, or a beginning of it that no other job has.
        address: URL of the cluster's dashboard.

    Raises:
        ConfigError: If there is no such job, or more than one; names the candidates.
        StepError: If no cluster answers, or not well.
    """
    client, url = dashboard_client(address)
    details = find_job(client, job_id)
    if details.driver_info is None:
        return [], []

    def get(path: str, **query: str) -> requests.Response:
        any_client: Any = client  # `ray logs` asks like this; the client's own request brings the token along
        try:
            reply: requests.Response = any_client._do_request("GET", path, params=query, timeout=_TIMEOUT_S)
        except requests.exceptions.RequestException as error:
            raise StepError(f"the cluster at {url} does not answer ({type(error).__name__})") from None
        return reply

    logs, lost_machines = list[WorkerLog](), list[str]()
    nodes = get("/api/v0/nodes", limit="10000")
    if not nodes.ok:
        raise StepError(f"the cluster at {url} does not list its machines: {nodes.text.strip()[:200]}")
    for node in nodes.json()["data"]["result"]["result"]:
        if node["state"] != "ALIVE":
            lost_machines.append(node["node_ip"])
            continue

        def read(name: str, node_id: str = node["node_id"]) -> str:
            reply = get("/api/v0/logs/file", node_id=node_id, filename=name, lines="-1")
            return reply.text if reply.ok else f"(its machine does not answer: {reply.text.strip()[:200]})\n"

        reply = get("/api/v0/logs", node_id=node["node_id"], glob=f"{_PREFIX}.{details.driver_info.id}.*")
        groups = cast("dict[str, list[str]]", reply.json()["data"]["result"] or {}) if reply.ok else {}
        names = [name for group in groups.values() for name in group if name.endswith(".out")]
        logs += _logs(names, node["node_ip"], read)
    return sorted(logs, key=lambda log: (log.step, log.worker, log.machine)), lost_machines


def _logs(names: list[str], machine: str, read: Callable[[str], str]) -> list[WorkerLog]:
    """The logs with these files for standard output."""
    logs = list[WorkerLog]()
    for name in sorted(names):
        *_, step, worker, _ = name.split(".")

        def read_both(stem: str = name.removesuffix("out"), own: str = f"{step}.{worker}") -> str:
            return "".join(own_part(read(f"{stem}{stream}"), own) for stream in _STREAMS)

        logs.append(WorkerLog(step, worker, machine, read_both))
    return logs


def own_part(text: str, name: str) -> str:
    """What a process has printed under a name: from each line that says so to the next such line."""
    pieces = _BEGINS.split(_OF_RAY.sub("", text))
    return "".join(piece.lstrip("\n") for owner, piece in zip(pieces[1::2], pieces[2::2], strict=True) if owner == name)


def logs_by_name(logs: list[WorkerLog], words: str, lost_machines: list[str]) -> list[WorkerLog]:
    """The logs of a step, or of one of its workers.

    Args:
        logs: All of a run.
        words: ``STEP`` or ``STEP/WORKER``.
        lost_machines: Machines that are no longer there.

    Raises:
        ConfigError: If there is none; names those that there are.
    """
    of_name = [log for log in logs if words in {log.step, log.name}]
    if not of_name:
        names = ", ".join(dict.fromkeys(log.name for log in logs)) or "none"
        without = f"; machines that have gone took theirs along: {', '.join(lost_machines)}" if lost_machines else ""
        raise ConfigError(f"{words}: no log of that name; there are {names}{without}")
    return of_name

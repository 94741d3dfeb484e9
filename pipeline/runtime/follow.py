"""Follow a job from another machine: its log, and the live table that its run publishes.

The table is a file beside the job's log, on the machine of the job, and is read through the same dashboard. So it needs
neither the workspace nor its credentials, and comes through a token or a tunnel as the log does.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray._private.worker import global_worker
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobSubmissionClient

from pipeline.errors import StepError
from pipeline.runtime.dashboard import DEFAULT_ADDRESS, dashboard_client
from pipeline.runtime.jobs import LostError, exit_code_of, find_job, is_final, job_details, logs_of

_TABLE_S = 1.0
_TIMEOUT_S = 5.0
Write = Callable[[str], None]


class TablePublisher:
    """Writes the live table of a run beside its job's log, once a second at most.

    Args:
        job_id: The job's id.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._written_at = float("-inf")

    def __call__(self, table: str) -> None:
        """Publish the table, if the run is connected to Ray."""
        now = time.monotonic()
        if now - self._written_at < _TABLE_S or not ray.is_initialized():
            return
        self._written_at = now
        node: Any = global_worker.node
        file = Path(node.get_logs_dir_path()) / _file_name(self._job_id)
        temporary = file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk of the machine is no reason to end a run
            temporary.write_text(table, encoding="utf-8")
            temporary.replace(file)


def follow_job(job_id: str, write: Write, address: str = DEFAULT_ADDRESS, show: Write | None = None) -> int:
    """Write what a job prints, from its start to its end; an interrupt ends this function, not the job.

    Args:
        job_id: Its id, or a beginning of it that no other job has.
        write: Takes pieces of text, line ends included.
        address: URL of the cluster's dashboard.
        show: Takes the live table of the run every second, as it was published; None: nobody looks at it.

    Returns:
        The job's exit code; 130 if it was stopped.

    Raises:
        ConfigError: If there is no such job, or more than one; names the candidates.
        StepError: If no cluster answers.
        LostError: If the cluster, or the machine of the job's driver, goes away before the job ends.
    """
    client, url = dashboard_client(address)
    name = str(find_job(client, job_id).submission_id)
    num_written = 0
    while True:
        details = job_details(client, name, url)
        if is_final(details):
            break
        num_written = asyncio.run(_follow(client, details, num_written, write, show))
        time.sleep(0.3)
    text = logs_of(client, details)
    write(text[num_written:])
    if details.status.value == "FAILED" and not text:
        write(f"error: {_why_not_started(details.message or '')}\n")
    code = exit_code_of(details)
    if code is None and details.driver_info is not None:  # it had begun, and nobody has seen its end
        raise LostError(f"the machine of job {name} went away ({_first_line(details.message)}); finished work is kept")
    return StepError.exit_code if code is None else code


def _why_not_started(message: str) -> str:
    """Why a job has printed nothing, in one line; what pip says is among the lines of Ray's message."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "the job failed before it has printed anything, and Ray does not say why"
    if "runtime_env" not in lines[0]:
        return lines[0]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    why = errors[-1] if errors else lines[-1]
    return (
        f"the environment of the job could not be made, and nothing was started: {why}; "
        "see job.pip and job.extras of the recipe"
    )


def _first_line(message: str | None) -> str:
    return next((line.strip() for line in (message or "").splitlines() if line.strip()), "Ray does not say why")


async def _follow(
    client: JobSubmissionClient, details: JobDetails, num_written: int, write: Write, show: Write | None
) -> int:
    """Write a log from character ``num_written`` until the connection ends; returns the characters written so far."""
    async with _shown(client, details, show):
        position = 0
        # The connection also ends when the job does, or for a moment when its machine is not known yet.
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
            async for text in client.tail_job_logs(str(details.submission_id)):
                fresh = text[max(0, num_written - position) :]
                position += len(text)
                if fresh:
                    write(fresh)
                    num_written = position
        return num_written


@contextlib.asynccontextmanager
async def _shown(client: JobSubmissionClient, details: JobDetails, show: Write | None) -> AsyncGenerator[None]:
    """Show the table inside the block."""
    if show is None:
        yield
        return
    task = asyncio.create_task(_show(client, details, show))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _show(client: JobSubmissionClient, details: JobDetails, show: Write) -> None:
    while True:
        # A dashboard that does not answer for a moment is asked again; the log says it if it has gone.
        with contextlib.suppress(RuntimeError, requests.exceptions.RequestException):
            if details.driver_node_id is None:
                details = await asyncio.to_thread(client.get_job_info, str(details.submission_id))
            table = await asyncio.to_thread(_read_table, client, details)
            if table:
                show(table)
        await asyncio.sleep(_TABLE_S)


def _read_table(client: JobSubmissionClient, details: JobDetails) -> str:
    """The table that a job's run has published last; empty if there is none."""
    if details.driver_node_id is None:
        return ""
    query = {"node_id": details.driver_node_id, "filename": _file_name(str(details.submission_id)), "lines": "-1"}
    # `ray logs` asks like this; the client's own request brings the token along.
    any_client: Any = client
    reply: requests.Response = any_client._do_request("GET", "/api/v0/logs/file", params=query, timeout=_TIMEOUT_S)
    return reply.text if reply.status_code == requests.codes.ok else ""


def _file_name(job_id: str) -> str:
    return f"unclip-{job_id}.json"

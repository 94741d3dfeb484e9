"""Recipes as Ray jobs: each job runs ``unclip run`` on a cluster, near the data.

A job's id is a digest of its plan, so that submitting a recipe twice does not run it twice. The source tree and the
resolved recipe are uploaded with the job; the cluster's machines need only the dependencies.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobSubmissionClient

from pipeline.addresses import without_password
from pipeline.errors import ConfigError, StepError, first_line
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.tables import to_dict
from pipeline.runtime.dashboard import DEFAULT_ADDRESS, dashboard_client, is_loopback
from pipeline.runtime.environment import STOP_S, pack_secrets, runtime_environment, secret_values

PACKAGES = ("models", "pipeline", "jobs")
_SHIPPED_SUFFIXES = {".py", ".html", ".typed"}
_AGENT_TIMEOUT_S = 60.0
_FINAL = {"SUCCEEDED", "FAILED", "STOPPED"}
_STOPPED_EXIT_CODE = 130


class LostError(StepError):
    """A job whose cluster, or whose driver's machine, has gone before its end."""


@dataclass(frozen=True)
class Job:
    """One submitted recipe, as the cluster knows it."""

    job_id: str
    recipe: str
    """Name of the recipe."""
    status: Literal["pending", "running", "succeeded", "failed", "stopped"]
    message: str
    """The cluster's message on the status."""
    started: str
    """UTC, ISO 8601; empty before."""
    ended: str
    """UTC, ISO 8601; empty before."""
    exit_code: int | None
    """Exit code of ``unclip run``, 130 if it was stopped; None before its end."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Submission:
    """The outcome of a request to run a recipe."""

    job_id: str
    state: Literal["submitted", "attached", "succeeded"]
    """submitted: a new job; attached: it was submitted before; succeeded: it is done, nothing was started."""
    address: str

    @property
    def message(self) -> str:
        """One line for people."""
        return {
            "submitted": f"submitted to {self.address}",
            "attached": f"already on its way at {self.address}, nothing new was started",
            "succeeded": f"has succeeded at {self.address}, nothing was started (--again runs it again)",
        }[self.state]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"message": self.message}


def submit_recipe(
    recipe: Recipe,
    *,
    address: str = DEFAULT_ADDRESS,
    until: str = "",
    python: str = "",
    again: bool = False,
    source: Path | None = None,
    shown_as: str = "",
) -> Submission:
    """Run a recipe on a cluster, unless the same recipe is running there or has succeeded there.

    Args:
        recipe: A checked recipe. Relative local paths are relative to the current folder.
        address: URL of the cluster's dashboard.
        until: Last step; empty: all.
        python: Interpreter on the cluster. Empty: the one of this process where the cluster has it (this machine, or
            machines with the same paths), else ``python``.
        again: Start a new attempt although one has succeeded (for example, its workspace was removed).
        source: Root of the tree to ship; None: the tree of this process.
        shown_as: The recipe in the commands that the job proposes at its end; empty: the shipped file.

    Raises:
        ConfigError: If the address is no URL, ``until`` is no step, or a local input or a secret is missing.
        StepError: If no cluster answers, it refuses, or it gets no agent ready in time.
    """
    recipe = with_absolute_paths(recipe)
    base = job_name(recipe, until)
    client, url = dashboard_client(address)
    attempts = _attempts(client, base)
    if attempts:
        newest = attempts[max(attempts)]
        status = _status(newest)
        if status in {"pending", "running"}:
            return Submission(str(newest.submission_id), "attached", url)
        if status == "succeeded" and not again:
            return Submission(str(newest.submission_id), "succeeded", url)
    environment, secrets = runtime_environment(recipe.job), secret_values(recipe.job, os.environ)
    number = max(attempts, default=0) + 1
    job_id = base if number == 1 else f"{base}-{number}"
    workspace = without_password(recipe.workspace)  # for people, on the cluster's dashboard
    may_be_ours = is_loopback(url) and "pip" not in environment  # pip's environment has an interpreter of its own
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        _pack(source or Path(__file__).parents[2], recipe, Path(folder))
        environment |= {"working_dir": folder} | pack_secrets(secrets, Path(folder))
        started = _retrying(
            lambda: client.submit_job(
                entrypoint=_entrypoint(python, until, shown_as, job_id, may_be_ours=may_be_ours),
                submission_id=job_id,
                runtime_env=environment,
                metadata={"unclip": "1", "recipe": recipe.name, "until": until, "workspace": workspace},
            ),
            job_id,
        )
    return Submission(job_id, "submitted" if started else "attached", url)


def list_jobs(address: str = DEFAULT_ADDRESS) -> list[Job]:
    """The recipes submitted to a cluster, the newest first.

    Raises:
        ConfigError: If the address is no URL.
        StepError: If no cluster answers.
    """
    client, _ = dashboard_client(address)
    jobs = [_view(details) for details in client.list_jobs() if _is_ours(details)]
    return sorted(jobs, key=lambda job: job.started, reverse=True)


def job_logs(job_id: str, address: str = DEFAULT_ADDRESS) -> str:
    """What a job has printed so far.

    Args:
        job_id: Its id, or a beginning of it that no other job has.
        address: URL of the cluster's dashboard.

    Raises:
        ConfigError: If there is no such job, or more than one; names the candidates.
        StepError: If no cluster answers.
    """
    client, _ = dashboard_client(address)
    return logs_of(client, find_job(client, job_id))


def stop_job(job_id: str, address: str = DEFAULT_ADDRESS) -> str:
    """Interrupt a job, wait for its end and give its last status; its trainings write a checkpoint first.

    Args:
        job_id: Its id, or a beginning of it that no other job has.
        address: URL of the cluster's dashboard.

    Raises:
        ConfigError: If there is no such job, or more than one; names the candidates.
        StepError: If no cluster answers, or the job outlives its time to stop.
    """
    client, url = dashboard_client(address)
    name = str(find_job(client, job_id).submission_id)
    client.stop_job(name)
    deadline = time.monotonic() + STOP_S + 15
    while time.monotonic() < deadline:
        details = job_details(client, name, url)
        if is_final(details):
            return _status(details)
        time.sleep(0.2)
    raise StepError(f"job {name} did not stop within {STOP_S + 15} s; see `unclip logs {name}`")


def job_name(recipe: Recipe, until: str = "") -> str:
    """The id of a recipe's first attempt: its name, and a digest of the plan's keys and the workspace."""
    keys = [[step.name, step.key] for step in make_plan(recipe, until=until)]
    digest = hashlib.sha256(json.dumps([keys, recipe.workspace]).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', recipe.name).strip('-') or 'unclip'}-{digest}"


def _pack(source: Path, recipe: Recipe, folder: Path) -> None:
    for package in PACKAGES:
        for path in sorted((source / package).rglob("*")):
            if path.suffix in _SHIPPED_SUFFIXES and "__pycache__" not in path.parts:
                target = folder / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=1, sort_keys=True), encoding="utf-8")


def entrypoint(recipe: str, until: str, shown_as: str = "", python: str = "python", job_id: str = "") -> str:
    """The shell command of a job.

    Args:
        recipe: The recipe's file on the cluster.
        until: Last step; empty: all.
        shown_as: The recipe in the commands that the job proposes; empty: the file.
        python: Interpreter on the cluster.
        job_id: The job's id, under which its live table is published; empty: nowhere.
    """
    options = {"--until": until, "--shown-as": shown_as, "--job": job_id}
    words = [word for name, value in options.items() if value for word in (name, value)]
    return shlex.join(["exec", python, "-m", "jobs.job", "run", recipe, "--address", "auto", *words])


def _entrypoint(python: str, until: str, shown_as: str, job_id: str, *, may_be_ours: bool) -> str:
    if python or not may_be_ours:
        return entrypoint("recipe.json", until, shown_as, python or "python", job_id)
    # A loopback address may be the end of an SSH tunnel: the interpreter of this process need not exist there.
    here = shlex.quote(sys.executable)
    here_first, other = (entrypoint("recipe.json", until, shown_as, one, job_id) for one in (sys.executable, "python"))
    return f"if [ -x {here} ]; then {here_first}; else {other}; fi"


def _retrying(start: Callable[[], Any], job_id: str) -> bool:
    """Submit, waiting for a cluster that has just started; False if another submitter was faster."""
    deadline = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            start()
        except RuntimeError as error:
            text = str(error)
            if "already exists" in text or "already been used" in text:
                return False
            if "No available agent" not in text or time.monotonic() > deadline:
                raise StepError(f"job {job_id} was not accepted: {first_line(error)}") from None
            time.sleep(1)
        else:
            return True


def _attempts(client: JobSubmissionClient, base: str) -> dict[int, JobDetails]:
    pattern = re.compile(re.escape(base) + r"(?:-(\d+))?")
    attempts: dict[int, JobDetails] = {}
    for details in client.list_jobs():
        match = pattern.fullmatch(details.submission_id or "")
        if match:
            attempts[int(match[1] or 1)] = details
    return attempts


def find_job(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """The job of a recipe, by its id or a beginning of it.

    Raises:
        ConfigError: If there is no such job, or more than one; names the candidates.
    """
    ours = {str(details.submission_id): details for details in client.list_jobs() if _is_ours(details)}
    matches = [job_id] if job_id in ours else [name for name in ours if name.startswith(job_id)]
    if len(matches) == 1:
        return ours[matches[0]]
    if matches:
        raise ConfigError(f"job {job_id}: more than one begins like that: {', '.join(sorted(matches))}")
    raise ConfigError(f"job {job_id}: no such job; there are {', '.join(sorted(ours)) or 'none'}")


def job_details(client: JobSubmissionClient, name: str, url: str) -> JobDetails:
    """What the cluster says of a job now.

    Raises:
        LostError: If the cluster has gone away.
    """
    try:
        return client.get_job_info(name)
    except (RuntimeError, requests.exceptions.RequestException) as error:
        raise LostError(
            f"the cluster at {url} went away while job {name} ran ({type(error).__name__}); finished work is kept"
        ) from None


def logs_of(client: JobSubmissionClient, details: JobDetails) -> str:
    """What a job has printed so far."""
    # A job that never reached its machine has no log file there.
    with contextlib.suppress(RuntimeError):
        return client.get_job_logs(str(details.submission_id))
    return ""


def _is_ours(details: JobDetails) -> bool:
    return bool(details.submission_id) and "unclip" in (details.metadata or {})


def is_final(details: JobDetails) -> bool:
    """Whether a job has ended."""
    return details.status.value in _FINAL


def exit_code_of(details: JobDetails) -> int | None:
    """Exit code of a job's ``unclip run``, 130 if it was stopped; None before its end, or if it has never begun."""
    return _STOPPED_EXIT_CODE if _status(details) == "stopped" else details.driver_exit_code


def _status(details: JobDetails) -> Literal["pending", "running", "succeeded", "failed", "stopped"]:
    return cast("Any", details.status.value.lower())


def _view(details: JobDetails) -> Job:
    return Job(
        job_id=str(details.submission_id),
        recipe=(details.metadata or {}).get("recipe", ""),
        status=_status(details),
        message=details.message or "",
        started=_utc(details.start_time),
        ended=_utc(details.end_time),
        exit_code=exit_code_of(details),
    )


def _utc(time_ms: int | None) -> str:
    return datetime.fromtimestamp(time_ms / 1000, tz=UTC).isoformat(timespec="seconds") if time_ms else ""

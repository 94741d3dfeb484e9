"""What a submitted job brings to every machine: packages, environment variables, and the values of secrets.

Ray writes a job's environment variables into its logs. So secrets travel as a file of the job's package instead, which
only Ray's user may read; ``jobs.job`` takes them into the environment of each process.
"""

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipe.job_sections import JobConfig
from pipeline.runtime.stopping import STOP_WAIT_S

SECRETS = "secrets.json"
"""Names and values, beside the packages of the job."""
STOP_S = int(STOP_WAIT_S) + 30
"""Longest time of a job to end after it is stopped."""
_SETUP_S = 1800
"""Longest time for pip on a machine; Ray first copies the machine's own environment if it is a virtual one."""
_TAKE_SECRETS = "jobs.job.take_secrets"
_OF_EXTRA = re.compile(r"(?:\s*and\s*)?extra\s*==\s*[\"'](\w+)[\"']")


def runtime_environment(config: JobConfig) -> dict[str, Any]:
    """The environment of a job in Ray's words, without its files and without secrets.

    Args:
        config: The recipe's table.
    """
    # Ray's own way to stop is SIGTERM, then SIGKILL after 3 s: too short for a checkpoint.
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "RAY_USAGE_STATS_ENABLED": "0"}
    environment: dict[str, Any] = {"env_vars": config.env | stop}
    packages = [*config.pip, *(line for extra in config.extras for line in requirements_of(extra))]
    if packages:
        environment["pip"] = {"packages": packages, "pip_check": False}  # of machines with more than our packages
        environment["config"] = {"setup_timeout_seconds": _SETUP_S}
    return environment


def requirements_of(extra: str) -> list[str]:
    """The packages of an extra of unclip, as lines of a requirements file."""
    lines = list[str]()
    for line in requires("unclip") or ():
        requirement, _, marker = line.partition(";")
        if extra in _OF_EXTRA.findall(marker):
            rest = _OF_EXTRA.sub("", marker).strip()
            lines.append(f"{requirement.strip()}; {rest}" if rest else requirement.strip())
    return lines


def secret_values(config: JobConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The values of a job's secrets.

    Args:
        config: The recipe's table.
        environment: Where they are.

    Raises:
        ConfigError: If some are not there.
    """
    missing = [name for name in config.secrets if name not in environment]
    if missing:
        raise ConfigError(
            f"job.secrets: {', '.join(missing)}: not set here; export what the job is to have, and submit again"
        )
    return {name: environment[name] for name in config.secrets}


def pack_secrets(values: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write secrets into the package of a job; returns what its environment needs beside.

    Args:
        values: By name.
        folder: The package.
    """
    if not values:
        return {}
    file = os.open(folder / SECRETS, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        json.dump(dict(values), stream)
    return {"worker_process_setup_hook": _TAKE_SECRETS}

"""The command, in a process of its own or in this one."""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from jobs.cli import main

ROOT = Path(__file__).parents[2]


def start_unclip(
    *arguments: str, cwd: Path = ROOT, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, with more variables in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def is_proposal(line: str) -> bool:
    """Whether a line is of the commands that a command proposes at its end."""
    return line.startswith(("next:", "  "))


def unclip(
    *arguments: str,
    cwd: Path = ROOT,
    timeout_s: float = 280,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; its output, both streams in order, is in ``stdout``."""
    process = start_unclip(*arguments, cwd=cwd, environment=environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def unclip_here(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has loaded torch already: for tests that are not about processes.

    One that ends well must have said what is useful next, unless it is asked for JSON.
    """
    output, errors = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["unclip", *arguments]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(action="default"),
            pytest.raises(SystemExit) as exit_,
        ):
            main()
    finally:
        sys.argv = argv
    code = int(exit_.value.code or 0)
    if code == 0 and not {"--json", "--version", "--help"} & {*arguments}:
        assert "\nnext:\n  " in f"\n{errors.getvalue()}", arguments
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def unclip_json(*arguments: str) -> Any:
    """Run the command here with ``--json``; what it printed on standard output."""
    done = unclip_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

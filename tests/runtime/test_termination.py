"""SIGTERM ends a run as Ctrl-C does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.tiny import ROOT, tiny_recipe


@pytest.mark.ray
def test_sigterm_ends_a_run_with_one_line_and_keeps_what_is_finished(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, port=free_port())
    run = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(recipe), "--until", "download"],
        cwd=ROOT, env=os.environ | {"RAY_raylet_start_wait_time_s": "150"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stderr is not None
    said = [next((line for line in run.stderr if "pairs: done" in line), "no step was done")]
    run.send_signal(signal.SIGTERM)
    output, rest = run.communicate(timeout=60)
    said += rest.splitlines()
    assert run.returncode == 130, said
    assert said[-1].startswith("interrupted; what is finished is kept")
    assert not [line for line in [output, *said] if "Traceback" in line or "SIGTERM" in line or "Aborted" in line]
    assert list(tmp_path.rglob("pairs/*/manifest.json"))

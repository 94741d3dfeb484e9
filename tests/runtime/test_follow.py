"""A run that is followed from a terminal elsewhere: through a token, and without its workspace."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.tiny.command import ROOT, unclip
from tests.tiny.recipe import write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture
def head(tmp_path: Path, ray_head: Any) -> Iterator[Any]:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.delenv("RAY_AUTH_MODE", raising=False)
        with ray_head(environment=settings) as head:
            yield head


def _on_terminal(*words: str) -> tuple[int, str]:
    """The command with a terminal as its standard output; exit code and what it wrote."""
    ours, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words], cwd=ROOT, stdout=its, stderr=subprocess.STDOUT
    ) as process:
        os.close(its)
        pieces: list[bytes] = []
        try:
            while piece := os.read(ours, 65536):
                pieces.append(piece)
        except OSError:  # Linux: the other end is closed
            pass
        finally:
            os.close(ours)
    return process.returncode, b"".join(pieces).decode()


def _jobs(head: Any) -> list[str]:
    return [job["job_id"] for job in json.loads(unclip("jobs", "--address", head.dashboard, "--json").stdout)]


@pytest.mark.slow
def test_a_terminal_that_follows_a_job_has_its_live_table(head: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=free_port())
    words = [str(path), "--set", "tracking.uri=off", "--until", "download", "--address", head.dashboard, "--follow"]
    words += ["--set", "download.resources.max_rate_per_host=10.0"]  # the table is read every second
    code, text = _on_terminal("submit", *words)
    assert code == 0, text
    assert "of 2 steps done" in text
    assert "        download          " in text
    assert "download: done in" in text
    [file] = (head.folder / "session_latest/logs").glob("unclip-tiny-*.json")
    assert json.loads(file.read_text())["num_steps"] == 2
    # Once more: it is done, its log is all there is.
    code, text = _on_terminal("submit", *words)
    assert (code, "steps done" in text) == (0, False)
    assert "download: done in" in text
    # Its workers' logs are read in the same way, by name.
    [job] = _jobs(head)
    done = unclip("logs", job, "--address", head.dashboard)
    assert done.returncode == 0, done.stdout
    assert "logs of workers: download/" in done.stdout
    assert ", pairs/controller\n" in done.stdout
    done = unclip("logs", job, "pairs", "--address", head.dashboard)
    assert re.match(r"== pairs/controller on [0-9.]+ ==\nnext:\n", done.stdout), done.stdout
    done = unclip("logs", job, "clip/9", "--address", head.dashboard)
    assert (done.returncode, "clip/9: no log of that name; there are download/" in done.stdout) == (2, True)


_BARRIER = """
import sys, time
from pathlib import Path
import pipeline.runtime.jobs as jobs
from jobs.cli import main

folder, number, pack = Path(sys.argv.pop(1)), sys.argv.pop(1), jobs._pack

def packs_when_both_have_looked(*arguments):
    pack(*arguments)
    (folder / number).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.001)

jobs._pack = packs_when_both_have_looked
main()
"""


def test_of_two_submits_at_once_one_runs_and_the_other_follows_it(head: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=free_port())
    (tmp_path / "barrier").mkdir()
    words = [str(path), "--set", "tracking.uri=off", "--until", "pairs", "--address", head.dashboard, "--follow"]
    start = [sys.executable, "-c", _BARRIER, str(tmp_path / "barrier")]
    both = [
        subprocess.Popen(
            [*start, number, "submit", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in "12"
    ]
    texts = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sorted(words in text for text in texts for words in ["submitted to", "nothing new was started"]) == [
        False, False, True, True,
    ]  # fmt: skip
    assert all("pairs: done in" in text for text in texts), texts
    assert len(_jobs(head)) == 1

"""A run that is followed from a terminal elsewhere: through a token, and without its workspace."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.tiny.command import ROOT
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


def test_a_terminal_that_follows_a_job_has_its_live_table(head: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=free_port())
    words = [str(path), "--set", "tracking.uri=off", "--until", "pairs", "--address", head.dashboard, "--follow"]
    code, text = _on_terminal("submit", *words)
    assert code == 0, text
    assert "run: unknown time to go; 0 of 1 steps done" in text
    assert "        pairs             " in text
    assert "pairs: done in" in text
    [file] = (head.folder / "session_latest/logs").glob("unclip-tiny-*.json")
    assert json.loads(file.read_text())["num_steps"] == 1
    # Once more: it is done, its log is all there is.
    code, text = _on_terminal("submit", *words)
    assert (code, "steps done" in text) == (0, False)
    assert "pairs: done in" in text

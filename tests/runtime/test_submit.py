"""A whole recipe as a job on a Ray cluster, by the README's own lines, to its end."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.readme import shell_commands
from tests.tiny import free_port, tiny_recipe, unclip


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_submit_runs_a_whole_recipe_on_a_cluster_and_not_twice(ray_head: Any, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    recipe = tmp_path / "configs/demo.toml"
    text = tiny_recipe(tmp_path, port=free_port()).read_text()
    recipe.write_text(text.replace(str(tmp_path / "workspace"), "workspace").replace('"tiny"', '"demo"'))
    by_name = {words[0]: words for words in shell_commands()}

    def typed(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = [word for word in by_name[name] if word not in {"--address", "http://127.0.0.1:8265"}]
        return unclip(*words, *more, "--address", head.dashboard, cwd=tmp_path, timeout_s=500)

    with ray_head() as head:
        changes = ("--set", "tracking.uri=off", "--set", "evaluate.num_shown=1")
        first = typed("submit", *changes)
        assert first.returncode == 0, first.stdout
        for line in ("evaluate: done in", "ran 10 steps in", f"report: {tmp_path}/workspace/report.html"):
            assert line in first.stdout
        # What the job proposes is for the folder that it was submitted from.
        assert f"\n  unclip serve configs/demo.toml {' '.join(changes)}\n" in first.stdout
        status = unclip("status", "configs/demo.toml", *changes, cwd=tmp_path)
        assert status.stdout.count(" done ") == 10, status.stdout

        before = _commits(tmp_path)
        second = typed("submit", *changes)
        assert second.returncode == 0, second.stdout
        assert "has succeeded" in second.stdout
        assert len(before) == 10
        assert _commits(tmp_path) == before

        assert typed("jobs").stdout.count("succeeded") == 1
        assert "evaluate: done in" in typed("logs").stdout
        assert typed("stop").stdout == "demo: succeeded\n"


def _commits(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "workspace").glob("*/*/manifest.json")}

"""A training that another start has replaced while it hung, as on a machine that was cut off: it changes nothing more."""

import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StepError
from pipeline.train.job import run_job
from pipeline.train.resume import checkpoint_steps
from pipeline.workspace.fence import FencedArtifact, begin_attempt
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import LIVE, Artifact
from tests.tiny.command import ROOT
from tests.tiny.storage import fail_calls
from tests.tiny.training import no_watch, tiny_inputs, tiny_job, training_recipe

_HANGS = """
import sys, time
from dataclasses import replace
from pathlib import Path
from pipeline.train.job import run_job
from pipeline.workspace.fence import FencedArtifact
from pipeline.workspace.store import Artifact
from tests.tiny.training import tiny_job, training_recipe

folder = Path(sys.argv[1])
inputs = {name: Artifact(str(folder / name)) for name in ("download", "embed", "clip")}

def watch(done, total, message):
    if done == 3:
        (folder / "hangs").touch()
        while not (folder / "goes on").exists():
            time.sleep(0.05)

output = FencedArtifact(str(folder / "output"), "first")
run_job(replace(tiny_job("upsampler_1", inputs, folder / "output", training_recipe(12)), output=output), watch)
"""


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_training_that_comes_back_removes_no_checkpoint_and_changes_no_network(
    tmp_path: Path, *, is_committed: bool
) -> None:
    inputs, folder = tiny_inputs(tmp_path), tmp_path / "output"
    output = Artifact(str(folder))
    begin_attempt(output, "first")
    with subprocess.Popen(
        [sys.executable, "-c", _HANGS, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as old:
        try:
            while not (tmp_path / "hangs").exists():
                assert old.poll() is None
                time.sleep(0.05)
            begin_attempt(output, "second")
            job = tiny_job("upsampler_1", inputs, folder, training_recipe(12))
            run_job(replace(job, output=FencedArtifact(str(folder), "second")), no_watch)
            if is_committed:
                names = {"step": "upsampler_1", "key": "output", "step_version": 1}
                output.commit(Manifest(**names, section={}, inputs={}, files=output.describe_files()))
            else:
                assert checkpoint_steps(output) == [8, 10]  # the other one's next is of step 4
            before = _digests(folder)
            (tmp_path / "goes on").touch()
            errors = old.communicate(timeout=60)[1]
        finally:
            old.kill()
    assert old.returncode == 1
    assert "StepError: another start of this step has taken over" in errors
    assert _digests(folder) == before
    assert any(name.startswith(LIVE) for name in before) != is_committed


def _write_while_taken_over(first: Artifact, output: Artifact) -> None:
    with first.write("b") as path:
        path.write_bytes(b"b")
        begin_attempt(output, "second")


def test_only_the_newest_start_writes_and_removes(tmp_path: Path) -> None:
    output = Artifact(str(tmp_path))
    first, second = (FencedArtifact(str(tmp_path), name) for name in ("first", "second"))
    with pytest.raises(StepError, match="another start"):
        first.write_json("a.json", 1)
    begin_attempt(output, "first")
    first.write_json("a.json", 1)
    with pytest.raises(StepError, match="another start"):
        _write_while_taken_over(first, output)
    assert output.names() == ["a.json", "live/attempt.json"]
    for change in (
        lambda: first.remove("a.json"), lambda: first.remove_all(["a.json"]), first.clear_temporaries
    ):  # fmt: skip
        with pytest.raises(StepError, match="another start"):
            change()
    second.remove("a.json")
    assert output.names() == ["live/attempt.json"]


def test_a_start_is_not_taken_for_an_older_one_where_the_storage_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_attempt(Artifact(str(tmp_path)), "first")
    failed = fail_calls(monkeypatch, "open", ends=("attempt.json",))
    FencedArtifact(str(tmp_path), "first").write_json("a.json", 1)
    assert len(failed) == 1
    assert Artifact(str(tmp_path)).read_json("a.json") == 1

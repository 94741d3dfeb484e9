"""Logs of workers on this machine, by the names of their steps."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import requests

from pipeline.errors import ConfigError, StepError
from pipeline.runtime import worker_logs
from pipeline.runtime.calls import call
from pipeline.runtime.worker_logs import WorkerLog, logs_by_name, logs_here, logs_of_job, note_run, own_part
from tests.ports import free_port
from tests.tiny.command import unclip_here
from tests.tiny.recipe import write_recipe


def _say(word: str) -> None:
    print(word)
    print(f"{word} on the other stream", file=sys.stderr)
    if word == "no":
        raise ValueError("the reason")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_each_task_has_a_log_of_its_own_with_its_error_in_full(tmp_path: Path) -> None:
    note_run(str(tmp_path))
    for name, word in (("prior: train", "yes"), ("index", "no"), ("prior: train", "again")):
        with pytest.raises(ray.exceptions.RayTaskError) if word == "no" else contextlib.nullcontext():
            call(_say, word, options={"name": name, "num_cpus": 2})
    logs = {log.name: log.read() for log in logs_here(str(tmp_path))}
    said = "".join(text for name, text in logs.items() if name.startswith("prior/train"))  # of one process, or two
    assert said.splitlines().count("yes") == said.splitlines().count("again") == 1
    assert "yes on the other stream" in said
    assert "the reason" not in said
    failed = logs["index/work"]
    assert failed.startswith("no\nno on the other stream\nTraceback")
    assert "ValueError: the reason" in failed


def test_a_process_that_did_several_tasks_is_divided_by_their_lines() -> None:
    text = "starts\n== unclip prior.train begins ==\none\n== unclip index.work begins ==\ntwo\n"
    assert (own_part(text, "prior.train"), own_part(text, "index.work")) == ("one\n", "two\n")
    assert own_part(text, "clip.train") == ""


def test_a_log_whose_file_was_removed_is_said_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_logs, "get_default_ray_temp_dir", lambda: str(tmp_path))
    folder = tmp_path / "session_2026/logs"
    folder.mkdir(parents=True)
    (folder / "unclip-run.01000000.json").write_text('{"workspace": "here"}')
    for stream in ("out", "err"):
        (folder / f"unclip-log.01000000.index.work.{stream}").symlink_to(f"worker-1.{stream}")
    (folder / "worker-1.err").write_text("== unclip index.work begins ==\nthe reason\n")
    [log] = logs_here("here")
    assert log.read() == f"(removed from {folder})\nthe reason\n"


def test_a_cluster_that_answers_with_an_error_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = requests.Response()
    reply.status_code, reply._content = 500, b"the head is too busy"
    client = SimpleNamespace(_do_request=lambda *_, **__: reply)
    monkeypatch.setattr(worker_logs, "dashboard_client", lambda _: (client, "http://head:8265"))
    monkeypatch.setattr(worker_logs, "find_job", lambda *_: SimpleNamespace(driver_info=SimpleNamespace(id="01")))
    with pytest.raises(StepError, match=r"^the cluster at http://head:8265 does not list .*: the head is too busy$"):
        logs_of_job("job")


def test_a_wrong_name_is_answered_with_those_that_there_are() -> None:
    logs = [WorkerLog("download", number, "10.0.0.1", str) for number in "12"]
    assert [log.worker for log in logs_by_name(logs, "download", [])] == ["1", "2"]
    assert [log.worker for log in logs_by_name(logs, "download/2", [])] == ["2"]
    with pytest.raises(ConfigError, match=r"there are download/1, download/2; machines that have gone .*: 10\.0\.0\.9"):
        logs_by_name(logs, "download/3", ["10.0.0.9"])


def test_without_a_run_here_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"no logs of a run in .* on this machine"):
        logs_here(str(tmp_path))
    done = unclip_here("logs", str(write_recipe(tmp_path, port=free_port())), "prior")
    assert (done.returncode, "no logs of a run" in done.stderr) == (4, True)

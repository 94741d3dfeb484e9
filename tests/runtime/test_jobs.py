import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import AuthenticationTokenLoader, Config

from pipeline.errors import ConfigError, StepError
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.recipe.tables import to_dict
from pipeline.runtime.follow import follow_job
from pipeline.runtime.jobs import (
    job_logs,
    job_name,
    list_jobs,
    stop_job,
    submit_recipe,
)
from tests.ports import free_port

# What the shipped tree's command does here: it acts on the recipe's name, in place of the steps.
COMMAND = """
import json, pathlib, sys, time
recipe = json.loads(pathlib.Path("recipe.json").read_text())
print("arguments", " ".join(sys.argv[1:]))
print("workspace", recipe["workspace"])
from pipeline.greeting import WORD
print(WORD)
mark = pathlib.Path(recipe["workspace"], "mark")
if recipe["name"].startswith("fails"):
    print("the reason, for people")
    sys.exit(3)
try:
    while recipe["name"].startswith("waits") and not mark.exists():
        time.sleep(0.05)
except KeyboardInterrupt:
    print("saved what was done")
    sys.exit(130)
with open(pathlib.Path(recipe["workspace"], "runs"), "a") as runs:
    runs.write("x")
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, ray_head: Any) -> Iterator[Any]:
    """A cluster with token authentication, as cluster.yaml sets it up; the token is found through the environment."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        # An earlier ray.init in this process has read the settings; Ray keeps them.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        with ray_head(environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}) as head:
            yield head
        os.environ.pop("RAY_AUTH_MODE", None)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for package in ("models", "pipeline", "jobs"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    (root / "jobs" / "job.py").write_text(COMMAND)
    (root / "pipeline" / "greeting.py").write_text("WORD = 'shipped'\n")
    (root / "pipeline" / "secret.env").write_text("not for shipping")
    return root


def recipe_named(name: str, folder: Path) -> Recipe:
    (folder / "work").mkdir(exist_ok=True)
    return parse_recipe({"name": name, "workspace": str(folder / "work")})


def wait_for_log(job_id: str, text: str, address: str) -> None:
    deadline = time.monotonic() + 30
    while text not in job_logs(job_id, address):
        assert time.monotonic() < deadline, job_logs(job_id, address)
        time.sleep(0.2)


@pytest.mark.ray
def test_submit_runs_the_shipped_tree_once_and_says_so(head: Any, source: Path, tmp_path: Path) -> None:
    recipe = recipe_named("waits well", tmp_path)
    first = submit_recipe(recipe, address=head.dashboard, until="embed", source=source)
    second = submit_recipe(recipe, address=head.dashboard, until="embed", source=source)
    assert (first.state, second.state) == ("submitted", "attached")
    assert first.job_id == second.job_id == job_name(recipe, "embed")

    (tmp_path / "work" / "mark").touch()
    pieces: list[str] = []
    assert follow_job(first.job_id, pieces.append, head.dashboard) == 0
    text = "".join(pieces)
    assert f"arguments run recipe.json --address auto --until embed --job {first.job_id}\n" in text
    assert f"workspace {tmp_path / 'work'}\nshipped\n" in text
    assert text == job_logs(first.job_id[:12], head.dashboard)

    third = submit_recipe(recipe, address=head.dashboard, until="embed", source=source)
    assert third.state == "succeeded"
    assert (tmp_path / "work" / "runs").read_text() == "x"
    fourth = submit_recipe(recipe, address=head.dashboard, until="embed", source=source, again=True)
    assert (fourth.state, fourth.job_id) == ("submitted", f"{first.job_id}-2")
    assert follow_job(fourth.job_id, pieces.append, head.dashboard) == 0
    assert (tmp_path / "work" / "runs").read_text() == "xx"
    listed = {job.job_id: job for job in list_jobs(head.dashboard)}
    assert listed[first.job_id].status == "succeeded"
    assert listed[first.job_id].recipe == "waits well"
    assert listed[first.job_id].exit_code == 0
    assert "2020" < listed[first.job_id].started <= listed[first.job_id].ended
    assert list(listed) == [fourth.job_id, first.job_id]


@pytest.mark.ray
def test_submit_tries_again_after_a_failure_and_follow_gives_its_exit_code(
    head: Any, source: Path, tmp_path: Path
) -> None:
    recipe = recipe_named("fails", tmp_path)
    first = submit_recipe(recipe, address=head.dashboard, source=source)
    pieces: list[str] = []
    assert follow_job(first.job_id, pieces.append, head.dashboard) == 3
    assert "the reason, for people" in "".join(pieces)
    second = submit_recipe(recipe, address=head.dashboard, source=source)
    assert (second.state, second.job_id) == ("submitted", f"{first.job_id}-2")


@pytest.mark.ray
def test_stop_interrupts_the_job_and_lets_it_save(head: Any, source: Path, tmp_path: Path) -> None:
    recipe = recipe_named("waits for ever", tmp_path)
    job_id = submit_recipe(recipe, address=head.dashboard, source=source).job_id
    wait_for_log(job_id, "shipped", head.dashboard)
    assert stop_job(job_id, head.dashboard) == "stopped"
    assert [job.exit_code for job in list_jobs(head.dashboard) if job.job_id == job_id] == [130]
    assert "saved what was done" in job_logs(job_id, head.dashboard)
    assert submit_recipe(recipe, address=head.dashboard, source=source).job_id == f"{job_id}-2"
    stop_job(f"{job_id}-2", head.dashboard)


@pytest.mark.ray
def test_submit_goes_to_the_address_given_whatever_the_environment_says(
    head: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    done = submit_recipe(recipe_named("elsewhere", tmp_path), address=head.dashboard, source=source)
    assert done.address == head.dashboard
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.ray
def test_jobs_are_found_by_their_beginning_or_named_in_the_error(head: Any, source: Path, tmp_path: Path) -> None:
    for until in ("pairs", "download"):
        submit_recipe(recipe_named("twins", tmp_path), address=head.dashboard, until=until, source=source)
    with pytest.raises(ConfigError, match="more than one begins like that: twins-"):
        job_logs("twins", head.dashboard)
    with pytest.raises(ConfigError, match=r"no such job; there are .*twins-"):
        stop_job("nobody", head.dashboard)


@pytest.mark.ray
def test_a_cluster_that_wants_its_token_says_where_to_put_it(head: Any, tmp_path: Path) -> None:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    code = f"from pipeline.runtime.jobs import list_jobs\nlist_jobs({head.dashboard!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=outside | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert f"StepError: the cluster at {head.dashboard} asks for its token: put it into ~/.ray" in done.stderr


def test_submit_says_that_no_cluster_answers(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(StepError, match=rf"no Ray cluster answers at http://127\.0\.0\.1:{port}"):
        submit_recipe(recipe_named("alone", tmp_path), address=f"127.0.0.1:{port}")


def test_submit_tells_another_server_from_a_cluster(tmp_path: Path) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(StepError, match="something else does: HTTP 501"):
            list_jobs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "auto://", "http://", "s3://bucket"])
def test_addresses_that_are_no_dashboard_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="give the URL of the cluster's dashboard"):
        list_jobs(address)


def test_job_name_follows_what_is_made_and_not_how(tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "My recipe!", "workspace": str(tmp_path)})
    wider = parse_recipe({"name": "My recipe!", "workspace": str(tmp_path), "embed": {"resources": {"num_workers": 7}}})
    other = parse_recipe({"name": "My recipe!", "workspace": str(tmp_path), "seed": 1})
    elsewhere = parse_recipe({"name": "My recipe!", "workspace": str(tmp_path / "b")})
    assert job_name(recipe).startswith("My-recipe-")
    assert job_name(recipe) == job_name(wider)
    assert len({job_name(recipe), job_name(other), job_name(elsewhere), job_name(recipe, "clip")}) == 4


def test_paths_of_a_shipped_recipe_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("clip", "prior"):
        (tmp_path / folder).mkdir()
    (tmp_path / "list.csv").touch()
    recipe = parse_recipe(
        {
            "workspace": "work",
            "pairs": {"source": "list", "path": "list.csv"},
            "clip": {"source": "pretrained", "name": "clip", "tag": "laion2b"},
            "prior": {"init_from": "prior"},
            "embed": {"import_from": "embeddings"},
            "filter_embeddings": {"aesthetic_weights": "head.pth"},
            "evaluate": {"prompts_path": "prompts.txt"},
            "serve": {"keys": "keys.json", "access_log": "access.jsonl"},
            "tracking": {"uri": "sqlite:///runs.db"},
        }
    )
    shipped = with_absolute_paths(recipe)
    assert shipped.workspace == str(tmp_path / "work")
    assert shipped.pairs.path == str(tmp_path / "list.csv")
    assert (shipped.clip.name, shipped.clip.tag) == (str(tmp_path / "clip"), "laion2b")
    assert shipped.prior.init_from == str(tmp_path / "prior")
    assert shipped.embed.import_from == str(tmp_path / "embeddings")
    assert shipped.filter_embeddings is not None
    assert shipped.filter_embeddings.aesthetic_weights == str(tmp_path / "head.pth")
    assert shipped.evaluate.prompts_path == str(tmp_path / "prompts.txt")
    assert shipped.decoder == recipe.decoder
    assert (shipped.serve.keys, shipped.serve.access_log) == (
        str(tmp_path / "keys.json"),
        str(tmp_path / "access.jsonl"),
    )
    assert shipped.tracking.uri == f"sqlite:///{tmp_path}/runs.db"
    remote = parse_recipe({"workspace": "s3://bucket/work", "tracking": {"uri": "http://tracker:5000"}})
    assert with_absolute_paths(remote) == remote


def test_a_shipped_recipe_reads_back_as_it_was(tmp_path: Path) -> None:
    recipe = with_absolute_paths(parse_recipe({"name": "round", "workspace": str(tmp_path)}))
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    assert load_recipe(tmp_path / "recipe.json") == recipe

"""`unclip status` on what runs, what stopped and what a kill left; the parts of a plan that `unclip run` takes."""

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import inspect
from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.recipe.estimate import Remaining
from pipeline.recipe.plan import Step, artifact_of, chosen_steps, make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.schedule import Machine, Span
from pipeline.runtime.tracking.place import Place, check_scheme
from pipeline.workspace.lock import holder_of, locked_workspace
from pipeline.workspace.progress import PROGRESS, ProgressState
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.command import unclip_here
from tests.tiny.recipe import write_recipe


def _reading(artifact: Artifact, age_s: float) -> None:
    state = ProgressState(10, 40, "rows", 0.9, 33.0, "", 11.0, time.time() - age_s, {"node-a": 3, "node-b": 1})
    artifact.write_json(PROGRESS, asdict(state))


def _line(recipe: Path, step: str, *options: str) -> str:
    result = CliRunner().invoke(app, ["status", str(recipe), *options])
    assert result.exit_code == 0, result.output
    return next(line for line in result.stdout.splitlines() if line.startswith(f"{step} "))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe, of which a reading of the download is all that there is."""
    path = write_recipe(tmp_path, port=1)
    loaded = load_recipe(path)
    steps = {step.name: step for step in make_plan(loaded)}
    _reading(artifact_of(Workspace(loaded.workspace), steps["download"]), age_s=3 * 3600)
    return path


def _download(recipe: Path) -> Artifact:
    loaded = load_recipe(recipe)
    [step] = [step for step in make_plan(loaded) if step.name == "download"]
    return artifact_of(Workspace(loaded.workspace), step)


def test_a_dead_run_is_called_dead(recipe: Path) -> None:
    line = _line(recipe, "download")
    assert "stopped 180 min ago at 10/40 rows; it wrote no error: the run was killed" in line.replace(
        "3 h 00 min", "180 min"
    )
    assert "0.9/s" not in line
    _download(recipe).write_bytes("live/error.txt", b"Traceback ...\n  line\nValueError: no such thing\n")
    assert _line(recipe, "download").endswith("ValueError: no such thing")
    [row] = [
        row for row in json.loads(CliRunner().invoke(app, ["status", str(recipe), "--json"]).stdout) if row["progress"]
    ]
    assert (row["is_running"], row["error"], round(row["age_s"] / 3600)) == (False, "ValueError: no such thing", 3)


def test_a_living_run_is_shown_with_its_workers_and_the_age_of_its_reading(recipe: Path) -> None:
    workspace = Workspace(load_recipe(recipe).workspace)
    assert holder_of(workspace) == ""
    _reading(_download(recipe), age_s=20)
    with locked_workspace(workspace, print):
        assert holder_of(workspace).startswith("process ")
        line = _line(recipe, "download")
    assert " running " in line
    assert "10/40 rows (25 %), 0.9/s, 33 s to go; workers: 3 on node-a, 1 on node-b; read 20 s ago" in line
    assert holder_of(workspace) == ""


def test_watching_ends_with_the_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_WATCH_S", 0.05)
    is_held, is_over = threading.Event(), threading.Event()

    def run() -> None:
        with locked_workspace(Workspace(load_recipe(recipe).workspace), print):
            is_held.set()
            is_over.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    is_held.wait(20)
    threading.Timer(1.0, is_over.set).start()
    text = CliRunner().invoke(app, ["status", str(recipe), "--watch"]).stdout
    thread.join()
    assert text.count("held by process") >= 2
    assert "held by" not in text.splitlines()[-1]


def test_plan_and_status_end_with_what_is_useful_next(recipe: Path) -> None:
    for command, expected in (("plan", f"  unclip run {recipe}"), ("status", f"  unclip run {recipe}")):
        lines = CliRunner().invoke(app, [command, str(recipe)]).stderr.splitlines()
        assert (lines[-1], "next:" in lines) == (expected, True)


def test_plan_and_the_first_run_say_where_the_workspace_is(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = tmp_path / "elsewhere"

    def last_of_plan() -> str:
        return CliRunner().invoke(app, ["plan", str(recipe), "--set", "workspace=elsewhere"]).stdout.splitlines()[-1]

    def first_of_run() -> str:
        words = ["run", str(recipe), "--set", "workspace=elsewhere", "--dry-run"]
        return CliRunner().invoke(app, words).stderr.splitlines()[0]

    assert last_of_plan() == first_of_run() == f"workspace {workspace} (nothing is there yet)"
    workspace.mkdir()
    (workspace / ".lock").touch()
    assert last_of_plan() == f"workspace {workspace} (nothing is there yet)"
    [pairs] = make_plan(load_recipe(recipe, ["workspace=elsewhere"]), until="pairs")
    artifact = artifact_of(Workspace(str(workspace)), pairs)
    artifact.write_bytes("00000.parquet", b"")
    assert last_of_plan() == f"workspace {workspace}"
    assert first_of_run() == "next:"


def _names(steps: list[Step]) -> set[str]:
    return {step.name for step in steps}


def test_what_waits_for_a_tracker_is_counted_with_where_it_is_and_what_to_do(recipe: Path) -> None:
    words = ["status", str(recipe), "--set", "tracking.uri=http://me:secret@127.0.0.1:1"]
    assert "records wait" not in CliRunner().invoke(app, words).stdout
    loaded = load_recipe(recipe, words[3:])
    place = Place(loaded, Workspace(loaded.workspace))
    outbox = place.open()
    outbox.append([{"op": "metrics"}] * 3)
    outbox.mark_sent(outbox.read(1)[0][1])
    [line] = [line for line in CliRunner().invoke(app, words).stdout.splitlines() if line.startswith("tracker http")]
    assert line == (
        f"tracker http://me:***@127.0.0.1:1: 2 records wait in {place.kept_in}; "
        f"`unclip run {recipe} --set {words[3]}` sends them"
    )


@pytest.mark.parametrize("uri", ["htp://me:secret@host:5000", "me:secret@host:5000"])
def test_an_address_that_no_tracker_has_is_refused_without_its_password(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"me:\*\*\*@host:5000: no such kind of tracker") as refusal:
        check_scheme(uri)
    assert "secret" not in str(refusal.value)


def test_half_of_an_ipv6_address_is_no_tracker() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri http://\[h: no such kind of tracker"):
        check_scheme("http://[h")


def test_a_plan_as_a_graph_has_every_step_its_state_and_its_inputs(recipe: Path) -> None:
    lines = unclip_here("plan", str(recipe), "--graph").stdout.splitlines()
    steps = make_plan(load_recipe(recipe))
    assert lines[0] == "graph TD"
    assert sum(" --> " in line for line in lines) == sum(len(step.inputs) for step in steps)
    for step in steps:
        assert any(line.startswith(f"  {step.name}") and step.key in line for line in lines)
        assert all(f"  {name} --> {step.name}" in lines for name in step.inputs)


def test_a_part_of_a_plan_holds_what_it_reads(recipe: Path) -> None:
    steps = make_plan(load_recipe(recipe))
    within, chosen = chosen_steps(steps)
    assert _names(within) == chosen == _names(steps)
    within, chosen = chosen_steps(steps, only="embed")
    assert (_names(within), chosen) == ({"download", "clip", "embed"}, {"embed"})
    within, chosen = chosen_steps(steps, start="embed", until="decoder")
    assert (_names(within), chosen) == ({"download", "clip", "embed", "decoder"}, {"embed", "decoder"})
    _, chosen = chosen_steps(steps, start="upsampler_1")
    assert chosen == {"upsampler_1", "evaluate"}
    for options, reason in (
        ({"start": "nothing"}, "--from nothing: no such step"),
        ({"only": "nothing"}, "--step nothing: no such step"),
        ({"only": "clip", "until": "embed"}, "give it alone"),
        ({"start": "embed", "until": "clip"}, "no step of this recipe is after one"),
    ):
        with pytest.raises(ConfigError, match=reason):
            chosen_steps(steps, **options)


def test_a_dry_run_says_what_would_run_and_runs_nothing(recipe: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["run", str(recipe), *options])
        return result.exit_code, result.stdout + str(result.exception or "")

    loaded = load_recipe(recipe)
    code, text = run("--dry-run", "--until", "download")
    assert (code, text.splitlines()[-1]) == (0, "2 steps would run")
    assert "never run" in text
    assert "pairs: not finished, and not among the chosen steps" in run("--dry-run", "--step", "download")[1]
    assert "--force: say what is to be made anew" in run("--force")[1]
    [pairs] = make_plan(loaded, until="pairs")
    artifact = artifact_of(Workspace(loaded.workspace), pairs)
    artifact.commit(manifest_of(pairs, artifact))
    code, text = run("--dry-run", "--step", "pairs", "--force", "--json")
    assert json.loads(text) == [{"step": "pairs", "key": pairs.key, "reasons": ["it is made anew"]}]
    assert artifact.manifest() is not None
    assert run("--dry-run", "--step", "pairs")[1].splitlines()[-1] == "nothing to do"


def test_a_time_without_all_steps_is_a_least_time(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> tuple[Remaining, Machine]:
        return Remaining({"pairs": Span(0, 90)}, ("filter_embeddings",)), Machine(cpus=2)

    monkeypatch.setattr("pipeline.timing.run_time.measure_run", measured)
    lines = CliRunner().invoke(app, ["plan", str(recipe), "--time"]).stdout.splitlines()
    assert (
        "run: at least 90 s besides filter_embeddings (whose time a few rows here do not tell) on 2 CPUs" in lines[-1]
    )

"""The command: help, usage, exit codes, one message for each mistake."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.main import get_command

from jobs import cli, inspect, start
from jobs.options import Next
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from tests.ports import free_port
from tests.tiny.command import ROOT, unclip_here
from tests.tiny.recipe import write_recipe

COMMANDS = sorted(name for group in cli.COMMANDS.values() for name in group)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = _run(command, "--help")
    assert done.returncode == 0
    assert f"Example: unclip {command}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_an_option_says_one_default(command: str) -> None:
    root: Any = get_command(cli.app)
    parsed = root.commands[command]
    context = parsed.make_context(command, [], resilient_parsing=True)
    records = [record[1] for option in parsed.params if (record := option.get_help_record(context))]
    assert records
    assert [text for text in records if text.count("default:") > 1] == []


def test_help_says_each_command_in_one_whole_line_of_its_group() -> None:
    text = _run("--help").stdout.partition("this message and exit.")[2]
    said = {
        group: re.findall(r"^  ([a-z-]+) +\S.*[^.]\.$", lines, re.MULTILINE)
        for group, lines in re.findall(r"^(\w+):\n((?:  .+\n)+)", text, re.MULTILINE)
    }
    assert said == {group: list(commands) for group, commands in cli.COMMANDS.items()}
    assert len(text.split("\n\n")) == len(said) + 1
    assert max(map(len, text.splitlines())) <= 80


def test_every_command_ends_with_the_next_useful_ones() -> None:
    commands = {name: command for group in cli.COMMANDS.values() for name, (command, _) in group.items()}
    assert {name for name, command in commands.items() if get_type_hints(command)["return"] != Next} == set()
    sources = "".join(path.read_text() for path in (ROOT / "jobs").glob("*.py"))
    assert set(re.findall(r"f?[\"']unclip ([a-z-]+)", sources)) <= commands.keys()
    done = unclip_here("config", "configs/demo.toml", "--set", "seed=9")
    assert (done.stderr, "next:" in done.stdout) == ("next:\n  unclip plan configs/demo.toml --set seed=9\n", False)
    assert not unclip_here("config", "configs/demo.toml", "--json").stderr


def test_version_is_the_package_version() -> None:
    from importlib.metadata import version

    assert _run("--version").stdout.strip() == f"unclip {version('unclip')}"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["frob"], 2, ["frob"]),
        (["plan"], 2, ["RECIPE"]),
        (["plan", "none.toml"], 2, ["none.toml", "unclip init"]),
        (["plan", "configs/demo.toml", "--set", "prior.train.num_step=3"], 2, ["prior.train.num_step", "num_steps"]),
        (["plan", "configs/demo.toml", "--set", "prior.train.num_steps=many"], 2, ["prior.train.num_steps", "integer"]),
        (["plan", "configs/demo.toml", "--set", "upsampler_1.model.image_px=32"], 2, ["upsampler_2.model.low_res_px"]),
        (["plan", "configs/demo.toml", "--until", "nowhere"], 2, ["nowhere", "embed"]),
        (["plan", "configs/demo.toml", "--cost", "--time"], 2, ["--cost, --time: ", "together"]),
        (["plan", "configs/demo.toml", "--graph", "--json"], 2, ["--graph, --json: ", "together"]),
        (["run", "configs/demo.toml", "--until", "pairs", "--retry-failed"], 2, ["--retry-failed: download is not"]),
        (["run", "configs/demo.toml", "--step", "embed", "--retry-failed", "none"], 2, ["(embed)"]),
        (["run", "configs/demo.toml", "--retry-failed", "htp"], 2, ["no such class", "http-404", "or none"]),
        (["run", "configs/demo.toml", "--set", "pairs.source=list", "--set", "pairs.path=none.csv"], 2, ["none.csv"]),
        (["sample", "configs/demo.toml"], 2, ["at least one prompt"]),
        (["sample", "configs/demo.toml", "--prompts", "none.txt"], 2, ["none.txt"]),
        (["sample", "configs/demo.toml", "--prompts", "docs/images/samples.jpg"], 2, ["samples.jpg", "utf-8"]),
        (["run", "configs/demo.toml", "--set", "workspace=README.md"], 4, ["README.md", "a file is where a folder"]),
        (["search", "configs/demo.toml"], 2, ["--image"]),
        (["init", "none.csv"], 2, ["none.csv"]),
        (["keys", "add", "my keys.json"], 2, ["say whose key: unclip keys add 'my keys.json' NAME"]),
        (["export", "configs/demo.toml"], 2, ["--diffusers", "--native"]),
        (["import", "none", "--out", "none"], 3, ["none/model_index.json"]),
        (["submit", "configs/demo.toml", "--address", "http://127.0.0.1:1"], 4, ["127.0.0.1:1"]),
        (["jobs", "--address", "http://127.0.0.1:1"], 4, ["127.0.0.1:1"]),
    ],
)
def test_mistakes_are_one_message_and_an_exit_code(arguments: list[str], code: int, words: list[str]) -> None:
    done = unclip_here(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("command", "words", "lack", "until"),
    [
        ("sample", ["a red circle"], "clip", ""),
        ("export", ["--native", "out"], "clip", ""),
        ("search", ["a red circle"], "clip", " --until index"),
        ("compact", [], "index", " --until index"),
        ("append", [str(ROOT)], "index", " --until index"),
    ],
)
def test_a_command_before_its_steps_proposes_the_run_of_its_recipe_as_it_was_typed(
    command: str, words: list[str], lack: str, until: str, tmp_path: Path
) -> None:
    recipe = str(write_recipe(tmp_path, port=free_port()))
    done = unclip_here(command, recipe, *words, "--set", "seed=9")
    assert done.returncode == 2
    first = f"first: unclip run {recipe} --set seed=9{until}"
    assert done.stderr == f"error: {lack} is not finished under this recipe; {first}\n"


def test_append_proposes_the_run_of_the_recipe_that_is_not_finished(tmp_path: Path) -> None:
    for name in ("mine", "more"):
        (tmp_path / name).mkdir()
    recipe, more = (str(write_recipe(tmp_path / name, port=free_port())) for name in ("mine", "more"))
    done = unclip_here("append", recipe, more, "--set", "seed=9")
    assert done.stderr == f"error: embed is not finished under this recipe; first: unclip run {more} --until embed\n"


def test_append_takes_embeddings_in_a_store_by_their_uri(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, port=free_port()))
    done = unclip_here("append", recipe, "memory://workspace/embed/0123456789abcdef")
    assert done.stderr.startswith("error: index is not finished under this recipe; first: unclip run ")


def test_run_with_no_cluster_at_the_address_is_one_message(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, port=free_port())
    done = _run("run", str(recipe), "--address", f"127.0.0.1:{free_port()}", "--set", "tracking.uri=off")
    assert done.returncode == 4, done.stderr
    assert "no Ray cluster at" in done.stderr
    assert "Traceback" not in done.stderr


def test_submit_asks_no_store_of_the_workspace() -> None:
    """The machine of whoever submits needs neither its driver nor its credentials, as docs/operations.md says."""
    place = ["--set", "workspace=az://nowhere/w", "--address", f"http://127.0.0.1:{free_port()}"]
    done = unclip_here("submit", "configs/demo.toml", *place)
    assert done.returncode == 4
    assert "no Ray cluster answers" in done.stderr


def test_submit_hands_on_its_options_and_keeps_json_apart_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime import jobs, resubmit

    request: dict[str, object] = {}

    def submit(_recipe: Recipe, **options: object) -> jobs.Submission:
        request.update(options)
        return jobs.Submission("demo-1", "submitted", str(options["address"]))

    def follow(_job: str, write: Callable[[str], None], address: str, show: object) -> int:
        assert show is None  # nothing of a table where there is no terminal
        write(f"the log at {address}\n")
        return 3

    monkeypatch.setattr(resubmit, "submit_recipe", submit)
    monkeypatch.setattr(resubmit, "follow_job", follow)
    words = ["--until", "embed", "--again", "--follow", "--address", "http://h:1", "--json"]
    done = unclip_here("submit", "configs/demo.toml", "--set", "seed=4", *words)
    assert (request["until"], request["again"], request["shown_as"]) == (
        "embed",
        True,
        "configs/demo.toml --set seed=4",
    )
    assert json.loads(done.stdout)["job_id"] == "demo-1"
    assert (done.stderr, done.returncode) == ("the log at http://h:1\n", 3)
    done = unclip_here("submit", "configs/demo.toml", "--follow")
    assert request["again"] is False
    assert done.stdout == "demo-1: submitted to http://127.0.0.1:8265\nthe log at http://127.0.0.1:8265\n"


@pytest.mark.parametrize(
    ("words", "continues"),
    [
        (["run", "a.toml"], True),
        (["ablate", "a.toml"], True),
        (["search", "--queries", "a.txt"], True),
        (["search", "a.toml", "--queries=a.txt"], True),
        (["search", "a.toml", "a dog"], False),
        (["forget", "--compact"], True),
        (["forget", "a.txt"], False),
        (["plan"], False),
    ],
)
def test_an_interrupted_command_says_that_it_continues_if_it_does(
    words: list[str], continues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "app", lambda *_, **__: 130)
    done = unclip_here(*words)
    assert done.returncode == 130
    assert ("run the same command again" in done.stderr) == continues


def test_an_interrupted_follower_says_that_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime import jobs, resubmit

    def follow(*_: object) -> int:
        raise KeyboardInterrupt

    submission = jobs.Submission("demo-1", "submitted", "http://h:1")
    monkeypatch.setattr(resubmit, "submit_recipe", lambda *_arguments, **_options: submission)
    monkeypatch.setattr(resubmit, "follow_job", follow)
    done = unclip_here("submit", "configs/demo.toml", "--follow", "--address", "http://h:1")
    assert done.returncode == 130
    assert [line for line in done.stderr.splitlines() if line] == [
        "the job goes on; `unclip logs demo-1 --address http://h:1` prints its log, "
        "`unclip stop demo-1 --address http://h:1` ends it",
        "interrupted",
    ]


def test_a_new_recipe_that_cannot_be_measured_proposes_commands_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.timing import run_time

    def measure(*_: object) -> None:
        raise ConfigError("no CLIP; load it first: unclip run RECIPE --until clip, or `unclip plan RECIPE --cost`")

    monkeypatch.setattr(run_time, "measure_run", measure)
    recipe = str(write_recipe(tmp_path, port=1).rename(tmp_path / "my own.toml"))
    text = start._time_of(recipe, is_measured=False)
    assert (
        text
        == f"not known: no CLIP; load it first: unclip run '{recipe}' --until clip, or `unclip plan '{recipe}' --cost`"
    )


_RUN = [
    ["--set", "seed=2", "--until", "embed"],
    ["--step", "pairs", "--force"],
    ["--from", "pairs", "--until", "clip", "--address", "ray://h:1"],
    ["--retry-failed", "http-503"],
]


def _options(command: str) -> set[str]:
    """The options of a command that a person sees."""
    group: Any = get_command(cli.app)
    params = group.commands[command].params
    return {word for one in params if not getattr(one, "hidden", False) for word in one.opts if word.startswith("--")}


def test_a_dry_run_proposes_the_run_that_it_shows(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, port=1))
    for words in _RUN:
        done = unclip_here("run", recipe, *words, "--dry-run")
        proposed = shlex.split(done.stderr.splitlines()[-1])
        assert sorted(proposed) == sorted(["unclip", "run", recipe, *words])
    tried = {word for words in _RUN for word in words if word.startswith("--")}
    assert _options("run") - tried == {"--dry-run", "--json"}


def test_the_cost_of_steps_without_a_network_is_no_empty_table(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, port=1))
    costs = [unclip_here("plan", recipe, "--cost", "--until", step).stdout for step in ("pairs", "clip")]
    assert costs[0].splitlines()[0] == "no network up to pairs"
    assert ["parameters" in text for text in costs] == [False, True]


def test_a_plan_proposes_commands_up_to_the_step_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(write_recipe(tmp_path, port=1))
    for name in ("_print_cost", "_print_times"):
        monkeypatch.setattr(inspect, name, lambda *_arguments, **_options: None)
    for shown in ([], ["--cost"], ["--graph"], ["--time"]):
        proposed = unclip_here("plan", recipe, "--until", "embed", *shown).stderr.splitlines()[1:]
        assert proposed
        for command in proposed:
            assert f"{recipe} --until embed" in command


def test_a_job_that_failed_is_submitted_again_with_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime import jobs, resubmit

    submission = jobs.Submission("demo-1", "submitted", "http://h:1")
    monkeypatch.setattr(resubmit, "submit_recipe", lambda *_arguments, **_options: submission)
    monkeypatch.setattr(resubmit, "follow_job", lambda *_: 3)
    words = [
        "configs/demo.toml",
        "--set",
        "seed=4",
        "--until",
        "embed",
        "--address",
        "http://h:1",
        "--follow",
        "--again",
    ]
    done = unclip_here("submit", *words)
    assert done.stderr.splitlines()[:2] == ["next:", f"  unclip submit {shlex.join(words)}"]


def test_a_job_can_be_interrupted_although_its_cluster_ignores_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        unclip_here("--version")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        monkeypatch.setenv("RAY_JOB_STOP_SIGNAL", "SIGINT")
        unclip_here("--version")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_run_where_ray_cannot_start_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = _run(
        "run", str(write_recipe(tmp_path, port=free_port())), "--set", "tracking.uri=off", RAY_TMPDIR=f"{tmp_path}/file"
    )
    assert done.returncode == 4, done.stderr
    assert "error: Ray did not start on this machine: " in done.stderr
    assert "Traceback" not in done.stderr


def test_second_run_in_the_same_workspace_waits_its_turn(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "workspace").mkdir()
    with (tmp_path / "workspace/.lock").open("w") as lock:
        lock.write("process 1 on here")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = _run("run", str(write_recipe(tmp_path, port=free_port())), "--set", "tracking.uri=off")
    assert done.returncode == 4
    assert "another run is using this workspace (process 1 on here)" in done.stderr


def test_run_with_an_address_that_no_tracker_has_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = _run("run", str(write_recipe(tmp_path, port=free_port())), "--set", "tracking.uri=tracker:5000")
    assert done.returncode == 2
    assert "tracking.uri" in done.stderr
    assert not list((tmp_path / "workspace").glob("pairs/*"))


def test_config_prints_toml_that_loads_to_the_same_recipe(tmp_path: Path) -> None:
    from pipeline.recipe.recipe import load_recipe

    resolved = tmp_path / "resolved.toml"
    resolved.write_text(_run("config", "configs/demo.toml", "--set", "seed=9").stdout)
    assert load_recipe(resolved) == load_recipe("configs/demo.toml", ["seed=9"])

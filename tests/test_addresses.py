"""Addresses as people may see them."""

import dataclasses
import http.server
import pickle
import shlex
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tomli_w

from jobs.options import print_next
from pipeline.addresses import (
    HIDDEN,
    values_without_secrets,
    without_password,
    without_secrets,
    words_without_secrets,
)
from pipeline.errors import ConfigError, DataError, ResumeError, StepError, UnclipError
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.report.sections import recipe_changes
from pipeline.workspace.store import Workspace
from tests.tiny.command import unclip_here


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://me:***@host:5000/x"),
        ("me:secret@proxy:3128", "me:***@proxy:3128"),
        ("postgresql://me:se@cr/et@db/ml", "postgresql://me:***@db/ml"),
        ("postgresql+psycopg2://me:se/cr?et@db:5/ml", "postgresql+psycopg2://me:***@db:5/ml"),
        ("mysql://db/ml?user=me&password=secret", "mysql://db/ml?***"),
        *((same, same) for same in ("", "off", "host:5000", "http://me@host:5000", "http://[::1]:5000")),
        *((same, same) for same in ("sqlite:////a@b:c@d.db", "s3://bucket/part-?.csv")),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, shown: str) -> None:
    assert without_password(address) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@lists/a.parquet: no such list", "https://me:***@lists/a.parquet: no such list"),
        ("list 2: https://b/a.csv?X-Sig=secret: damaged", "list 2: https://b/a.csv?***: damaged"),
        ("404, url=URL('https://b/a.csv?X-Sig=secret')", "404, url=URL('https://b/a.csv?***')"),
        ("from (s3://me:secret@a/b), sftp://me:se,cret@c/d;", "from (s3://me:***@a/b), sftp://me:***@c/d;"),
        ("postgresql://me:my secret@db/ml: refused", "postgresql://me:***@db/ml: refused"),
        ("http://me:12ab cd@h is down", "http://me:***@h is down"),
        *((same, same) for same in ("at http://h: ask me@x", "at http://h/a: see b@c")),
        *((same, same) for same in ("http://h:8265 refused; ask me@example.com", "http://[::1]:80 is down, a@b")),
        *((same, same) for same in ("at http://h:5000 is down; write to a@b.c now", "('http://h:80'): ask a@b.c")),
        *((same, same) for same in ("prior: step 3", "no dashboard at http://127.0.0.1:8265: refused", "a://")),
        *((same, same) for same in ("choose one, such as s3://b/**/*.csv", "https://b/part-?.csv: cut off")),
    ],
)
def test_a_message_shows_addresses_without_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("kind", [UnclipError, ConfigError, DataError, StepError, ResumeError])
def test_no_error_holds_a_secret_of_an_address(kind: type[UnclipError]) -> None:
    error = kind("https://me:secret@lists/a.csv?key=secret: cut off")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "https://me:***@lists/a.csv?***: cut off"


def test_values_and_words_are_shown_without_the_secrets_of_addresses() -> None:
    table = {"path": "https://me:my secret@b/a.csv", "lists": [{"path": "s3://b/a?k=secret", "weight": 0.5}], "n": None}
    shown = {"path": "https://me:***@b/a.csv", "lists": [{"path": "s3://b/a?***", "weight": 0.5}], "n": None}
    assert values_without_secrets(table) == shown
    assert values_without_secrets({"folders": ["me:my secret@h"]}) == {"folders": ["me:***@h"]}
    assert values_without_secrets("12 o'clock: me@host", "notes") == "12 o'clock: me@host"
    words = "'my demo.toml' --set pairs.path=https://me:secret@b/a.csv --set seed=1"
    assert words_without_secrets(words) == "'my demo.toml' --set 'pairs.path=https://me:***@b/a.csv' --set seed=1"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("tracking.uri=me:secret@host:5000", "tracking.uri=me:***@host:5000"),
        ("tracking.uri=me:secret@host/x", "tracking.uri=me:***@host/x"),
        ("tracking.uri=http://me:my secret@host", "'tracking.uri=http://me:***@host'"),
        ("tracking.uri=me:secret@[::1]:5000", "tracking.uri=me:***@[::1]:5000"),
        ('tracking.uri="me:secret@host:5000"', "'tracking.uri=\"me:***@host:5000\"'"),
        ("tracking.uri='me:my secret@h'", "\"tracking.uri='me:***@h'\""),
        ("tracking.uri=me:my secret@host:5000", "tracking.uri=me:***@host:5000"),
        ("tracking.uri=me:it's secret@host", "tracking.uri=me:***@host"),
        ("tracking.uri=me:secret@h1:5,h2:5/db", "tracking.uri=me:***@h1:5,h2:5/db"),
        ("tracking.uri=me:secret@host?x=1", "'tracking.uri=me:***@host?***'"),
        ("tracking.uri = me:my secret@host", "'tracking.uri = me:***@host'"),
        ("x = me:secret@host", "'x = me:***@host'"),
        ("tracking.uri=:secret@host", "tracking.uri=:***@host"),
        ("job.env.PROXY=me:my secret@host", "job.env.PROXY=me:***@host"),
        ("job.env.DB=me:secret@h1:5,h2:5/db", "job.env.DB=me:***@h1:5,h2:5/db"),
        ('x=[{a = 1, path = "me:my secret@h/a"}]', "'x=[{a = 1, path = \"me:***@h/a\"}]'"),
        ("my=a.toml", "my=a.toml"),
        ("https://me:my secret@h/a?b=c", "'https://me:***@h/a?***'"),
        ("clip.name=hf-hub:owner/name@main", "clip.name=hf-hub:owner/name@main"),
        ('clip.name="hf-hub:owner/name@main"', "'clip.name=\"hf-hub:owner/name@main\"'"),
        ('name="12: ask me@host"', "'name=\"12: ask me@host\"'"),
        ("x=a cat: happy @ home", "'x=a cat: happy @ home'"),
        ("x=what? a=b", "'x=what? a=b'"),
        ("x=a:b@c d", "'x=a:b@c d'"),
        ("x=12:30 @ the=sea?", "'x=12:30 @ the=sea?'"),
    ],
)
def test_a_command_keeps_what_is_no_secret(word: str, shown: str) -> None:
    words = words_without_secrets(shlex.quote(word))
    assert shlex.split(words) == shlex.split(shown)


@pytest.mark.parametrize(
    "text", ["a" * 200_000 + "://", "a://" + ":" * 200_000, "a://b" + "?" * 200_000, "a://b:c " * 30_000]
)
def test_a_strange_text_is_read_once(text: str) -> None:
    assert without_secrets(text) == text


def test_a_strange_value_is_read_once() -> None:
    assert values_without_secrets(text := "a:" + "@" * 200_000 + " b") == text


@pytest.fixture
def signed(tmp_path: Path) -> Generator[str]:
    """The address of a recipe's list, with a password and a signature, on a server that sends ``tmp_path``."""

    class _Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:secret@127.0.0.1:{server.server_port}/list.parquet?X-Signature=secret"
        server.shutdown()


def test_commands_say_what_is_wrong_with_a_list_without_the_secrets_of_its_address(signed: str, tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    tables = {"workspace": str(tmp_path / "w"), "pairs": {"source": "list", "path": signed}}
    recipe.write_text(tomli_w.dumps(tables))
    missing = unclip_here("plan", str(recipe))
    (tmp_path / "list.parquet").write_bytes(b"no parquet")
    damaged = unclip_here("init", signed, "--out", str(tmp_path / "new.toml"))
    assert (missing.returncode, damaged.returncode) == (2, 3)
    for done in (missing, damaged):
        assert "me:***@127.0.0.1" in done.stderr
        assert "/list.parquet?***: " in done.stderr or "/list.parquet?*** " in done.stderr
        assert "secret" not in done.stdout + done.stderr


def test_the_command_that_an_error_proposes_holds_no_secret_and_says_so(tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text(tomli_w.dumps({"workspace": str(tmp_path / "w")}))
    words = ["sample", str(recipe), "a cat", "--set"]
    secret, plain = (unclip_here(*words, change) for change in ("tracking.uri=http://me:secret@h", "seed=1"))
    assert "secret" not in secret.stdout + secret.stderr
    assert f"unclip run {recipe} --set 'tracking.uri=http://me:***@h'" in secret.stderr
    assert HIDDEN in secret.stderr
    assert f"unclip run {recipe} --set seed=1" in plain.stderr
    assert HIDDEN not in plain.stderr


def test_what_is_proposed_after_a_job_says_what_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    print_next("unclip status my.toml --set 'pairs.path=https://h/a.csv?***'")
    assert capsys.readouterr().err.endswith(f"  ({HIDDEN})\n")
    print_next("unclip status my.toml")
    assert HIDDEN not in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_plan_names_another_address_without_its_secrets(options: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text(tomli_w.dumps({"workspace": str(tmp_path / "w")}))
    loaded = load_recipe(recipe)
    [pairs] = make_plan(loaded, until="pairs")
    of_store = dataclasses.replace(pairs, section=pairs.section | {"path": "s3://me:5 secret@b/pictures?key=secret"})
    output = artifact_of(Workspace(loaded.workspace), of_store)
    output.commit(manifest_of(of_store, output))
    done = unclip_here("plan", str(recipe), *options)
    assert "pairs.path: s3://me:***@b/pictures?*** ->" in done.stdout
    assert "secret" not in done.stdout + done.stderr


def test_the_report_shows_no_secret_of_an_address() -> None:
    recipe = parse_recipe({"pairs": {"source": "list", "path": "me:my secret@h/a.csv"}})
    assert ("pairs.path", "me:***@h/a.csv", '""') in recipe_changes(recipe)


def test_the_command_of_a_job_holds_no_secret_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime import jobs

    options: dict[str, Any] = {}

    def submit(_recipe: object, **more: Any) -> jobs.Submission:
        options.update(more)
        return jobs.Submission("demo-1", "submitted", "http://h:1")

    monkeypatch.setattr(jobs, "submit_recipe", submit)
    change = "tracking.uri=http://me:secret@host:5000"
    unclip_here("submit", "configs/demo.toml", "--set", change, "--address", "http://h:1", "--json")
    assert options["shown_as"] == "configs/demo.toml --set 'tracking.uri=http://me:***@host:5000'"


def test_the_dashboard_of_a_job_shows_no_secret_of_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime import jobs

    client = Mock(list_jobs=list)
    monkeypatch.setattr(jobs, "dashboard_client", lambda _: (client, "http://h:1"))
    jobs.submit_recipe(parse_recipe({"workspace": "s3://me:5 secret@bucket/w", "tracking": {"uri": "http://h:5000"}}))
    assert client.submit_job.call_args.kwargs["metadata"]["workspace"] == "s3://me:***@bucket/w"

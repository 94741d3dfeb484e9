"""Networks that an alias of the tracker names, on a real database of MLflow."""

import dataclasses
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, StepError, UnclipError
from pipeline.recipe.champion import DEFAULT_MEASURE
from pipeline.recipe.champion import promote as choose
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.runtime.served import Served, served_anew, served_by
from pipeline.runtime.tracking import aliases
from pipeline.runtime.tracking.aliases import evaluation_of
from pipeline.runtime.tracking.run import send_champion
from pipeline.runtime.tracking.tracker import NoAliasError
from pipeline.serve.keeper import Kept
from pipeline.workspace.lock import used_artifacts
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.tiny.recipe import write_recipe
from tests.tiny.workspace import finish_workspace, plain_samples

ALIAS = ("serve.networks=champion",)


def measured(folder: Path, *overrides: str) -> Recipe:
    """A recipe whose cascade is finished and measured."""
    recipe = load_recipe(write_recipe(folder, port=8976), [*ALIAS, *overrides])
    finish_workspace(recipe, plain_samples(), "jpg")
    step = make_plan(recipe)[-1]
    artifact = artifact_of(Workspace(recipe.workspace), step)
    artifact.commit(manifest_of(step, artifact))
    return recipe


def promote(recipe: Recipe) -> str:
    step = make_plan(recipe)[-1]
    manifest = artifact_of(Workspace(recipe.workspace), step).manifest()
    assert manifest is not None
    measured_so = dataclasses.replace(manifest, metrics={DEFAULT_MEASURE: 0.5})
    choose(recipe, step, measured_so, pytest.fail, by=DEFAULT_MEASURE, reason="because", force=True)
    send_champion(recipe, step, "because", pytest.fail)
    return step.key


def test_a_champion_is_served_beside_a_first_decoder_of_another_shape(tmp_path: Path) -> None:
    other = measured(tmp_path, "decoder.model.context_width=12")
    promote(other)
    served = served_by(load_recipe(tmp_path / "tiny.toml", [*ALIAS, "first_decoder.train.num_steps=3"]))
    assert served.recipe.decoder.model == other.decoder.model
    assert served.recipe.first_decoder is None


def test_the_champion_is_served_as_it_was_measured_whatever_the_recipe_says_now(tmp_path: Path) -> None:
    few = measured(tmp_path, "decoder.model.sampler.num_steps=2", "seed=3")
    now = measured(tmp_path, "decoder.model.sampler.num_steps=5", "decoder.model.context_width=12")
    with pytest.raises(ConfigError, match=r"no version of tiny has this alias .* `unclip promote RECIPE`"):
        served_by(now)
    assert not (tmp_path / "workspace/mlflow.db").exists()
    for champion in (few, now):
        key = promote(champion)
        served = served_by(now)
        plan = {step.name: step.key for step in make_plan(champion)}
        networks = ("clip", "prior", "decoder", "upsampler_1", "upsampler_2")
        names = (*networks, "download", "embed", "index")
        assert {name: artifact.key for name, artifact in served.artifacts.items()} == {
            name: plan[name] for name in names
        }
        assert served.recipe.decoder.model == champion.decoder.model
        assert served.recipe.upsampler_2 is not None
        assert served.recipe.serve == now.serve
        assert f"evaluation {key}" in served.version
    assert now.upsampler_2 is not None
    without = dataclasses.replace(now, upsampler_2=None)
    assert (
        getattr(served_by(without).recipe.upsampler_2, "model", None) == now.upsampler_2.model
    )  # the champion has one
    manifest = artifact_of(Workspace(now.workspace), next(step for step in make_plan(now) if step.name == "index"))
    manifest.remove("manifest.json")
    served = served_by(now)
    assert served.notes[1] == "without neighbours: not in the workspace any more: index"
    assert "embed" not in served.artifacts
    elsewhere = dataclasses.replace(now, workspace=str(tmp_path / "other"), tracking=tracked_by(now))
    with pytest.raises(ConfigError, match="was made in another workspace, or removed"):
        served_by(elsewhere)


def test_a_recipe_with_several_http_processes_is_told_how_to_get_them() -> None:
    one, several = ({"gateway": {"replicas": replicas}} for replicas in ([1, 1], [1, 3]))
    assert not Served(parse_recipe({"serve": one}), {}).notes
    [note] = Served(parse_recipe({"serve": several}), {}).notes
    assert note.startswith("one process speaks HTTP here, serve.gateway.replicas = [1, 3] asks for more")
    assert "--config-only > serve.yaml" in note


def test_a_server_whose_note_cannot_be_written_says_so_and_goes_on() -> None:
    """As on a full disk; the process after a kill then has the note of before."""
    served, lines = Served(parse_recipe({}), {}), list[str]()
    with socket.socket() as listener:
        kept = Kept(listener, 0)
        served.remember(None, lines.append)
        served.remember(kept, lines.append)
        assert not lines
        full = os.open("/dev/full", os.O_RDWR)
        try:
            os.dup2(full, kept.notes._file.fileno())
            served.remember(kept, lines.append)
        finally:
            os.close(full)
    assert len(lines) == 1
    assert lines[0].startswith("no note of what is served could be written ([Errno 28]")


def test_who_may_only_read_the_workspace_serves_and_says_what_gc_cannot_see(tmp_path: Path) -> None:
    served, lines = Served(parse_recipe({"workspace": str(tmp_path)}), {}), list[str]()
    (tmp_path / "uses").touch()  # no folder can be made here
    with served.in_use(lines.append):
        [line] = lines
    assert line.startswith("`unclip gc` cannot see what is read here, and may remove it: ")
    assert str(tmp_path / "uses") in line


def test_a_server_needs_no_list_of_pairs_to_say_what_it_reads(tmp_path: Path) -> None:
    """A machine of a cluster serves what was made elsewhere."""
    workspace = Workspace(str(tmp_path / "workspace"))
    workspace.artifact("decoder", "e" * 16).write_bytes("model.safetensors", b"weights")
    tables = {
        "workspace": workspace.root,
        "pairs": {"source": "list", "path": str(tmp_path / "nowhere.csv")},
        "decoder": {"init_from": workspace.artifact("decoder", "e" * 16).uri},
    }
    artifacts = {"prior": workspace.artifact("prior", "f" * 16)}
    with Served(parse_recipe(tables), artifacts).in_use(pytest.fail):
        assert set(used_artifacts(workspace)) == {f"prior/{'f' * 16}", f"decoder/{'e' * 16}"}


def test_a_use_that_cannot_be_taken_back_ends_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is away; what is not renewed counts for a minute more."""

    @contextmanager
    def in_use(*_: object) -> Iterator[None]:
        yield
        raise StepError("no answer")

    monkeypatch.setattr("pipeline.recipe.garbage.in_use", in_use)
    served, lines = Served(parse_recipe({"workspace": str(tmp_path)}), {}), list[str]()
    with served.in_use(lines.append):
        lines.append("served")
    assert lines == ["served"]


def tracked_by(recipe: Recipe) -> Any:
    return dataclasses.replace(recipe.tracking, uri=f"sqlite:///{recipe.workspace}/mlflow.db")


def test_a_tracker_that_is_down_slow_or_off_is_said_in_one_sentence(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, port=8976))

    def tracked(uri: str) -> Recipe:
        return dataclasses.replace(recipe, tracking=dataclasses.replace(recipe.tracking, uri=uri))

    with pytest.raises(ConfigError, match=r'tracking\.uri is "off"'):
        evaluation_of(tracked("off"), "champion")
    down = f"http://me:secret@127.0.0.1:{free_port()}"
    with pytest.raises(StepError, match=r'^serve.networks = "champion": the tracker .* does not answer \(') as caught:
        evaluation_of(tracked(down), "champion")
    assert "secret" not in str(caught.value)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connected = threading.Thread(target=silent.accept, daemon=True)
        connected.start()
        slow = tracked(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StepError, match="does not answer within 1 s"):
            evaluation_of(slow, "champion", 1)
        connected.join(20)


def test_what_fails_on_the_way_to_an_alias_is_said_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, port=8976), ["tracking.uri=http://127.0.0.1:1"])
    for error, sentence in (
        (KeyError("x"), r'^serve.networks = "champion": the tracker .* does not answer \(KeyError\)'),
        (StepError("s3://bucket: no such key"), r"^s3://bucket: no such key$"),
        (NoAliasError("x"), r"no version of tiny has this alias"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(aliases, "tags_by_alias", fail)
        with pytest.raises(UnclipError, match=sentence):
            evaluation_of(recipe, "champion")


def test_a_recipe_that_is_read_again_says_which_fields_of_serve_wait_for_a_new_start(tmp_path: Path) -> None:
    started = measured(tmp_path, "serve.networks=", "serve.keys=keys.json", "serve.name=tiny")
    read, lines = dataclasses.replace(started, serve=dataclasses.replace(started.serve, name="")), list[str]()
    served = Served(with_absolute_paths(started), {})  # as a process that was started again has it
    assert served_anew(read, served, lines.append).recipe.serve == served.recipe.serve
    assert not lines
    serve = dataclasses.replace(
        read.serve, networks="champion", timeout_s=1.0, safety_hook="my_safety:check", keys="other.json"
    )
    changed = dataclasses.replace(read, name="other", serve=serve)
    assert served_anew(changed, served, lines.append).recipe.serve == served.recipe.serve
    names = [re.sub(r" has changed in the recipe: it holds from the next start on$", "", line) for line in lines]
    assert names == ["serve.name", "serve.networks", "serve.timeout_s", "serve.keys", "serve.safety_hook"]

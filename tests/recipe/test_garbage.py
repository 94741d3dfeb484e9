"""What no recipe needs, and what stays because something reads it."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from models.editor import EditSettings
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.evaluate.ablate import ablate_recipe
from pipeline.recipe.garbage import Garbage, find_garbage, in_use_of, remove_garbage
from pipeline.recipe.last_run import PLAN, RESOLVED, read_last_run, write_last_run
from pipeline.recipe.lineage import trace
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS, STEPS
from pipeline.recipe.tables import to_dict
from pipeline.sampling import sample
from pipeline.sampling.edit_options import EditOptions
from pipeline.sampling.edit_pictures import edit_recipe
from pipeline.workspace.lock import in_use, used_artifacts
from pipeline.workspace.store import Artifact, Workspace
from tests.recipe.finished import finish, picture_of
from tests.tiny.recipe import tiny_tables, write_recipe


def test_garbage_is_what_no_recipe_needs(recipe: Recipe, tmp_path: Path) -> None:
    old = parse_recipe(tiny_tables(tmp_path / "workspace", prior={"train": {"num_steps": 77}}))
    old_keys, keys = finish(old), finish(recipe)
    workspace = Workspace(recipe.workspace)
    workspace.artifact("prior", "f" * 16).write_bytes("live/checkpoint", bytes(100))
    garbage, others = find_garbage(workspace, [recipe])
    assert {(one.step, one.key) for one in garbage} == {
        *((step, key) for step, key in old_keys.items() if keys[step] != key),
        ("prior", "f" * 16),
    }
    assert garbage[0].num_bytes > 100  # a manifest is larger than the checkpoint
    assert Garbage("prior", "f" * 16, 100, is_finished=False) in garbage
    assert others == []
    assert find_garbage(workspace, [recipe, old])[0] == [Garbage("prior", "f" * 16, 100, is_finished=False)]
    assert remove_garbage(workspace, garbage, lambda: None) == (garbage, [])
    assert find_garbage(workspace, [recipe]) == ([], [])
    assert workspace.keys("prior") == [keys["prior"]]
    assert all(artifact_of(workspace, step).manifest() for step in make_plan(recipe))


def test_the_training_that_an_unfinished_one_continues_stays(recipe: Recipe, tmp_path: Path) -> None:
    phase = {"from_step": 1, "learning_rate": 1e-4}
    longer = parse_recipe(tiny_tables(tmp_path / "workspace", prior={"train": {"phases": [phase]}}))
    keys, workspace = finish(recipe), Workspace(recipe.workspace)
    assert ("prior", keys["prior"]) not in {(one.step, one.key) for one in find_garbage(workspace, [longer])[0]}
    finish(longer)
    assert ("prior", keys["prior"]) in {(one.step, one.key) for one in find_garbage(workspace, [longer])[0]}


def _network(artifact: Artifact, name: str = "model.safetensors") -> str:
    """An artifact with a file of weights, and nothing else; the path of the file."""
    artifact.write_bytes(name, b"weights")
    return f"{artifact.uri}/{name}"


def _names(garbage: Sequence[Garbage]) -> set[tuple[str, str]]:
    return {(one.step, one.key) for one in garbage}


@pytest.mark.parametrize("named", ["folder", "checkpoint", "link", "file URI"])
def test_the_network_that_a_recipe_starts_from_stays(recipe: Recipe, tmp_path: Path, named: str) -> None:
    workspace, key = Workspace(recipe.workspace), "e" * 16
    artifact, other = workspace.artifact("decoder", key), workspace.artifact("decoder", "f" * 16)
    init_from = artifact.uri
    if named == "checkpoint":
        init_from = _network(artifact, "live/checkpoints/00000040.safetensors")
    else:
        _network(artifact)
    _network(other)
    if named == "link":
        (tmp_path / "link").symlink_to(artifact.uri)
        init_from = str(tmp_path / "link")
    start = {"init_from": f"file://{init_from}" if named == "file URI" else init_from}
    started = parse_recipe(tiny_tables(tmp_path / "workspace", decoder=start))
    finish(started)
    garbage, others = find_garbage(workspace, [started])
    assert _names(garbage) == {("decoder", "f" * 16)}
    assert others == []
    assert ("decoder", key) in _names(find_garbage(workspace, [recipe])[0])
    with in_use_of(started, {"decoder"}):  # it may be served as it is
        assert ("decoder", key) not in _names(find_garbage(workspace, [recipe])[0])
    with in_use_of(started, {"prior"}):
        assert ("decoder", key) in _names(find_garbage(workspace, [recipe])[0])


def test_what_is_served_and_what_an_index_reads_stays(recipe: Recipe, tmp_path: Path) -> None:
    old = parse_recipe(tiny_tables(tmp_path / "workspace", embed={"precision": "bfloat16"}))
    old_keys, _ = finish(old), finish(recipe)
    workspace = Workspace(recipe.workspace)
    index = next(artifact_of(workspace, step) for step in make_plan(recipe) if step.name == "index")
    index.write_json("segment_00001/segment.json", {"embedded": {"sources": [f"embed/{old_keys['embed']}"]}})
    names = {(one.step, one.key) for one in find_garbage(workspace, [recipe])[0]}
    assert ("embed", old_keys["embed"]) not in names
    assert ("prior", old_keys["prior"]) in names
    with in_use(workspace, [f"prior/{old_keys['prior']}"]):
        garbage, [others] = find_garbage(workspace, [recipe])
        assert {(one.step, one.key) for one in garbage} == names - {("prior", old_keys["prior"])}
        assert (others.step, others.key) == ("prior", old_keys["prior"])
        assert "in use by process" in others.why
    assert {(one.step, one.key) for one in find_garbage(workspace, [recipe])[0]} == names


def test_what_is_read_stays_with_all_that_it_reads_from_the_moment_on(recipe: Recipe, tmp_path: Path) -> None:
    old = parse_recipe(tiny_tables(tmp_path / "workspace", embed={"precision": "bfloat16"}))
    other = parse_recipe(tiny_tables(tmp_path / "workspace", download={"image_px": 48}))
    old_keys, other_keys, _ = finish(old), finish(other), finish(recipe)
    workspace = Workspace(recipe.workspace)
    index = workspace.artifact("index", old_keys["index"])
    index.write_json("segment_00001/segment.json", {"embedded": {"sources": [f"embed/{other_keys['embed']}"]}})
    garbage, _ = find_garbage(workspace, [recipe])
    read = {("index", old_keys["index"]), ("embed", old_keys["embed"]), ("embed", other_keys["embed"])}
    assert read <= {(one.step, one.key) for one in garbage}
    with in_use_of(old, {"index"}):
        assert not read & {(one.step, one.key) for one in find_garbage(workspace, [recipe])[0]}
        removed, stays = remove_garbage(workspace, garbage, lambda: None)  # listed before it was read
        assert read <= {(one.step, one.key) for one in stays}
        assert {(one.step, one.key) for one in removed} == {(one.step, one.key) for one in garbage} - {
            (one.step, one.key) for one in stays
        }
    assert index.manifest() is not None


def test_gc_reads_each_manifest_once_and_again_when_another_process_begins_to_read(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = parse_recipe(tiny_tables(tmp_path / "workspace", prior={"train": {"num_steps": 9}}))
    old_keys, keys = finish(old), finish(recipe)
    workspace, manifest, reads = Workspace(recipe.workspace), Artifact.manifest, list[str]()
    for number in range(4):
        workspace.artifact("prior", f"{number}" * 16).write_bytes("live/checkpoint", bytes(100))
    garbage = [one for one in find_garbage(workspace, [recipe, old])[0] if one.step == "prior"]
    garbage.append(Garbage("evaluate", old_keys["evaluate"], 1, is_finished=True))

    def count(artifact: Artifact) -> Any:
        reads.append(artifact.uri)
        return manifest(artifact)

    monkeypatch.setattr(Artifact, "manifest", count)
    with contextlib.ExitStack() as stack:
        for name in ("prior", "decoder", "upsampler_1"):
            stack.enter_context(in_use(workspace, [f"{name}/{keys[name]}"]))

        def check() -> None:
            if len(workspace.keys("prior")) == 2:  # all but the last have gone
                stack.enter_context(in_use(workspace, [f"evaluate/{old_keys['evaluate']}"]))
                assert sorted(reads) == sorted({*reads})

        removed, stays = remove_garbage(workspace, garbage, check)
    assert [one.step for one in removed] == ["prior"] * 4
    assert [(one.step, one.key) for one in stays] == [("evaluate", old_keys["evaluate"])]


def test_gc_stops_when_it_lost_the_lock(recipe: Recipe) -> None:
    workspace = Workspace(recipe.workspace)
    workspace.artifact("prior", "f" * 16).write_bytes("live/checkpoint", bytes(100))
    garbage, _ = find_garbage(workspace, [recipe])

    def lost() -> None:
        raise StepError("lost")

    with pytest.raises(StepError, match="lost"):
        remove_garbage(workspace, garbage, lost)
    assert workspace.keys("prior") == ["f" * 16]


def test_sampling_marks_the_networks_that_it_reads(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    keys, used = finish(recipe), set[str]()

    def load(*_: object) -> None:
        used.update(used_artifacts(Workspace(recipe.workspace)))
        raise ConfigError("no network")

    monkeypatch.setattr(sample, "load_cascade", load)
    with pytest.raises(ConfigError, match="no network"):
        sample.sample_recipe(recipe, ["a"], num_images=1, seed=0, out_dir=tmp_path / "out")
    assert used == {f"{name}/{key}" for name, key in keys.items() if name in CASCADE_STEPS}


def test_the_command_removes_only_when_told(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=1)
    workspace = Workspace(str(tmp_path / "workspace"))
    workspace.artifact("prior", "f" * 16).write_bytes("live/checkpoint", bytes(2000))
    dry_run = CliRunner().invoke(app, ["gc", str(path)])
    assert dry_run.exit_code == 0, dry_run.output
    assert "1 artifacts, 2 KB: not needed" in dry_run.stdout
    assert f"next:\n  unclip gc {path} --delete" in dry_run.stderr
    assert workspace.keys("prior") == ["f" * 16]
    assert "1 artifacts, 2 KB: removed" in CliRunner().invoke(app, ["gc", str(path), "--delete"]).stdout
    assert workspace.keys("prior") == []


def test_what_the_last_run_of_a_recipe_made_stays_whatever_it_was_run_with(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=1)
    workspace = Workspace(str(tmp_path / "workspace"))
    keys = finish(load_recipe(path, ["seed=1", "embed.batch_size=3"]))
    workspace.artifact("prior", "f" * 16).write_bytes("live/checkpoint", bytes(2000))
    result = CliRunner().invoke(app, ["gc", str(path), "--delete"])
    assert "1 artifacts, 2 KB: removed" in result.stdout, result.output
    assert "was last run with seed = 1, embed.batch_size = 3; what that run made stays" in result.stderr
    assert all(workspace.keys(step) == [key] for step, key in keys.items())
    finish(load_recipe(path))
    changed = CliRunner().invoke(app, ["gc", str(path), "--set", "seed=1", "--set", "embed.batch_size=3"])
    assert changed.stdout.startswith("0 artifacts"), (
        changed.output
    )  # those of the last run, and of the fields that are named
    old = CliRunner().invoke(app, ["gc", str(path)])
    assert f"prior             {keys['prior']}" in old.stdout
    assert "was last run" not in old.stderr


def _gc(path: Path) -> tuple[set[tuple[str, str]], str]:
    """Step and key of what `unclip gc` lists, and its notes."""
    result = CliRunner().invoke(app, ["gc", str(path), "--json"], catch_exceptions=False)
    return {(one["step"], one["key"]) for one in json.loads(result.stdout)["garbage"]}, result.stderr


def test_what_the_last_run_made_stays_although_its_list_is_away(tmp_path: Path) -> None:
    path, rows = write_recipe(tmp_path, port=1), tmp_path / "rows.csv"
    rows.write_text("url,caption\nhttp://a/1.jpg,a\n")
    finish(load_recipe(path, ["pairs.source=list", f"pairs.path={rows}"]))
    rows.unlink()
    garbage, notes = _gc(path)
    assert not garbage
    assert f"pairs.path = {rows}" in notes


def test_what_another_release_made_last_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of its steps were others, and its recipe has a field that this release does not know."""
    path = write_recipe(tmp_path, port=1)
    recipe = load_recipe(path)
    workspace, decoder = Workspace(recipe.workspace), ("decoder", "e" * 16)
    start = _network(workspace.artifact(*decoder))
    longer = load_recipe(path, ["prior.train.phases=[{from_step=1,learning_rate=1e-4}]", f"decoder.init_from={start}"])
    with monkeypatch.context() as before:
        rows = tuple(dataclasses.replace(row, version=row.version + 100) for row in STEPS)
        before.setattr("pipeline.recipe.plan.STEPS", rows)
        shorter = load_recipe(path, [f"decoder.init_from={start}"])
        keys, last = finish(shorter), {step.name: step.key for step in make_plan(longer)}
        write_last_run(longer)
    stored = workspace.artifact("recipes", recipe.name)
    tables = stored.read_json(RESOLVED)
    tables["download"]["speed"] = 3
    stored.write_json(RESOLVED, tables)
    garbage, notes = _gc(path)
    # The longer training, which is not finished, goes on from the one of before.
    kept = {("prior", keys["prior"]), decoder, *((name, key) for name, key in keys.items() if last[name] == key)}
    assert garbage == set(keys.items()) - kept
    assert garbage
    assert "was last run with prior.train.phases = " in notes
    stored.remove(RESOLVED)
    assert "was last run by another release, or with files that have changed since; what that run" in _gc(path)[1]
    unfinished = workspace.artifact("prior", last["prior"])
    unfinished.write_bytes("live/checkpoint", b"")
    lineage = trace(unfinished.uri)
    assert lineage.nodes[0].recipes == (recipe.name,)
    assert lineage.nodes[0].inputs == {name: last[name] for name in lineage.nodes[0].inputs}
    assert lineage.notes == ()


@pytest.mark.parametrize("plan", [None, b"{", b"{}"])
def test_gc_removes_nothing_if_it_is_not_known_what_the_last_run_made(tmp_path: Path, plan: bytes | None) -> None:
    path = write_recipe(tmp_path, port=1)
    recipe = load_recipe(path)
    keys, workspace = finish(recipe), Workspace(recipe.workspace)
    stored = workspace.artifact("recipes", recipe.name)
    if plan is None:
        stored.remove(PLAN)
    else:
        stored.write_bytes(PLAN, plan)
    result = CliRunner().invoke(app, ["gc", str(path), "--delete"])
    assert isinstance(result.exception, DataError)
    assert "what the last run of tiny made is not known: " in str(result.exception)
    assert " remove" not in str(result.exception)
    [note] = trace(keys["prior"], recipe.workspace).notes
    assert note.startswith("recipe tiny: what its last run made is not known: ")
    assert read_last_run(workspace, "never run") is None
    done = CliRunner().invoke(app, ["run", str(path), "--set", "tracking.uri=off"], catch_exceptions=False)
    assert "nothing to do" in done.stdout
    assert _gc(path)[0] == set()


@pytest.mark.parametrize("plan", [None, b"{"])
def test_what_the_last_run_made_stays_if_another_one_has_nothing_to_do(tmp_path: Path, plan: bytes | None) -> None:
    """Its fields are there, and a run of other fields is not the last one."""
    path, changed = write_recipe(tmp_path, port=1), "embed.batch_size=3"
    finish(load_recipe(path))
    last = load_recipe(path, [changed])
    finish(last)
    stored = Workspace(last.workspace).artifact("recipes", last.name)
    stored.remove(PLAN)
    if plan is not None:
        stored.write_bytes(PLAN, plan)
    words = ["run", str(path), "--set", "tracking.uri=off"]
    assert "nothing to do" in CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert stored.read_json(RESOLVED)["embed"]["batch_size"] == 3
    with pytest.raises(DataError, match="copy what you need of it first"):
        _gc(path)
    assert "nothing to do" in CliRunner().invoke(app, [*words, "--set", changed], catch_exceptions=False).stdout
    assert _gc(path)[0] == set()


@pytest.mark.parametrize("words", [["gc", "{path}"], ["gc", "{path}", "{path}", "--set", "seed=1"]])
def test_gc_refuses_what_it_cannot_mean(tmp_path: Path, words: list[str]) -> None:
    path = write_recipe(tmp_path, port=1)
    result = CliRunner().invoke(app, [word.format(path=path) for word in words])
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "workspace").exists()


def test_ablations_and_searches_stay_with_what_they_were_made_from(recipe: Recipe, tmp_path: Path) -> None:
    old = parse_recipe(tiny_tables(tmp_path / "workspace", embed={"precision": "bfloat16"}))
    workspace, old_keys, keys = Workspace(recipe.workspace), finish(old), finish(recipe)
    for key, of in (("old", old_keys), ("new", keys)):
        inputs = {name: of[name] for name in ("clip", "index")}
        workspace.artifact("search", key).write_json("search.json", {"inputs": inputs})
        step, output = Step("ablate", 1, {"of": key}, inputs), workspace.artifact("ablate", key)
        output.commit(dataclasses.replace(manifest_of(step, output, {}), key=key))
    workspace.artifact("ablate", "stopped").write_bytes("parts/prior-00000.parquet", b"rows")
    results = {("search", "old"), ("ablate", "old"), ("ablate", "stopped")}
    garbage, _ = find_garbage(workspace, [recipe])
    assert {one for one in _names(garbage) if one[0] in {"search", "ablate"}} == results
    assert not {one[0] for one in _names(find_garbage(workspace, [recipe, old])[0])} - {"ablate"}
    with in_use_of(recipe, (), [("ablate", "stopped")]):
        assert ("ablate", "stopped") not in _names(find_garbage(workspace, [recipe])[0])


@pytest.mark.parametrize("command", ["edit", "export", "export embeddings", "ablate"])
def test_commands_mark_what_they_read(recipe: Recipe, tmp_path: Path, monkeypatch: Any, command: str) -> None:
    keys, used = finish(recipe), set[str]()

    def stop(*_: object, **__: object) -> None:
        used.update(used_artifacts(Workspace(recipe.workspace)))
        raise ConfigError("stopped")

    run, place, reads = {
        "edit": (_edit, "pipeline.sampling.edit_pictures.load_cascade", {*CASCADE_STEPS, "embed"}),
        "export": (_export("--native"), "pipeline.networks.diffusers.export_native", {*CASCADE_STEPS}),
        "export embeddings": (_export("--embeddings"), "pipeline.data.npy_folder.export_embeddings", {"embed"}),
        "ablate": (_ablate, "pipeline.evaluate.ablate.choose_prompts", {*CASCADE_STEPS, "pairs", "embed"}),
    }[command]
    monkeypatch.setattr(place, stop)
    with pytest.raises(ConfigError, match="stopped"):
        run(recipe, tmp_path)
    marked = {f"{name}/{key}" for name, key in keys.items() if name in reads}
    assert {one for one in used if not one.startswith("ablate/")} == marked
    assert any(one.startswith("ablate/") for one in used) == (command == "ablate")


def _edit(recipe: Recipe, folder: Path) -> None:
    picture = picture_of(folder, {})
    edit_recipe(recipe, "vary", [str(picture)], EditOptions(), EditSettings(), out_dir=folder / "out")


def _export(option: str) -> Callable[[Recipe, Path], None]:
    def run(recipe: Recipe, folder: Path) -> None:
        (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
        words = ["export", str(folder / "recipe.json"), option, str(folder / "out")]
        CliRunner().invoke(app, words, catch_exceptions=False)

    return run


def _ablate(recipe: Recipe, _: Path) -> None:
    ablate_recipe(recipe, num_prompts=1, num_shown=1, watch=lambda *_: None)

"""Where steps stand: the states of a plan, and the reasons for them."""

from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from jobs.cli import app
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.status import plan_status
from pipeline.workspace.manifest import Manifest, content_of
from pipeline.workspace.store import MANIFEST, Workspace
from tests.recipe.finished import commit_index, commit_step


def test_plan_status_names_the_field_and_the_input_that_changed(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    for step in make_plan(load_recipe(None)):
        commit_step(workspace, step)
    assert {status.state for status in plan_status(workspace, make_plan(load_recipe(None)))} == {"done"}
    changed = make_plan(load_recipe(None, ["prior.train.num_steps=7"]))
    statuses = {status.step.name: status for status in plan_status(workspace, changed)}
    assert statuses["prior"].reasons == ("prior.train.num_steps: 1000 -> 7",)
    assert statuses["evaluate"].reasons == ("prior changed",)
    assert statuses["decoder"].state == "done"
    later = make_plan(load_recipe(None, ["decoder.model.text_adapter.depth=2", "clip.model.hard_negatives=true"]))
    statuses = {status.step.name: status for status in plan_status(workspace, later)}
    assert statuses["decoder"].reasons == ("clip changed", "embed changed", "decoder.model.text_adapter.depth: 0 -> 2")
    assert statuses["clip"].reasons == ("clip.model.hard_negatives: False -> True",)


def test_plan_status_sees_that_an_input_was_made_anew_with_other_bytes(tmp_path: Path) -> None:
    workspace, steps = Workspace(str(tmp_path)), make_plan(load_recipe(None), until="download")
    pairs, download = (artifact_of(workspace, step) for step in steps)

    def make_pairs(data: bytes, time_of_run: bytes) -> Manifest:
        pairs.write_bytes("00000.parquet", data)
        pairs.write_bytes("00000_stats.json", time_of_run)
        pairs.commit(manifest_of(steps[0], pairs))
        return pairs.manifest() or manifest_of(steps[0], pairs)

    content = content_of(make_pairs(b"one", b"1"))
    download.commit(replace(manifest_of(steps[1], download), input_contents={"pairs": content}))
    for data, states in ((b"one", ["done", "done"]), (b"two", ["done", "todo"]), (b"one", ["done", "done"])):
        make_pairs(data, b"later")
        assert [status.state for status in plan_status(workspace, steps)] == states
    make_pairs(b"two", b"3")
    assert plan_status(workspace, steps)[1].reasons == ("pairs was made anew, with other content",)
    clip, embed = (step for step in make_plan(load_recipe(None), until="embed") if step.name in {"clip", "embed"})
    for step, made_of in ((clip, download), (embed, download)):
        manifest = made_of.manifest()
        assert manifest is not None
        later = artifact_of(workspace, step)
        later.commit(replace(manifest_of(step, later), input_contents={"download": content_of(manifest)}))
    statuses = plan_status(workspace, [*steps, clip, embed])
    assert [status.state for status in statuses] == ["done", "todo", "done", "done"]
    assert statuses[2].reasons == ("runs again if download, which is out of date, comes out different",)
    assert statuses[3].reasons[-1] == "runs again if clip, which is out of date, comes out different"
    pairs.clear()
    assert [status.state for status in plan_status(workspace, steps)] == ["todo", "done"]  # nothing to compare with


def test_plan_status_says_what_is_to_be_done_about_appended_embeddings(tmp_path: Path) -> None:
    words = ["configs/demo.toml", "--set", f"workspace={tmp_path}"]
    workspace, steps = Workspace(str(tmp_path)), make_plan(load_recipe(words[0], words[2:]), until="index")
    for step in steps:
        commit_step(workspace, step)
    index, embed = (artifact_of(workspace, step) for step in (steps[-1], steps[-2]))
    manifest, base = index.manifest(), embed.manifest()
    more = workspace.artifact("embed", "more")
    assert manifest is not None
    assert base is not None

    def make_more(data: bytes) -> str:
        more.clear()
        more.write_bytes("00000.parquet", data)
        more.commit(replace(base, files=more.describe_files()))
        return content_of(replace(base, files=more.describe_files()))

    own = f"embed/{embed.key}"
    commit_index(index, [own], [own, "embed/more"], contents={own: content_of(base), "embed/more": make_more(b"one")})
    index.write_json(MANIFEST, replace(manifest, input_contents={"embed": content_of(base)}).to_dict())

    def status() -> tuple[str, tuple[str, ...]]:
        status = plan_status(workspace, steps)[-1]
        return status.state, status.reasons

    assert status() == ("done", ())
    make_more(b"two")
    assert status() == ("done", (f"{more.uri} was made anew since it was appended: unclip compact RECIPE",))
    assert (
        f"since it was appended: unclip compact {' '.join(words)}" in CliRunner().invoke(app, ["plan", *words]).stdout
    )
    more.clear()
    is_away = f"{more.uri}, which was appended, is not finished or is gone: run its recipe first"
    assert status() == ("done", (is_away,))
    embed.write_bytes("00000.parquet", b"other")
    embed.write_json(MANIFEST, replace(base, files=embed.describe_files()).to_dict())
    come_back = f"bring them back afterwards: unclip append RECIPE {more.uri}"
    anew = "embed was made anew, with other content"
    assert status() == ("todo", (anew, f"without the rows that were appended; {come_back}"))
    index.remove("segment_00001/segment.json")
    assert status()[1][1].startswith(f"{index.uri}: no file segment_00001/segment.json")


def test_plan_status_shows_a_manifest_that_cannot_be_read_and_goes_on(tmp_path: Path) -> None:
    workspace, steps = Workspace(str(tmp_path)), make_plan(load_recipe(None))
    for step in steps:
        commit_step(workspace, step)
    damaged = artifact_of(workspace, steps[1])
    damaged.write_bytes("manifest.json", b"")
    statuses = plan_status(workspace, steps)
    assert [status.state for status in statuses] == ["done", "unreadable", *["done"] * (len(steps) - 2)]
    assert f"{damaged.uri}/manifest.json: not valid JSON" in statuses[1].reasons[0]
    other = plan_status(workspace, make_plan(load_recipe(None, ["download.retries=7"])))
    assert other[1].state == "todo"
    assert other[1].reasons[0] == "never run"
    assert f"{damaged.uri}/manifest.json: not valid JSON" in other[1].reasons[1]


def test_plan_status_tells_todo_from_partial(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    steps = make_plan(load_recipe(None))
    artifact_of(workspace, steps[1]).write_json("live/progress.json", {})
    states = [status.state for status in plan_status(workspace, steps)]
    assert states[:3] == ["todo", "partial", "todo"]
    assert plan_status(workspace, steps)[0].reasons == ("never run",)

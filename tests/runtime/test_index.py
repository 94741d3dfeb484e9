"""The index step and its changes on a real Ray."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tomli_w

from pipeline.data.rows import make_uid, row_id
from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import build_index
from pipeline.retrieve.changes import delete
from pipeline.retrieve.recall import metrics_of
from pipeline.retrieve.versions import read_version
from pipeline.runtime import index as runtime_index
from pipeline.runtime.context import StepContext
from pipeline.runtime.run import _Steps
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.tiny.command import unclip_here, unclip_json
from tests.tiny.recipe import tiny_tables
from tests.tiny.shards import make_embeddings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


_INDEX = {"kind": "flat", "num_recall_queries": 4}


def _context(folder: Path, **index: Any) -> tuple[Recipe, StepContext]:
    recipe = parse_recipe(tiny_tables(folder, index=_INDEX | index))
    [step] = [step for step in make_plan(recipe) if step.name == "index"]
    return recipe, StepContext(recipe, step, Workspace(recipe.workspace).root)


def _embed(artifact: Artifact, vectors: Any, *, first: int = 0) -> Artifact:
    make_embeddings(artifact, vectors, vectors, rows_per_shard=10_000, first=first)
    artifact.commit(Manifest(step="embed", key="k", step_version=1, section={}, inputs={"clip": "c"}))
    return artifact


def test_parts_are_built_by_workers_and_changed_like_an_index_of_one_part(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(80_050, 4)))
    recipe, context = _context(tmp_path, resources={"num_workers": 2})
    embed = _embed(context.inputs["embed"], vectors[:80_000])
    result = runtime_index.run_index(context)  # two parts: a part has at least 65,536 rows
    assert result.counts == {"in": 80_000, "ok": 80_000}
    assert result.num_workers == 2
    here = Artifact(context.output.uri)
    large = {name for name in here.names() if name.endswith((".npy", ".arrow", ".faiss", ".lists"))}
    large = {name for name in large if name.startswith("segment_")}
    assert large
    assert {name: result.files[name] for name in large} == {name: here.describe(name) for name in large}
    context.output.commit(dataclasses.replace(manifest_of(context.step, context.output), counts=result.counts))
    opened = NeighbourIndex.open(context.output)
    rows = [0, 65_535, 79_999]
    assert [row[0].caption for row in opened.find(vectors[rows], 1)] == [f"caption {row}" for row in rows]
    delete(context.output, ["http://a/65535"])
    more = _embed(Workspace(recipe.workspace).artifact("embed", "more"), vectors[79_990:], first=79_990)
    assert runtime_index.append(recipe, context.step, more, lambda: None).counts == {
        "in": 60,
        "ok": 50,
        "already_indexed": 10,
    }
    assert runtime_index.compact(recipe, context.step, lambda: None).counts["deleted"] == 1
    compacted = NeighbourIndex.open(context.output)
    assert (compacted.num_rows, compacted.version) == (80_049, 3)
    assert compacted.sources[compacted.sources_of([row_id(make_uid("http://a/5", "caption 5"))])[0]].uri == embed.uri
    assert not [name for name in context.output.names() if name.startswith("live/")]


def test_the_commands_append_delete_restore_and_compact(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 4)))
    recipe, context = _context(tmp_path / "workspace")
    path = tmp_path / "recipe.toml"
    path.write_bytes(tomli_w.dumps(tiny_tables(tmp_path / "workspace", index=_INDEX)).encode())
    missing = unclip_here("delete", str(path), "--uid", "u")
    assert (missing.returncode, "unclip run" in missing.stderr) == (2, True)
    _embed(context.inputs["embed"], vectors[:30])
    build_index(context.inputs["embed"], context.output, recipe.index, seed=0)
    context.output.commit(manifest_of(context.step, context.output))

    nothing = unclip_here("delete", str(path))
    assert (nothing.returncode, "--uid UID" in nothing.stderr) == (2, True)
    names = tmp_path / "takedown.txt"
    names.write_text("http://a/7\n\nhttp://a/35\n")
    deleted = unclip_here("delete", str(path), "--file", str(names), "--uid", make_uid("http://a/2", "caption 2"))
    assert (deleted.returncode, deleted.stdout) == (0, "2 pairs deleted; the index has version 1\n")
    assert deleted.stderr.partition("next:\n")[0] == (
        "not in the index: http://a/35; no later build of an index takes it\n"
    )

    more = _embed(Workspace(recipe.workspace).artifact("embed", "more"), vectors[30:], first=30)
    appended = unclip_json("append", str(path), more.uri)
    assert appended["counts"] == {"in": 10, "ok": 9, "deleted": 1}
    assert "9 of 10" not in unclip_here("append", str(path), more.uri).stdout  # they are there already
    assert unclip_json("restore", str(path), "--url", "http://a/7")["changed"] == 1
    assert unclip_json("compact", str(path))["counts"] == {"in": 40, "ok": 38, "deleted": 2}
    assert NeighbourIndex.open(context.output).num_rows == 38
    assert unclip_here("append", str(path), str(tmp_path)).returncode == 3

    words = ("http://a/9", "--workspace", recipe.workspace)
    assert unclip_json("forget", *words)["rows"] == {"embed": 1, "index": 1}
    done = unclip_json("forget", *words, "--delete", "--compact")  # by the manifest of the index, without a recipe
    assert (done["pairs"], done["rewritten"]) == (1, True)
    opened = NeighbourIndex.open(context.output)
    assert opened.num_rows == 37
    assert [row.caption for row in opened.find(vectors[[39]], 1)[0]] == ["caption 39"]
    assert make_uid("http://a/9", "caption 9") not in {row.uid for row in opened.find(vectors[[9]], 37)[0]}
    assert not [name for name in context.output.names() if name.startswith("segment_00002/")]


def test_changes_for_which_this_machine_is_too_small_are_refused_before_they_begin(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 4)))
    large = {"resources": {"cpus_per_worker": 64.0}}
    recipe, context = _context(tmp_path / "workspace", **large)
    path = tmp_path / "recipe.toml"
    path.write_bytes(tomli_w.dumps(tiny_tables(tmp_path / "workspace", index=_INDEX | large)).encode())
    _embed(context.inputs["embed"], vectors[:30])
    build_index(context.inputs["embed"], context.output, recipe.index, seed=0)
    context.output.commit(manifest_of(context.step, context.output))
    more = _embed(Workspace(recipe.workspace).artifact("embed", "more"), vectors[30:], first=30)
    forget = ("forget", "http://a/9", "--recipe", str(path), "--delete", "--compact")
    for words in (("append", str(path), more.uri), ("compact", str(path)), forget):
        refused = unclip_here(*words)
        assert refused.returncode == 4, words
        assert "index needs 1 x 64 CPU: this machine has " in refused.stderr, words
    pending = Pending.read(recipe.workspace)
    assert pending is not None
    assert not pending.has_begun


def test_a_gpu_that_faiss_does_not_see_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, context = _context(tmp_path, resources={"accelerator": "cuda"})
    _embed(context.inputs["embed"], unit(np.random.default_rng(0).normal(size=(30, 4))))
    monkeypatch.setattr(runtime_index, "has_gpu", lambda: False)
    build = runtime_index._segment_build(context, (context.inputs["embed"],))
    assert build.on_gpu
    with pytest.raises(StepError, match="this FAISS sees no GPU"):
        runtime_index._require_gpu(build)


def test_an_index_that_misses_its_recall_target_says_so_when_it_is_built_and_changed(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(24_000, 32)))  # one bit a feature tells too little of them
    changes = {"kind": "ivf_rabitq", "num_recall_queries": 200, "recall_target": 1.0, "num_train_rows": 2000}
    recipe, context = _context(tmp_path / "workspace", **changes)
    _embed(context.inputs["embed"], vectors[:12_000])
    result = runtime_index.run_index(context)
    [warning] = result.warnings
    assert "index: the recall target of 1 is not reached, or not surely (measured: " in warning
    assert not result.metrics["reaches_recall_target"]
    context.output.commit(dataclasses.replace(manifest_of(context.step, context.output), metrics=result.metrics))
    path = tmp_path / "recipe.toml"
    path.write_bytes(tomli_w.dumps(tiny_tables(tmp_path / "workspace", index=_INDEX | changes)).encode())
    more = _embed(Workspace(recipe.workspace).artifact("embed", "more"), vectors[12_000:], first=12_000)
    for words, num_ok in ((("append", str(path), more.uri), 12_000), (("compact", str(path)), 24_000)):
        done = unclip_here(*words)
        assert (done.returncode, f"{num_ok} of {num_ok} pairs" in done.stdout) == (0, True)
        assert "warning: index: the recall target of 1 is not reached" in done.stderr
    [metrics] = metrics_of(context.output, read_version(context.output), result.metrics)
    assert (metrics["num_rows"], metrics["reaches_recall_target"]) == (24_000, False)


def test_a_run_tells_what_the_result_of_a_step_says(tmp_path: Path) -> None:
    _, context = _context(tmp_path)
    events = list[str]()

    class _Observer:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: events.append(f"{name} {arguments[0]}")

    steps = _Steps([], set(), cast("Any", _Observer()), cast("Any", None))
    manifest = manifest_of(context.step, context.output)
    steps.finish(context.step, manifest, ["index: too few"])
    assert steps.done == {"index"}
    assert [event.split()[0] for event in events] == ["finished", "warned"]
    assert events[-1] == "warned index: too few"

"""The index step and its changes on a real Ray."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.rows import make_uid, row_id
from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.changes import delete
from pipeline.runtime import index as runtime_index
from pipeline.runtime.context import StepContext
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.tiny.recipe import tiny_tables
from tests.tiny.shards import make_embeddings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def _context(folder: Path, **index: Any) -> tuple[Recipe, StepContext]:
    recipe = parse_recipe(tiny_tables(folder, index={"kind": "flat", "num_recall_queries": 4, **index}))
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
    context.output.commit(dataclasses.replace(manifest_of(context.step, context.output), counts=result.counts))
    opened = NeighbourIndex.open(context.output)
    rows = [0, 65_535, 79_999]
    assert [row[0].caption for row in opened.find(vectors[rows], 1)] == [f"caption {row}" for row in rows]
    delete(context.output, ["http://a/65535"])
    more = _embed(Workspace(recipe.workspace).artifact("embed", "more"), vectors[79_990:], first=79_990)
    assert runtime_index.append(recipe, context.step, more).counts == {"in": 60, "ok": 50, "already_indexed": 10}
    assert runtime_index.compact(recipe, context.step).counts["deleted"] == 1
    compacted = NeighbourIndex.open(context.output)
    assert (compacted.num_rows, compacted.version) == (80_049, 3)
    assert compacted.source_of(row_id(make_uid("http://a/5", "caption 5"))).uri == embed.uri
    assert not [name for name in context.output.names() if name.startswith("live/")]


def test_a_gpu_that_faiss_does_not_see_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, context = _context(tmp_path, resources={"accelerator": "cuda"})
    _embed(context.inputs["embed"], unit(np.random.default_rng(0).normal(size=(30, 4))))
    monkeypatch.setattr(runtime_index, "has_gpu", lambda: False)
    build = runtime_index._segment_build(context, (context.inputs["embed"],))
    assert build.on_gpu
    with pytest.raises(StepError, match="this FAISS sees no GPU"):
        runtime_index._require_gpu(build)

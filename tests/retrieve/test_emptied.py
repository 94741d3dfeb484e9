"""An index of which every row is taken down is an index without rows: it opens, answers with none, and takes others."""

from typing import Any

import numpy as np
import pytest

from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import build_index
from pipeline.retrieve.changes import delete, restore
from pipeline.retrieve.kinds import KINDS
from pipeline.retrieve.retriever import Retriever
from pipeline.retrieve.takedown import Takedown
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import CONFIG, append, commit_embed, compact, rows_of, uid_of


def _require_no_rows(index: Artifact, vectors: Any) -> None:
    opened = NeighbourIndex.open(index)
    assert opened.num_rows == 0
    for modality in ("image", "text"):
        assert opened.find(vectors[:2], 3, modality) == [[], []]
    assert opened.sample("train", 5).tolist() == []
    assert opened.rows([]).num_rows == 0
    assert {"uid", "url", "caption"} <= set(opened.rows([]).column_names)
    search = Retriever(opened)
    for where in ("", "clip_score > 0"):
        [results] = search.search(vectors[:1], 3, conditions=search.conditions(where))
        assert results.shortage(3) == "only 0 of 3: all 0 rows of the index were looked at"
    assert search.ids_of([uid_of(0)]).tolist() == [-1]


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_an_index_whose_rows_are_all_deleted_is_compacted_and_appended_to(index: Any, kind: str) -> None:
    output, workspace, vectors = index
    config = IndexConfig(kind=kind, num_recall_queries=4)  # type: ignore[arg-type]
    delete(output, [uid_of(row) for row in range(24)])
    _require_no_rows(output, vectors)
    assert compact(output, config) == {"in": 24, "ok": 0, "deleted": 24}
    _require_no_rows(output, vectors)
    assert append(output, commit_embed(workspace, "more", vectors[24:], first=24), config) == {"in": 24, "ok": 24}
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24, 48))
    restore(output, [uid_of(3)])
    assert append(output, workspace.artifact("embed", "base"), config) == {"in": 24, "ok": 1, "deleted": 23}
    assert compact(output, config)["ok"] == 25
    assert rows_of(NeighbourIndex.open(output), vectors) == {3, *range(24, 48)}


def test_an_index_of_several_kinds_whose_rows_are_all_taken_down_is_built(tmp_path: Any) -> None:
    vectors, workspace = unit(np.random.default_rng(0).normal(size=(4200, 8))), Workspace(str(tmp_path))
    Takedown().add([f"http://a/{row}" for row in range(4200)]).write(workspace.root)
    output = workspace.artifact("index", "i")
    summary = build_index(
        commit_embed(workspace, "e", vectors), output, IndexConfig(num_recall_queries=20, num_train_rows=2000), seed=0
    )
    assert summary.counts == {"in": 4200, "ok": 0, "deleted": 4200}
    assert set(summary.metrics["image_tried"]) == {"flat", "hnsw", "ivf_sq8", "ivf_rabitq"}
    _require_no_rows(output, vectors)


def test_embeddings_whose_uids_are_all_taken_down_are_appended_without_rows(index: Any) -> None:
    output, workspace, vectors = index
    Takedown().add([uid_of(row) for row in range(24, 48)]).write(workspace.root)
    more = commit_embed(workspace, "more", vectors[24:], first=24)
    assert append(output, more) == {"in": 24, "ok": 0, "deleted": 24}
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_found_and_nothing_is_said_of_its_recall(tmp_path: Any, kind: str) -> None:
    vectors, workspace = unit(np.random.default_rng(0).normal(size=(1, 8))), Workspace(str(tmp_path))
    output, config = workspace.artifact("index", "i"), IndexConfig(kind=kind, num_recall_queries=4)  # type: ignore[arg-type]
    metrics = build_index(commit_embed(workspace, "e", vectors), output, config, seed=0).metrics
    assert metrics["reaches_recall_target"]
    assert not [name for name in metrics if "recall_at" in name]
    assert rows_of(NeighbourIndex.open(output), vectors) == {0}


def test_an_empty_segment_has_the_size_that_was_left(index: Any) -> None:
    output, _, _ = index
    delete(output, [uid_of(row) for row in range(24)])
    compact(output, CONFIG)
    described = output.read_json("segment_00001/segment.json")
    assert (described["num_rows"], described["counts"]) == (0, {"in": 24, "ok": 0, "deleted": 24})

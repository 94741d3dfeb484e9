"""Semantic duplicates and the share of the CLIP score: what stays, and in how much memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.filter import gathered, semantic
from pipeline.filter.labels import write_table
from pipeline.filter.scores import CLIP_SCORE, NUM_BINS, least_score_of_share
from pipeline.workspace.store import Artifact
from tests.tiny.shards import make_embeddings

Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(autouse=True)
def _small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "LEAST_SHARDS", 3)


def _unit(rows: Floats) -> Floats:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _with_copies(num_rows: int, num_copies: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, 16))
    copies = rows[rng.integers(0, num_rows, num_copies)] + 0.02 * rng.standard_normal((num_copies, 16))
    return _unit(np.concatenate([rows, copies]))


@pytest.mark.parametrize("block_rows", [1024, 7, 1])
def test_every_row_left_out_has_a_neighbour_that_stays_and_no_two_that_stay_are_near(
    monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(semantic, "_BLOCK_ROWS", block_rows)
    z = _with_copies(60, 60)
    same_as, similarity = semantic.near_rows(z, np.zeros(len(z), np.int64), 0.95)
    stays = np.flatnonzero(same_as < 0)
    assert 50 < len(stays) < 65
    scores = z @ z.T
    np.fill_diagonal(scores, -1)
    assert scores[np.ix_(stays, stays)].max() <= 0.95
    left_out = np.flatnonzero(same_as >= 0)
    assert np.isin(same_as[left_out], stays).all()
    assert (same_as[left_out] < left_out).all()
    assert np.allclose(similarity[left_out], scores[left_out, same_as[left_out]], atol=1e-5)
    assert similarity[left_out].min() > 0.95


def test_rows_of_other_groups_are_no_duplicates() -> None:
    z = np.tile(_unit(np.ones((1, 16), np.float32)), (4, 1))
    same_as, _ = semantic.near_rows(z, np.array([5, 6, 5, 6]), 0.9)
    assert same_as.tolist() == [-1, -1, 0, 1]


def _duplicates(folder: Path, z: Floats, scores: Floats, *, rows_per_group: int, seed: int = 3) -> dict[str, str]:
    """The uids left out, with those that stay in their place, by the passes of the step."""
    names = ("embed", "measures", "clusters", "gathered")
    embed, measures, clusters, files = (Artifact(str(folder / name)) for name in names)
    make_embeddings(embed, z, z, 25)
    shards = list(embed.shard_records())
    tables: dict[str, pa.Table] = {}
    for number, shard in enumerate(shards):
        table = pa.parquet.read_table(embed.path(f"{shard}.parquet"))
        blank = [""] * table.num_rows
        part = scores[25 * number : 25 * number + table.num_rows]
        tables[shard] = pa.table({"uid": table["uid"], "reason": blank, "detail": blank, CLIP_SCORE: part})
        with measures.write(f"{shard}.arrow") as path:
            write_table(tables[shard], path)
    centroids = semantic.train_centroids(embed, measures, shards, len(z), seed)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    for shard in shards:
        table = pa.parquet.read_table(embed.path(f"{shard}.parquet"))
        with clusters.write(f"{shard}.arrow") as path:
            groups = semantic.caption_groups(table["caption"], differ=False)
            assigned = semantic.assign(table, tables[shard], centroids, groups)
            write_table(assigned, path)
            semantic.write_sizes(assigned, clusters, shard)
    groups = semantic.plan_groups(clusters, shards, len(centroids))
    assert (len(groups) > 1) == (rows_per_group < len(z))
    assert [group.first for group in groups[1:]] == [group.stop for group in groups[:-1]]
    bundles = gathered.plan_bundles(len(shards))
    assert len(bundles) == -(-len(shards) // 3)
    for bundle in bundles:
        with files.write(bundle.file) as path:
            semantic.write_bundle(clusters, shards, bundle, groups, path)
    tables_of_groups = [semantic.find_semantic_duplicates(files, bundles, group, 0.95) for group in groups]
    rows = [row for table in tables_of_groups for row in table.to_pylist()]
    uids = [tables[shard]["uid"].to_pylist() for shard in shards]
    assert all(uids[row["same_as_number"]][row["same_as_row"]] == row["same_as"] for row in rows)
    return {uids[row["number"]][row["row"]]: row["same_as"] for row in rows}


def test_groups_of_clusters_find_what_one_group_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z = _with_copies(150, 50)
    scores = np.random.default_rng(1).uniform(0, 1, len(z)).astype(np.float32)
    whole = _duplicates(tmp_path / "whole", z, scores, rows_per_group=len(z))
    monkeypatch.setattr(semantic, "ROWS_PER_GROUP", 60)
    assert _duplicates(tmp_path / "groups", z, scores, rows_per_group=60) == whole
    assert 40 <= len(whole) <= 52


def test_of_two_duplicates_the_one_with_the_higher_clip_score_stays(tmp_path: Path) -> None:
    z = _with_copies(40, 0)
    z = np.concatenate([z, z[:5]])
    scores = np.concatenate([np.full(40, 0.2), [0.3, 0.1, 0.3, 0.1, 0.3]]).astype(np.float32)
    left_out = _duplicates(tmp_path, z, scores, rows_per_group=len(z))
    table = pa.concat_tables([pa.parquet.read_table(path) for path in sorted((tmp_path / "embed").glob("*.parquet"))])
    number_of = {uid: number for number, uid in enumerate(table["uid"].to_pylist())}
    assert {number_of[uid] for uid in left_out} == {0, 41, 2, 43, 4}


def test_a_cluster_that_is_too_large_is_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "ROWS_PER_GROUP", 50)
    z = np.tile(_unit(np.ones((1, 16), np.float32)), (200, 1))
    left_out = _duplicates(tmp_path, z, np.full(200, 0.5, np.float32), rows_per_group=50)
    assert len(left_out) == 200 - 4


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.01, 1), values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60))
def test_the_share_that_stays_is_the_requested_one_and_at_most_one_bin_more(share: float, values: list[float]) -> None:
    scores = np.array(values, np.float32)
    table = pa.table({"reason": [""] * len(scores), CLIP_SCORE: scores})
    least = least_score_of_share([table], share)
    staying = int((scores >= least).sum())
    assert staying >= share * len(scores) - 1e-9
    assert (scores > least + 2 / NUM_BINS + 1e-8).sum() <= share * len(scores) + 1e-9

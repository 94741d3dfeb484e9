from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipeline.retrieve.build
import pipeline.retrieve.parts
from pipeline.data.rows import make_uid, row_id
from pipeline.data.vectors import ROW_GROUP_ROWS
from pipeline.errors import DataError
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex, kinds, segment
from pipeline.retrieve.build import build_index
from pipeline.retrieve.choice import kinds_left_out, kinds_to_try
from pipeline.retrieve.efforts import Effort, effort_for
from pipeline.retrieve.rows import Rows
from pipeline.retrieve.tune import _Measurement
from pipeline.retrieve.tune import tune as tune_index
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import DIM, NUM_ROWS, stored, unit
from tests.tiny.shards import make_embeddings

KINDS = ("flat", "ivf_sq8", "ivf_rabitq", "hnsw")
Build = Callable[..., Artifact]


def _config(kind: str, **changes: Any) -> IndexConfig:
    return IndexConfig(kind=kind, **changes)  # type: ignore[arg-type]


def _number(row: int) -> int:
    return row_id(make_uid(f"http://a/{row}", f"caption {row}"))


@pytest.mark.parametrize("kind", KINDS)
def test_index_reaches_the_recall_that_it_reports(kind: str, embed: Artifact, build: Build) -> None:
    output = build(_config(kind, recall_target=0.9))
    vectors = stored(embed)
    # Queries that are not in the index, of the same distribution.
    queries = unit(vectors[50:350] + 0.2 * np.random.default_rng(1).normal(size=(300, DIM)))
    exact = queries @ vectors.T
    numbers = np.array([_number(row) for row in range(NUM_ROWS)])
    row_of = {number: row for row, number in enumerate(numbers.tolist())}
    for k in (1, 10, 37, 100, 400, 1000):
        scores, ids = NeighbourIndex.open(output).search(queries, k)
        true = np.argsort(-exact, axis=1)[:, :k]
        hits = [len(set(row) & set(numbers[best].tolist())) / k for row, best in zip(ids.tolist(), true, strict=True)]
        assert np.mean(hits) >= 0.88, k
        rows = np.array([[row_of[number] for number in row] for row in ids.tolist()])
        np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), atol=1e-5)
        assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_k_gives_k_rows(kind: str, embed: Artifact, build: Build) -> None:
    index = NeighbourIndex.open(build(_config(kind)))
    for k in (1, 999, 2000, NUM_ROWS):
        _, ids = index.search(stored(embed)[:3], k)
        assert [len(set(row) - {-1}) for row in ids.tolist()] == [k] * 3
    scores, ids = index.search(stored(embed)[:2], NUM_ROWS + 5)
    assert (ids[:, -5:] == -1).all()
    assert np.isneginf(scores[:, -5:]).all()
    assert len(index.find(stored(embed)[:1], NUM_ROWS + 5)[0]) == NUM_ROWS


@pytest.mark.parametrize("kind", ["ivf_sq8", "flat"])
def test_the_candidates_of_a_search_are_compared_in_parts(
    kind: str, embed: Artifact, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query alone may have millions of candidates, whose vectors are tens of gigabytes."""
    index, queries = NeighbourIndex.open(build(_config(kind))), stored(embed)[:7]
    whole, num_vectors, searches = index.search(queries, 500), [0], list[tuple[int, int]]()
    read, search = Rows.vectors, kinds.Searcher.search

    def read_some(self: Rows, positions: Any, column: str) -> Any:
        num_vectors.append(len(positions))
        return read(self, positions, column)

    def search_some(self: kinds.Searcher, some: Any, count: int, effort: int) -> Any:
        searches.append((len(some), count))
        return search(self, some, count, effort)

    monkeypatch.setattr(Rows, "vectors", read_some)
    monkeypatch.setattr(kinds.Searcher, "search", search_some)
    monkeypatch.setattr(segment, "_RERANKED_AT_ONCE", 64)
    monkeypatch.setattr(segment, "_CANDIDATES_AT_ONCE", 1100)
    scores, ids = index.search(queries, 500)
    np.testing.assert_allclose(scores, whole[0], atol=1e-6)
    np.testing.assert_array_equal(ids, whole[1])
    assert max(num_vectors) == (0 if kind == "flat" else 64)
    assert sum(num_queries for num_queries, _ in searches) == len(queries)
    assert all(num_queries == 1 or num_queries * count <= 1100 for num_queries, count in searches)


def test_k_above_10_reaches_the_target_on_random_vectors(tmp_path: Path) -> None:
    # Random vectors in 32 dimensions have no clusters: the lists visited for 10 neighbours hold few of 1,000.
    vectors = unit(np.random.default_rng(5).normal(size=(21_000, 32)))
    embed = Workspace(str(tmp_path)).artifact("embed", "k")
    make_embeddings(embed, vectors[:20_800], vectors[:20_800], rows_per_shard=5000)
    output = Workspace(str(tmp_path)).artifact("index", "k")
    build_index(embed, output, _config("ivf_rabitq"), seed=0)
    numbers = np.array([_number(row) for row in range(20_800)])
    exact = vectors[20_800:] @ vectors[:20_800].T
    for k in (10, 100, 1000):
        _, ids = NeighbourIndex.open(output).search(vectors[20_800:], k)
        true = numbers[np.argsort(-exact, axis=1)[:, :k]]
        recall = np.mean([len(set(row) & set(best)) / k for row, best in zip(ids.tolist(), true.tolist(), strict=True)])
        assert (ids >= 0).all()
        assert recall >= 0.93, k


def test_index_rows_belong_to_their_vectors(embed: Artifact, build: Build) -> None:
    index = NeighbourIndex.open(build(_config("flat")))
    rows = [0, 1099, 1100, 2999]
    best = [row[0] for row in index.find(stored(embed)[rows], 1)]
    assert [item.id for item in best] == [_number(row) for row in rows]
    assert all(0 <= item.id < 2**53 for item in best)
    assert [item.caption for item in best] == ["caption 0", "caption 1099", "caption 1100", "caption 2999"]
    assert [(item.shard, item.key) for item in best[1:3]] == [("00000", "0000001099"), ("00001", "0000100000")]
    ids = [_number(row) for row in (2999, 5, 2999, 1100)]
    assert index.rows(ids).column("url").to_pylist() == [
        "http://a/2999",
        "http://a/5",
        "http://a/2999",
        "http://a/1100",
    ]
    np.testing.assert_allclose(index.vectors(ids, "text"), stored(embed, "z_text")[[2999, 5, 2999, 1100]], atol=1e-6)
    assert index.sources[index.sources_of([ids[0]])[0]].uri == embed.uri
    assert index.has([*ids, 17]).tolist() == [True] * 4 + [False]
    assert index.rows([]).num_rows == 0
    with pytest.raises(ValueError, match="no row 17"):
        index.rows([17])
    with pytest.raises(ValueError, match=r"takes \(Q, 24\)"):
        index.search(np.zeros((1, 7), np.float32), 3)


def test_index_searches_text_apart_from_pictures(embed: Artifact, build: Build) -> None:
    z_text = stored(embed, "z_text")
    scores, _ = NeighbourIndex.open(build(_config("ivf_sq8"))).search(z_text[:1], 5, "text")
    np.testing.assert_allclose(scores, 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_rabitq", "hnsw"])
def test_index_is_built_to_the_same_bytes(kind: str, build: Build) -> None:
    one, two = (build(_config(kind), name) for name in ("a", "b"))
    assert {name: one.describe(name) for name in one.names()} == {name: two.describe(name) for name in two.names()}
    assert not [name for name in one.names() if name.startswith("live/")]


def test_a_graph_is_tuned_with_queries_that_are_no_nodes_of_it(
    embed: Artifact, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = list[Any]()

    def tune(searcher: Any, rows: Any, truth: Any, modality: Any, target: float, *, limit_ms: float) -> Any:
        nodes = np.setdiff1d(np.arange(len(rows)), truth.own_positions)
        scores, positions = searcher.search(truth.queries, 20, len(nodes))
        assert np.isin(positions, nodes).all()
        np.testing.assert_allclose(
            np.einsum("qd,qkd->qk", truth.queries, [rows.vectors(row, f"z_{modality}") for row in positions]),
            scores,
            atol=1e-5,
        )
        tuned.append(modality)
        return tune_index(searcher, rows, truth, modality, target, limit_ms=limit_ms)

    monkeypatch.setattr(pipeline.retrieve.build, "tune", tune)
    index = NeighbourIndex.open(build(_config("hnsw", num_recall_queries=300)))
    assert tuned == ["image", "text"]
    assert index.num_rows == NUM_ROWS  # and in the index itself they are


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq"])
def test_the_recall_of_a_query_is_that_in_an_index_without_its_row(
    kind: kinds.Kind, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries are validation rows, which the index has; each is measured as if the index did not have it."""
    compared = list[Any]()

    def tune(searcher: Any, rows: Any, truth: Any, modality: Any, target: float, *, limit_ms: float) -> Any:
        for query in range(0, len(truth.queries), 6):
            others = np.delete(np.arange(len(rows)), truth.own_positions[query])
            if kind == "flat":
                index = kinds.new_exact(kind, DIM)
            else:
                index = kinds.read(tmp_path / f"index/index/live/segment_00000/{modality}.{kind}.faiss")
            index.add(rows.vectors(others, f"z_{modality}"))
            both = [_Measurement(one, rows, truth, modality) for one in (searcher, kinds.Searcher(kind, index, others))]
            for effort in kinds.efforts(kind, searcher.max_effort):
                for k in (10, 100):
                    with_it, without = (one.recalls(k, np.array([query]), effort) for one in both)
                    assert with_it == without
                    compared.append(min(with_it.values()))
        return tune_index(searcher, rows, truth, modality, target, limit_ms=limit_ms)

    monkeypatch.setattr(pipeline.retrieve.build, "tune", tune)
    build(_config(kind, num_recall_queries=60))
    assert len(compared) >= 40
    assert kind == "flat" or min(compared) < 0.9


def test_a_higher_target_takes_more_effort(build: Build) -> None:
    efforts = [
        build(_config("ivf_sq8", recall_target=target), str(target)).read_json("segment_00000/segment.json")["image"]
        for target in (0.3, 0.99)
    ]
    for few, many in zip(*(item["efforts"] for item in efforts), strict=True):
        assert few["effort"] < many["effort"]
        assert many["recall"] >= 0.97


def test_effort_grows_with_k_between_and_above_the_measured_k() -> None:
    efforts = [Effort(k, lists, 2, 1.0, 1.0, 0.0) for k, lists in ((10, 4), (100, 16), (1000, 64))]
    assert [effort_for(efforts, k) for k in (1, 10, 32, 100, 1000, 2500)] == [
        (4, 20),
        (4, 20),
        (9, 64),
        (16, 200),
        (64, 2000),
        (160, 5000),
    ]


def test_auto_tries_what_fits_into_the_memory_budget() -> None:
    assert kinds_to_try(_config("auto"), 3999, 512) == ["flat"]
    assert kinds_to_try(_config("auto"), 20_000, 512) == ["flat", "ivf_sq8", "ivf_rabitq", "hnsw"]
    assert kinds_to_try(_config("auto"), 50_000, 512) == ["flat", "ivf_sq8", "ivf_rabitq"]
    assert kinds_to_try(_config("auto"), 100_000, 512) == ["ivf_sq8", "ivf_rabitq"]
    assert kinds_to_try(_config("auto"), 100_000_000, 768) == ["ivf_rabitq"]
    assert kinds_to_try(_config("auto", memory_gb=0.04), 100_000, 512) == ["ivf_rabitq"]
    assert kinds_to_try(_config("auto", memory_gb=0.001), 100_000_000, 768) == ["ivf_rabitq"]  # the smallest, at least
    assert kinds_to_try(_config("hnsw"), 10, 512) == ["hnsw"]
    left_out = kinds_left_out(_config("auto", memory_gb=0.04), 100_000, 512)
    assert list(left_out) == ["flat", "hnsw", "ivf_sq8"]
    assert left_out["ivf_sq8"] == "it takes 0.1 GB; index.memory_gb is 0.04"


def test_auto_keeps_the_fastest_kind_that_reaches_the_target(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 16))
    vectors = unit(centres[rng.integers(0, 100, 4200)] + 0.5 * rng.normal(size=(4200, 16)))
    embed, output = (Workspace(str(tmp_path)).artifact(step, "k") for step in ("embed", "index"))
    make_embeddings(embed, vectors, vectors, rows_per_shard=3000, held_out_every=50)
    metrics = build_index(embed, output, _config("auto", num_recall_queries=80), seed=0).metrics
    tried = metrics["image_tried"]
    assert list(tried) == ["flat", "ivf_sq8", "ivf_rabitq", "hnsw"]
    assert metrics["kinds_left_out"] == {}
    assert (metrics["num_recall_queries"], metrics["recall_queries"]) == (80, "validation rows")
    best = min((name for name in tried if tried[name]["reaches_target"]), key=lambda name: tried[name]["latency_ms"])
    assert metrics["image_kind"] == best
    able = float("inf")
    for tuned in tried.values():  # a kind that is slower than one before it is not tuned for 100 and 1,000
        assert len(tuned["efforts"]) == (3 if tuned["latency_ms"] < able else 1)
        able = min([able, *([tuned["latency_ms"]] if tuned["reaches_target"] else [])])
    assert output.read_json("segment_00000/segment.json")["image"]["kind"] == best
    assert [name for name in output.names() if "image." in name and f"image.{best}." not in name] == []
    assert {"k", "effort", "candidates", "recall"} == set(tried["ivf_sq8"]["curve"][0])


def test_rows_of_one_uid_or_of_one_id_are_found_once_and_counted(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(60, 8)))
    source = Workspace(str(tmp_path)).artifact("embed", "k")
    make_embeddings(source, vectors, vectors, rows_per_shard=30)
    table = pq.read_table(source.path("00001.parquet"))
    twin = pq.read_table(source.path("00000.parquet")).column("uid")[4]
    uids = [twin, *table.column("uid")[1:]]
    with source.write("00001.parquet") as path:
        pq.write_table(
            table.set_column(0, "uid", [uids]), path, compression="none", use_dictionary=False, data_page_size=1 << 30
        )
    other = make_uid("http://a/7", "caption 7")
    clash = row_id(make_uid("http://a/40", "caption 40"))
    monkeypatch.setattr(pipeline.retrieve.parts, "row_id", lambda uid: clash if uid == other else row_id(uid))
    output = Workspace(str(tmp_path)).artifact("index", "k")
    summary = build_index(source, output, _config("flat"), seed=0)
    assert summary.counts == {"in": 60, "ok": 58, "duplicate_uid": 1, "id_collision": 1}
    index = NeighbourIndex.open(output)
    assert index.num_rows == 58
    _, ids = index.search(vectors[:2], 60)
    assert [len(set(row)) for row in ids.tolist()] == [59, 59]  # 58 rows and -1
    assert index.rows([row_id(str(twin)), clash]).column("url").to_pylist() == ["http://a/4", "http://a/7"]


def test_index_moves_with_its_workspace(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(30, 4)))
    embed, output = (Workspace(str(tmp_path / "old")).artifact(step, "k") for step in ("embed", "index"))
    make_embeddings(embed, vectors, vectors, rows_per_shard=20)
    build_index(embed, output, _config("ivf_sq8"), seed=0)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = NeighbourIndex.open(Workspace(str(tmp_path / "new")).artifact("index", "k"))
    assert moved.find(vectors[:1], 1)[0][0].caption == "caption 0"


def test_open_refuses_what_is_damaged_or_does_not_belong_together(build: Build) -> None:
    output = build(_config("ivf_sq8"))
    name = "segment_00000/image.ivf_sq8"
    lists = output.path(f"{name}.lists").read_bytes()
    output.write_bytes(f"{name}.lists", lists[:-8])
    with pytest.raises(DataError, match=r"image.ivf_sq8.faiss: damaged .*: \d+ bytes, expected \d+.*; bring it back"):
        NeighbourIndex.open(output)
    output.write_bytes(f"{name}.lists", lists)
    output.write_bytes(f"{name}.faiss", b"not an index")
    with pytest.raises(DataError, match=r"image.ivf_sq8.faiss: damaged"):
        NeighbourIndex.open(output)
    ids = np.load(output.path("segment_00000/ids.npy"))
    with output.write("segment_00000/ids.npy") as path, path.open("wb") as file:
        np.save(file, ids[1:])
    with pytest.raises(DataError, match=r"2999 rows in ids.npy, 3000 in rows.arrow; bring it back from a copy"):
        NeighbourIndex.open(output)
    output.remove("index.json")
    with pytest.raises(DataError, match=r"no file index.json"):
        NeighbourIndex.open(output)


def test_build_names_a_shard_that_lost_rows_or_has_another_layout_and_an_empty_artifact(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(30, 4)))
    embed, output, empty = (
        Workspace(str(tmp_path)).artifact(*name) for name in (("embed", "k"), ("index", "k"), ("embed", "x"))
    )
    make_embeddings(embed, vectors, vectors, rows_per_shard=20)
    table = pq.read_table(embed.path("00001.parquet"))
    with embed.write("00001.parquet") as path:
        pq.write_table(table, path, compression="snappy")
    with pytest.raises(DataError, match=r"00001.parquet: column z_image is not stored in one uncompressed page"):
        build_index(embed, output, _config("flat"), seed=0)
    with embed.write("00001.parquet") as path:
        pq.write_table(table.slice(3), path)
    with pytest.raises(DataError, match=r"00001.parquet has 7 rows, its record says 10"):
        build_index(embed, output, _config("flat"), seed=0)
    with pytest.raises(DataError, match="holds no embeddings"):
        build_index(empty, output, _config("flat"), seed=0)


def test_lists_are_trained_on_a_sample_of_all_rows(embed: Artifact, tmp_path: Path) -> None:
    # Sorted by cluster, the first rows would know one cluster alone, and its lists would hold almost everything.
    z_image = stored(embed)
    ordered, output = (Workspace(str(tmp_path)).artifact(step, "sorted") for step in ("embed", "index"))
    order = np.argsort(z_image[:, 0])
    make_embeddings(ordered, z_image[order], z_image[order], rows_per_shard=1000)
    build_index(ordered, output, _config("ivf_sq8", num_train_rows=800), seed=3)
    sizes = np.load(output.path("segment_00000/image.ivf_sq8.sizes.npy"))
    assert len(sizes) == 20
    assert sizes.max() < 0.25 * NUM_ROWS


def test_centroids_of_two_levels_are_near_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(500, 16))
    rows = unit(centres[rng.integers(0, 500, 12_000)] + 0.4 * rng.normal(size=(12_000, 16)))
    near = list[float]()
    for least in (256, 1000):
        monkeypatch.setattr(kinds, "_TWO_LEVELS_FROM_LISTS", least)
        centroids = kinds.train_centroids(rows, 300, seed=0, on_gpu=False)
        assert centroids.shape == (300, 16)
        scores, lists = kinds.nearest(rows, centroids, 1)
        near.append(float(scores.mean()))
        assert np.bincount(lists[:, 0], minlength=300).max() < 8 * 40  # no list holds far more than its 40 rows
    assert near[1] - 0.01 < near[0] != near[1]


def test_a_row_is_read_from_its_place_in_a_file_of_several_row_groups(tmp_path: Path) -> None:
    count = 2 * ROW_GROUP_ROWS + 7
    vectors = unit(np.random.default_rng(0).normal(size=(count, 8)))
    embed, output = (Workspace(str(tmp_path)).artifact(step, "k") for step in ("embed", "index"))
    make_embeddings(embed, vectors, vectors[::-1], rows_per_shard=count)
    build_index(embed, output, _config("flat"), seed=0)
    rows = [0, ROW_GROUP_ROWS - 1, ROW_GROUP_ROWS, count - 1]
    read = NeighbourIndex.open(output).vectors([_number(row) for row in rows])
    np.testing.assert_array_equal(read, stored(embed)[rows])

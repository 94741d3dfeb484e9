from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.data.vectors import to_unit
from pipeline.errors import DataError
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import build_index, choose_kind
from pipeline.retrieve.exact import EmbeddedShards, recall, true_neighbours
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.shards import make_embeddings

_NUM_ROWS, _DIM = 3000, 24


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """3,000 clustered rows in 3 uneven shards; rows of one cluster share their z_text, as rows of one caption do."""
    rng = np.random.default_rng(0)
    centres, cluster = rng.normal(size=(40, _DIM)), rng.integers(0, 40, _NUM_ROWS)
    z_image = _unit(centres[cluster] + 0.5 * rng.normal(size=(_NUM_ROWS, _DIM)))
    z_text = _unit(centres[cluster] + 0.2)
    artifact = Workspace(str(tmp_path_factory.mktemp("workspace"))).artifact("embed", "k1")
    make_embeddings(artifact, z_image, z_text, rows_per_shard=1100)
    return artifact


def _z_image(embed: Artifact) -> NDArray[np.float32]:
    return np.concatenate([to_unit(vectors.z_image) for _, _, vectors in EmbeddedShards.open(embed)])


def _build(embed: Artifact, folder: Path, config: IndexConfig) -> tuple[Artifact, dict[str, float]]:
    output = Workspace(str(folder)).artifact("index", "k2")
    return output, build_index(embed, output, config, seed=3).metrics


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_sq8", "hnsw"])
def test_index_reaches_the_recall_that_it_reports(kind: str, embed: Artifact, tmp_path: Path) -> None:
    config = IndexConfig(kind=kind, recall_target=0.9, num_recall_queries=100)  # type: ignore[arg-type]
    output, metrics = _build(embed, tmp_path, config)
    assert metrics["image_recall_at_10"] >= 0.9
    assert metrics["kind"] == kind
    index = NeighbourIndex.open(output, embed)
    vectors = _z_image(embed)
    queries = _unit(vectors[50:150] + 0.05 * np.random.default_rng(1).normal(size=(100, _DIM)))
    exact = queries @ vectors.T
    true = np.argsort(-exact, axis=1)[:, :10]
    results = index.search(queries, 10)
    hits = np.mean([len({item.id for item in row} & set(best)) / 10 for row, best in zip(results, true, strict=True)])
    assert hits >= 0.88
    for query, row in enumerate(results):
        for item in row:
            assert item.similarity == pytest.approx(exact[query, item.id], abs=1e-5)
        assert [item.similarity for item in row] == sorted((item.similarity for item in row), reverse=True)


def test_index_rows_belong_to_their_vectors(embed: Artifact, tmp_path: Path) -> None:
    output, _ = _build(embed, tmp_path, IndexConfig(kind="flat"))
    index = NeighbourIndex.open(output, embed)
    best = [row[0] for row in index.search(_z_image(embed)[[0, 1099, 1100, 2999]], 1)]
    assert [item.id for item in best] == [0, 1099, 1100, 2999]
    assert [item.caption for item in best] == ["caption 0", "caption 1099", "caption 1100", "caption 2999"]
    assert [(item.shard, item.key) for item in best[1:3]] == [("00000", "0000001099"), ("00001", "0000100000")]
    assert index.rows([2999])[0]["url"] == "http://a/2999"
    with pytest.raises(ValueError, match="no row 3000"):
        index.rows([3000])
    with pytest.raises(ValueError, match=r"takes \(Q, 24\)"):
        index.search(np.zeros((1, 7), np.float32), 3)
    assert len(index.search(_z_image(embed)[:1], 5000)[0]) == _NUM_ROWS


def test_index_searches_text_apart_from_pictures(embed: Artifact, tmp_path: Path) -> None:
    output, metrics = _build(embed, tmp_path, IndexConfig(kind="ivf_sq8"))
    assert metrics["text_recall_at_10"] >= 0.95  # ties: most rows of a cluster are equally correct
    shards = EmbeddedShards.open(embed)
    z_text = np.concatenate([to_unit(vectors.z_text) for _, _, vectors in shards])
    results = NeighbourIndex.open(output, embed).search(z_text[:1], 5, "text")[0]
    assert all(item.similarity == pytest.approx(1, abs=1e-5) for item in results)


def test_index_is_built_to_the_same_bytes(embed: Artifact, tmp_path: Path) -> None:
    for kind in ("ivf_sq8", "hnsw"):
        one, _ = _build(embed, tmp_path / kind / "a", IndexConfig(kind=kind))  # type: ignore[arg-type]
        two, _ = _build(embed, tmp_path / kind / "b", IndexConfig(kind=kind))  # type: ignore[arg-type]
        assert {name: one.describe(name) for name in one.names()} == {name: two.describe(name) for name in two.names()}
        assert one.names() == ["image.faiss", "index.json", "rows.parquet", "text.faiss"]


def test_index_has_a_higher_effort_for_a_higher_target(embed: Artifact, tmp_path: Path) -> None:
    efforts = [
        _build(embed, tmp_path / str(target), IndexConfig(kind="ivf_flat", recall_target=target))[1]["image_effort"]
        for target in (0.3, 0.999)
    ]
    assert efforts[0] < efforts[1]


def test_auto_is_exact_while_small() -> None:
    assert choose_kind("auto", 19_999) == "flat"
    assert choose_kind("auto", 20_000) == "ivf_sq8"
    assert choose_kind("hnsw", 10) == "hnsw"


def test_recall_counts_ties_and_misses() -> None:
    true = [{1, 2, 3, 4}, {7, 8}]
    assert recall(np.array([[4, 3, 9], [9, 8, -1]]), true, 2) == pytest.approx((2 + 1) / 4)


def test_true_neighbours_are_those_of_a_full_sort(embed: Artifact) -> None:
    vectors = _z_image(embed)
    expected = np.argsort(-(vectors[:5] @ vectors.T), axis=1)[:, :10]
    neighbours = true_neighbours(EmbeddedShards.open(embed), vectors[:5], "z_image", 10)
    assert neighbours == [set(row.tolist()) for row in expected]


def test_open_finds_the_embeddings_that_the_manifest_names(embed: Artifact) -> None:
    root = embed.uri.rsplit("/", 2)[0]
    output = Workspace(root).artifact("index", "k3")
    build_index(embed, output, IndexConfig(kind="ivf_sq8"), seed=0)
    with pytest.raises(DataError, match="not finished"):
        NeighbourIndex.open(output)
    output.commit(Manifest(step="index", key="k3", step_version=1, section={}, inputs={"embed": "k1"}))
    assert NeighbourIndex.open(output).num_rows == _NUM_ROWS


def test_open_refuses_what_does_not_belong_together(embed: Artifact, tmp_path: Path) -> None:
    output, _ = _build(embed, tmp_path, IndexConfig(kind="ivf_sq8"))
    rows = pq.read_table(output.path("rows.parquet"))
    with output.write("rows.parquet") as path:
        pq.write_table(rows.slice(1), path)
    with pytest.raises(DataError, match="3000 vectors for 2999 rows"):
        NeighbourIndex.open(output, embed)
    with output.write("rows.parquet") as path:
        pq.write_table(rows.drop_columns(["uid"]), path)
    with pytest.raises(DataError, match=r"rows.parquet: no column uid"):
        NeighbourIndex.open(output, embed)
    output.write_bytes("image.faiss", b"not an index")
    with output.write("rows.parquet") as path:
        pq.write_table(rows, path)
    with pytest.raises(DataError, match=r"image.faiss: damaged"):
        NeighbourIndex.open(output, embed)


def test_build_names_a_shard_that_lost_rows_and_an_empty_artifact(tmp_path: Path) -> None:
    vectors = _unit(np.random.default_rng(0).normal(size=(30, 4)))
    embed = Workspace(str(tmp_path)).artifact("embed", "k")
    make_embeddings(embed, vectors, vectors, rows_per_shard=20)
    table = pq.read_table(embed.path("00001.parquet"))
    with embed.write("00001.parquet") as path:
        pq.write_table(table.slice(3), path)
    with pytest.raises(DataError, match=r"00001.parquet has 7 rows, its record says 10"):
        _build(embed, tmp_path, IndexConfig(kind="flat"))
    with pytest.raises(DataError, match="holds no embeddings"):
        _build(Workspace(str(tmp_path)).artifact("embed", "none"), tmp_path, IndexConfig(kind="flat"))


def test_ivf_trains_on_a_sample_of_all_rows(embed: Artifact, tmp_path: Path) -> None:
    # Sorted by cluster, the first rows would know one cluster alone, and its lists would hold almost everything.
    z_image = _z_image(embed)
    ordered = Workspace(str(tmp_path)).artifact("embed", "sorted")
    order = np.argsort(z_image[:, 0])
    make_embeddings(ordered, z_image[order], z_image[order], rows_per_shard=1000)
    output, _ = _build(ordered, tmp_path, IndexConfig(kind="ivf_flat", num_train_rows=800))
    index = faiss.read_index(str(output.path("image.faiss")))
    sizes = np.array([index.invlists.list_size(i) for i in range(index.nlist)])
    assert index.nlist == 20
    assert sizes.max() < 0.25 * _NUM_ROWS

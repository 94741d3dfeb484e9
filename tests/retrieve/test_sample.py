"""The rows that an index is trained and measured on: fairly drawn, and the very vectors of the files."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.vectors import ROW_GROUP_ROWS, VECTOR_COLUMNS
from pipeline.errors import DataError
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.retrieve.sample import BLOCK_ROWS, choose_sample, read_rows
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import stored, unit
from tests.tiny.shards import make_embeddings


def test_a_sample_of_few_rows_takes_every_row_with_the_same_probability() -> None:
    num_rows, count, draws = 40_003, 8000, 300
    hits = np.zeros(num_rows)
    for seed in range(draws):
        rows = choose_sample(num_rows, count, np.random.default_rng(seed))
        assert count - BLOCK_ROWS < len(rows) <= count
        assert (np.diff(rows) > 0).all()
        hits[rows] += 1
    share = hits / draws
    assert share.mean() == pytest.approx(count / num_rows, rel=0.01)
    # Blocks of 8 rows: 40 parts of 1,000 rows are 125 independent draws each, the last three rows are a block.
    error = np.sqrt(0.2 * 0.8 / draws / 125)
    assert np.abs(share[:40_000].reshape(40, -1).mean(axis=1) - 0.2).max() < 4.5 * error
    assert np.abs(share[:40_000].reshape(-1, 8).mean(axis=0) - 0.2).max() < 4.5 * np.sqrt(0.2 * 0.8 / draws / 5000)
    assert share[-3:].mean() == pytest.approx(0.2, abs=4.5 * np.sqrt(0.2 * 0.8 / draws))


def test_a_sample_of_a_hundred_million_rows_is_a_thousand_blocks_and_more_from_everywhere() -> None:
    rows = choose_sample(100_000_000, 200_000, np.random.default_rng(0))
    starts = rows[np.flatnonzero(np.diff(rows, prepend=-2) != 1)]
    assert len(rows) == 200_000
    assert 3000 < len(starts) <= 200_000 // BLOCK_ROWS
    per_part = np.histogram(starts, bins=50, range=(0, 100_000_000))[0]
    assert per_part.min() > 30
    again = choose_sample(100_000_000, 200_000, np.random.default_rng(0))
    assert np.array_equal(rows, again)


def test_a_sample_of_many_of_the_rows_is_drawn_row_by_row() -> None:
    rows = choose_sample(10_000, 5000, np.random.default_rng(0))
    assert len(rows) == len(np.unique(rows)) == 5000
    assert np.array_equal(rows, np.sort(np.random.default_rng(0).choice(10_000, 5000, replace=False)))


@pytest.fixture
def shards(tmp_path: Path) -> Artifact:
    """2,500 rows in shards of 1,100: rows of several row groups, of width 8."""
    rng = np.random.default_rng(1)
    artifact = Workspace(str(tmp_path)).artifact("embed", "k")
    make_embeddings(artifact, unit(rng.normal(size=(2500, 8))), unit(rng.normal(size=(2500, 8))), rows_per_shard=1100)
    return artifact


@pytest.mark.parametrize("count", [10, 300, 2500])
def test_the_vectors_that_are_read_are_those_of_the_rows(shards: Artifact, count: int) -> None:
    embedded = EmbeddedShards.open([shards])
    rng = np.random.default_rng(2)
    border = np.array([ROW_GROUP_ROWS - 1, ROW_GROUP_ROWS, 1099, 1100, 2499])  # of a row group, of a shard, the last
    some = np.union1d(rng.choice(2500, count, replace=False), border)
    vectors = read_rows(embedded, {"z_image": some, "z_text": some[::2]})
    for name, rows in (("z_image", some), ("z_text", some[::2])):
        np.testing.assert_allclose(vectors[name], stored(shards, name)[rows], atol=1e-6)
    whole = read_rows(embedded, {"z_image": some, "z_text": some[::2]}, whole=True)
    assert all(np.array_equal(vectors[name], whole[name]) for name in VECTOR_COLUMNS)


def test_a_column_may_have_no_row(shards: Artifact) -> None:
    vectors = read_rows(EmbeddedShards.open([shards]), {"z_image": np.zeros(0, np.int64), "z_text": np.array([7])})
    assert vectors["z_image"].shape == (0, 8)
    np.testing.assert_allclose(vectors["z_text"], stored(shards, "z_text")[[7]], atol=1e-6)


def test_a_shard_that_is_too_short_for_its_record_is_named(shards: Artifact) -> None:
    path = shards.path("00001.parquet")
    path.write_bytes(shards.path("00002.parquet").read_bytes())  # 300 rows in the place of 1,100
    with pytest.raises(DataError, match=r"00001\.parquet"):
        read_rows(EmbeddedShards.open([shards]), dict.fromkeys(VECTOR_COLUMNS, np.array([2190])))

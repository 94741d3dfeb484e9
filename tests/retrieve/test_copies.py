"""Near copies of training pictures, told from pictures that only resemble them."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import build_index
from pipeline.retrieve.copies import QUANTILE, near_copy_similarity
from pipeline.workspace.store import Workspace
from tests.retrieve.conftest import DIM, stored, unit
from tests.tiny.shards import make_embeddings


def open_index(folder: Path, held_out_every: int) -> NeighbourIndex:
    """600 rows around 20 centres; those whose number ``held_out_every`` divides are of no training."""
    rng, workspace = np.random.default_rng(0), Workspace(str(folder))
    vectors = unit(rng.normal(size=(20, DIM))[rng.integers(0, 20, 600)] + 0.5 * rng.normal(size=(600, DIM)))
    embed, output = workspace.artifact("embed", "k1"), workspace.artifact("index", "k2")
    make_embeddings(embed, vectors, vectors, rows_per_shard=400, held_out_every=held_out_every)
    build_index(embed, output, IndexConfig(kind="flat"), seed=3)
    return NeighbourIndex.open(output)


def test_a_near_copy_is_nearer_than_held_out_rows_are_to_training_rows(tmp_path: Path) -> None:
    index = open_index(tmp_path, held_out_every=10)
    limit, vectors = near_copy_similarity(index), stored(index.sources[0])
    held_out = np.arange(600) % 10 == 0
    nearest = (vectors[held_out] @ vectors[~held_out].T).max(axis=1)
    assert limit == pytest.approx(np.quantile(nearest, QUANTILE), abs=2e-3)
    assert limit is not None
    assert limit < 0.999
    few = index.sample("validation", 5)
    assert len(set(few.tolist())) == 5
    assert set(index.rows(few).column("split").to_pylist()) == {"validation"}


def test_with_few_held_out_rows_nobody_can_tell(tmp_path: Path) -> None:
    assert near_copy_similarity(open_index(tmp_path, held_out_every=50)) is None

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.build import build_index
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve import segments
from tests.tiny.shards import make_embeddings

NUM_ROWS, DIM = 3000, 24
Build = Callable[..., Artifact]


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length one."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def stored(embed: Artifact, column: str = "z_image") -> NDArray[np.float32]:
    """The vectors of an artifact, read by Parquet, of length one."""
    shards = EmbeddedShards.open([embed])
    return unit(np.concatenate([getattr(shards.read(i), column) for i in range(len(shards.shards))]).astype(np.float32))


@pytest.fixture(scope="session")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """3,000 clustered rows in 3 uneven shards; rows of one cluster share their z_text, as rows of one caption do."""
    rng = np.random.default_rng(0)
    centres, cluster = rng.normal(size=(40, DIM)), rng.integers(0, 40, NUM_ROWS)
    z_image = unit(centres[cluster] + 0.5 * rng.normal(size=(NUM_ROWS, DIM)))
    z_text = unit(centres[cluster] + 0.2)
    artifact = Workspace(str(tmp_path_factory.mktemp("workspace"))).artifact("embed", "k1")
    make_embeddings(artifact, z_image, z_text, rows_per_shard=1100)
    return artifact


@pytest.fixture
def build(embed: Artifact, tmp_path: Path) -> Build:
    """Builds an index of the rows of ``embed``, or of another artifact."""

    def build(config: IndexConfig, name: str = "index", source: Artifact = embed) -> Artifact:
        output = Workspace(str(tmp_path)).artifact("index", name)
        build_index(source, output, config, seed=3)
        return output

    return build


@pytest.fixture
def index(tmp_path: Path) -> tuple[Artifact, Workspace, NDArray[np.float32]]:
    """An index of the first 24 of 48 rows, its workspace, and the vectors of all rows."""
    vectors, workspace = unit(np.random.default_rng(0).normal(size=(48, segments.DIM))), Workspace(str(tmp_path))
    embed, output = segments.commit_embed(workspace, "base", vectors[:24]), workspace.artifact("index", "i")
    build_index(embed, output, segments.CONFIG, seed=0)
    return output, workspace, vectors

"""A small index that is changed: its embeddings, its segments, and the rows that it returns."""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.rows import make_uid, row_id
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import IndexSummary, SegmentBuild
from pipeline.retrieve.changes import publish_segment, segment_of_all, segment_of_more
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.shards import make_embeddings

DIM, SHARD_ROWS = 8, 12
CONFIG = IndexConfig(kind="flat", num_recall_queries=4)


def uid_of(row: int) -> str:
    return make_uid(f"http://a/{row}", f"caption {row}")


def commit_embed(
    workspace: Workspace, name: str, vectors: NDArray[np.float32], *, clip: str = "c", first: int = 0
) -> Artifact:
    """Finished embeddings of the rows from ``first`` on."""
    artifact = workspace.artifact("embed", name)
    make_embeddings(artifact, vectors, vectors, rows_per_shard=SHARD_ROWS, first=first)
    artifact.commit(Manifest(step="embed", key=name, step_version=1, section={}, inputs={"clip": clip}))
    return artifact


def build_segment(build: SegmentBuild) -> IndexSummary:
    """All stages of a build, before its commit."""
    build.prepare()
    for name in build.parts():
        build.output.commit_shard(build.add_part(name))
    return build.finish()


def append(index: Artifact, embed: Artifact, config: IndexConfig = CONFIG) -> dict[str, int]:
    """Append embeddings to an index; returns how many rows became what."""
    build = segment_of_more(SegmentBuild((embed,), index, config, 0))
    summary = build_segment(build)
    publish_segment(build, summary, replaces=False)
    return summary.counts


def compact(index: Artifact, config: IndexConfig = CONFIG) -> dict[str, int]:
    """Build one segment of all; returns how many rows became what."""
    build = segment_of_all(SegmentBuild((), index, config, 0))
    summary = build_segment(build)
    publish_segment(build, summary, replaces=True)
    return summary.counts


def rows_of(index: NeighbourIndex, vectors: NDArray[np.float32]) -> set[int]:
    """Numbers of the rows that a search for everything returns; each must be found by its own vector."""
    [ids], rows = index.search(vectors[:1], len(vectors))[1], {row_id(uid_of(row)): row for row in range(len(vectors))}
    results = [rows[number] for number in ids.tolist() if number >= 0]
    assert len(set(results)) == len(results) == index.num_rows
    for row in results:
        [[best]] = index.find(vectors[[row]], 1)
        assert (best.uid, best.url) == (uid_of(row), f"http://a/{row}")
    return set(results)

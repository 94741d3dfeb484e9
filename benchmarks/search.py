"""A library search, its conditions and the rows' columns, over FAISS alone with the same index and effort.

    python -m benchmarks.search

Builds an index of clustered rows as the recipe's default does, then asks single queries that are not in it, in turn by
FAISS itself (ids and approximate scores) and by the library (exact scores, uid, caption, URL, key). `ms_over_faiss` is
the median of the differences; its floor is 2 ms for a plain search at 100,000 rows.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.side_by_side import publish
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.build import build_index
from pipeline.retrieve.efforts import effort_for
from pipeline.retrieve.retriever import Conditions, Retriever
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Workspace
from tests.tiny.shards import make_embeddings

_FLOOR_MS = 2.0
_CASES = (
    ("plain", 10, "", None, _FLOOR_MS),
    ("plain", 100, "", None, None),
    ("where split == 'train'", 10, "split == 'train'", None, None),
    ("where a tenth passes", 10, "endswith(url, '7')", None, None),
    ("distinct 0.95", 10, "", 0.95, None),
)


def make_index(folder: Path, num_rows: int, embed_dim: int) -> tuple[Retriever, Any]:
    """An index of rows around random centres, and as many queries as there are in `--queries`."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(num_rows // 100, embed_dim)).astype(np.float32)

    def draw(count: int) -> Any:
        rows = centres[rng.integers(0, len(centres), count)]
        rows += 0.7 * rng.standard_normal(rows.shape, np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    workspace = Workspace(str(folder))
    embed, index = workspace.artifact("embed", "e"), workspace.artifact("index", "i")
    vectors = draw(num_rows)
    make_embeddings(embed, vectors, vectors, 10_000)
    embed.commit(Manifest(step="embed", key="e", step_version=1, section={}, inputs={"download": "d"}))
    build_index(embed, index, IndexConfig(), seed=0)
    return Retriever.open(index), draw(500)


def measure(retriever: Retriever, queries: Any, k: int, conditions: Conditions) -> tuple[Any, Any]:
    """Milliseconds of each query by FAISS and by the library, in turn."""
    [segment] = retriever.index._segments
    side = segment.sides["image"]
    effort, _ = effort_for(side.efforts, k)
    bare, ours = list[float](), list[float]()
    for query in queries:
        row = query[None]
        start = time.perf_counter()
        side.searcher.search(row, k, effort)
        middle = time.perf_counter()
        retriever.search(row, k, conditions=conditions)
        bare.append(1e3 * (middle - start))
        ours.append(1e3 * (time.perf_counter() - middle))
    return np.array(bare), np.array(ours)


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--embed-dim", type=int, default=512)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        retriever, queries = make_index(Path(folder), arguments.rows, arguments.embed_dim)
        for name, k, where, distinct, floor in _CASES:
            conditions = Conditions(retriever.conditions(where).where if where else None, distinct)
            measure(retriever, queries[:50], k, conditions)  # the first reads come from the disk
            bare, ours = measure(retriever, queries[50:], k, conditions)
            low, median, high = np.percentile(ours - bare, [25, 50, 75])
            rows.append(
                {
                    "search": name,
                    "k": k,
                    "faiss_ms": float(np.median(bare)),
                    "ours_ms": float(np.median(ours)),
                    "ms_over_faiss": float(median),
                    "low": float(low),
                    "high": float(high),
                    "at_most": floor,
                    "holds": None if floor is None else bool(median < floor),
                }
            )
    publish("search", rows, vars(arguments))


if __name__ == "__main__":
    main()

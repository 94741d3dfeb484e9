"""A library search, its conditions and the rows' columns, over FAISS alone with the same index and effort.

    python -m benchmarks.search
    python -m benchmarks.search --name search_millions --rows 5000000 --embed-dim 64 --train-rows 20000 --tuned-by 60

Builds an index of clustered rows as the recipe's default does, then asks single queries that are not in it, in turn by
FAISS itself (ids and approximate scores) and by the library (exact scores, uid, caption, URL, key). `ms_over_faiss` is
the median of the differences; its floor is 2 ms for a plain search at 100,000 rows, and 3 ms at millions.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.index import rows_around, write_rows
from benchmarks.side_by_side import publish
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.build import build_index
from pipeline.retrieve.efforts import effort_for
from pipeline.retrieve.retriever import Conditions, Retriever
from pipeline.workspace.store import Workspace

_FLOOR_MS, _FLOOR_OF_MILLIONS_MS = 2.0, 3.0
_CASES = (
    ("plain", 10, "", None),
    ("plain", 100, "", None),
    ("where split == 'train'", 10, "split == 'train'", None),
    ("where a tenth passes", 10, "endswith(url, '7.jpg')", None),
    ("distinct 0.95", 10, "", 0.95),
)


def make_index(
    folder: Path,
    num_rows: int,
    embed_dim: int,
    *,
    train_rows: int = 200_000,
    tuned_by: int = 500,
    num_queries: int = 500,
) -> tuple[Retriever, Any]:
    """An index of rows around random centres, and queries around them."""
    workspace, rng = Workspace(str(folder)), np.random.default_rng(0)
    embed, index = workspace.artifact("embed", "e"), workspace.artifact("index", "i")
    centres = rng.normal(size=(max(100, num_rows // 50), embed_dim)).astype(np.float32)
    write_rows(embed, centres, num_rows)
    config = IndexConfig(num_train_rows=train_rows, num_recall_queries=tuned_by)
    build_index(embed, index, config, seed=0)
    return Retriever.open(index), rows_around(centres, rng, num_queries)[0]


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
    parser.add_argument("--train-rows", type=int, default=200_000)
    parser.add_argument("--tuned-by", type=int, default=500, help="queries of the build's tuning")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--name", default="search", help="of the file in results/")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        retriever, queries = make_index(
            Path(folder),
            arguments.rows,
            arguments.embed_dim,
            train_rows=arguments.train_rows,
            tuned_by=arguments.tuned_by,
            num_queries=arguments.queries,
        )
        for name, k, where, distinct in _CASES:
            floor = None
            if (name, k) == ("plain", 10):
                floor = _FLOOR_MS if arguments.rows < 1_000_000 else _FLOOR_OF_MILLIONS_MS
            conditions = Conditions(retriever.conditions(where).where if where else None, distinct)
            measure(retriever, queries[:50], k, conditions)  # the first reads come from the disk
            bare, ours = measure(retriever, queries[50:], k, conditions)
            low, median, high = np.percentile(ours - bare, [25, 50, 75])
            rows.append(
                {
                    "rows": f"{arguments.rows:,} x {arguments.embed_dim}",
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
    publish(arguments.name, rows, vars(arguments))


if __name__ == "__main__":
    main()

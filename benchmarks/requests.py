"""What a thousand shards ask of an object store, against the count by hand in docs/scaling.md.

    python -m benchmarks.requests

The real code of the steps runs in one process, with one worker a step, on a local S3 server that counts. Each step
starts on a machine that has none of the files. What is asked by the clock is left out. The page says what the letters
are. The second table is the training sample of an index of more rows than one machine reads: it is not to fetch the
shards.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.side_by_side import publish
from pipeline.data.selection import embeddings_of
from pipeline.filter.gathered import plan_bundles
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.build import SegmentBuild
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.retrieve.sample import choose_queries
from pipeline.runtime.context import StepContext
from pipeline.workspace.store import Artifact
from tests.s3_server import S3Server, started
from tests.scaling_page import counted_by_hand, value
from tests.tiny.shards import make_embeddings
from tests.tiny.steps_here import count_all_steps, counted_recipe, steps_here
from tests.workspace.conftest import use

_DIM, _SAMPLE_SHARDS, _SAMPLE_SHARD_ROWS, _SAMPLE_ROWS = 256, 128, 1024, 8000

Row = dict[str, Any]


def run(server: S3Server, cache: Path, num_shards: int, shard_rows: int) -> list[Row]:
    """One row for each step and kind of request."""
    recipe = counted_recipe(f"s3://counted/{num_shards}", num_shards, shard_rows)
    counted = count_all_steps(recipe, server, cache)
    num_bundles = len(plan_bundles(num_shards))
    num_queried = _shards_with_queries(recipe)
    letters = {"N": num_shards, "B": num_bundles, "E": 0, "Q": num_queried}
    page, rows = counted_by_hand(), list[Row]()
    for step, requests in counted.items():
        kinds = Counter(one.kind for one in requests)
        for kind in page[step] | kinds:
            cell = page[step].get(kind, "0")
            numbers = {"counted": kinds[kind], "by_hand": value(cell, letters)}
            rows.append({"step": step, "kind": kind, "page": cell, **numbers})
    for row in rows:
        row["equal"] = row["counted"] == row["by_hand"]
    return rows


def _shards_with_queries(recipe: Recipe) -> int:
    step = next(step for step in make_plan(recipe) if step.name == "index")
    embedded = EmbeddedShards.open([embeddings_of(StepContext(recipe, step, recipe.workspace).inputs)])
    rows, _ = choose_queries(embedded, recipe.index.num_recall_queries, np.random.default_rng(recipe.seed))
    return len(np.unique(embedded.shard_of(rows)))


def run_sample(server: S3Server, cache: Path) -> Row:
    """What the first stage of an index asks, which chooses queries and trains on a sample."""
    embed = Artifact("s3://counted/sample/embed/k")
    rng, count = np.random.default_rng(0), _SAMPLE_SHARDS * _SAMPLE_SHARD_ROWS
    vectors = rng.normal(size=(count, _DIM)).astype(np.float32)
    make_embeddings(embed, vectors, vectors, _SAMPLE_SHARD_ROWS, held_out_every=100)
    data_bytes = sum(size for name, size in embed.sizes().items() if name.endswith(".parquet"))
    shutil.rmtree(cache)
    server.counted()
    config = IndexConfig(kind="ivf_rabitq", num_train_rows=_SAMPLE_ROWS, num_recall_queries=100)
    SegmentBuild((embed,), Artifact("s3://counted/sample/index/k"), config, seed=0).prepare()
    requests = [one for one in server.counted() if one.name.endswith(".parquet")]
    kinds = Counter(one.kind for one in requests)
    fetched_bytes = sum(one.num_bytes for one in requests)
    return {
        "shards": _SAMPLE_SHARDS,
        "rows": count,
        "sample_rows": _SAMPLE_ROWS,
        "HEAD": kinds["HEAD"],
        "GET": kinds["GET"],
        "ranged_GET": kinds["ranged GET"],
        "sample_mb": _SAMPLE_ROWS * 4 * _DIM / 1e6,
        "fetched_mb": fetched_bytes / 1e6,
        "data_mb": data_bytes / 1e6,
    }


def main() -> None:
    """Parse, run, publish; exit code 1 if a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=2, help="of a shard")
    arguments = parser.parse_args()
    with started() as server, tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cache = Path(folder) / "cache"
        server.make_bucket("counted")
        use(server.environment | {"UNCLIP_CACHE": str(cache)}, patch)
        sample = run_sample(server, cache)
        with steps_here():
            rows = run(server, cache, arguments.shards, arguments.rows)
    publish("requests", rows, vars(arguments))
    publish("requests_sample", [sample], {"width": _DIM})
    raise SystemExit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()

"""What a thousand shards ask of an object store, against the count by hand in docs/scaling.md.

    python -m benchmarks.requests

The real code of the steps runs in one process, with one worker a step, on a local S3 server that counts. Each step
starts on a machine that has none of the files. By hand: the page's requests of a shard times the shards, and the
requests of the step besides, which are counted on a few shards and are at most the page's. Listings and removals are by
the thousand, so of these the page's number is the most for each thousand files. What is asked by the clock is left out.
The second table is the training sample of an index of more rows than one machine reads: it is not to fetch the shards.
"""

import argparse
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.side_by_side import publish
from pipeline.data.selection import embeddings_of
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.build import SegmentBuild
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.retrieve.sample import choose_queries
from pipeline.runtime.context import StepContext
from pipeline.workspace.store import Artifact
from tests.s3_server import S3Server, started
from tests.scaling_page import counted_by_hand
from tests.tiny.shards import make_embeddings
from tests.tiny.steps_here import count_requests, counted_recipe, steps_here
from tests.workspace.conftest import use

_FEW_SHARDS = 4
_PAGE_NAMES = 1000
"""Names of a listing, and files of a removal."""
_LARGEST_STEP = 5
"""Files of a shard of the step with most: those of a download, its record, and the two that it has while it is made."""
_DIM, _SAMPLE_SHARDS, _SAMPLE_SHARD_ROWS, _SAMPLE_ROWS = 256, 128, 1024, 8000

Row = dict[str, Any]


def run(server: S3Server, cache: Path, num_shards: int, shard_rows: int) -> list[Row]:
    """One row for each step and kind of request."""
    recipes = {n: counted_recipe(f"s3://counted/{n}", n, shard_rows) for n in (_FEW_SHARDS, num_shards)}
    counted = {
        n: {
            step: Counter(one.kind for one in requests) for step, requests in count_requests(one, server, cache).items()
        }
        for n, one in recipes.items()
    }
    page, rows = counted_by_hand(), list[Row]()
    with_queries = {n: _shards_with_queries(recipe) for n, recipe in recipes.items()}
    for step, kinds in counted[num_shards].items():
        for kind in sorted(kinds | counted[_FEW_SHARDS][step]):
            of_shard, besides = page[step][kind]
            few, many = (counted[n][step][kind] for n in (_FEW_SHARDS, num_shards))
            if kind in {"LIST", "DELETE"}:
                by_hand = besides * math.ceil(_LARGEST_STEP * num_shards / _PAGE_NAMES)
                is_equal = many <= by_hand
            else:
                shards = {n: of_shard * n for n in recipes}
                if (step, kind) == ("index", "HEAD"):  # one of a shard's only where it holds a query
                    shards = {n: (of_shard - 1) * n + with_queries[n] for n in recipes}
                by_hand = shards[num_shards] + few - shards[_FEW_SHARDS]
                is_equal = many == by_hand and few - shards[_FEW_SHARDS] <= besides
            rows.append(
                {
                    "step": step,
                    "kind": kind,
                    "of_shard": of_shard,
                    "counted": many,
                    "by_hand": by_hand,
                    "at_most": kind in {"LIST", "DELETE"},
                    "agrees": is_equal,
                }
            )
    return rows


def _shards_with_queries(recipe: Recipe) -> int:
    step = next(step for step in make_plan(recipe) if step.name == "index")
    embedded = EmbeddedShards.open([embeddings_of(StepContext(recipe, step, recipe.workspace).inputs)])
    rows = choose_queries(embedded, recipe.index.num_recall_queries, np.random.default_rng(recipe.seed))
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
    raise SystemExit(0 if all(row["agrees"] for row in rows) else 1)


if __name__ == "__main__":
    main()

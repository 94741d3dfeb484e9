"""What a billion pairs and 256 GPUs ask of the parts that hold no pictures: order, ledger, planner, cache, lock.

    python -m benchmarks.scale [--shards 100000] [--rows 10000] [--gpus 256]

Each part runs by the project's own code, in a process of its own, on records and files without content. Printed are
wall and processor seconds, the making of the records included, and the most memory of the process.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.store import ALL_RECORDS, Artifact, Workspace

_BATCH = 65_536
_CACHED_FILES = 2_000
_RIVALS = 16


def measure_order(shards: int, rows: int, gpus: int) -> str:
    """The batches of every worker at the start, in the middle and at the end of an epoch: each row exactly once."""
    import numpy as np

    from pipeline.data.order import SampleOrder, Share

    order = SampleOrder([rows] * shards, seed=0)
    rows_at = np.zeros(0, np.int64)
    for start in (0, order.num_rows // 2, order.num_rows - _BATCH):
        parts = [Share(_BATCH, rank, gpus) for rank in range(gpus)]
        places = [order.locations(start + part.start, start + part.stop) for part in parts]
        of_batch = np.concatenate(places)
        rows_at = np.concatenate([rows_at, of_batch[:, 0] * rows + of_batch[:, 1]])
    assert len(np.unique(rows_at)) == 3 * _BATCH
    return f"{order.num_rows:,} rows; 3 batches of {_BATCH:,} for {gpus} workers, no row twice"


def measure_ledger(shards: int, rows: int, gpus: int) -> str:
    """The records of a finished step, written as one file and read again."""
    del gpus
    with tempfile.TemporaryDirectory() as folder:
        finish(Artifact(f"{folder}/download/0123456789abcdef"), shards, rows)
        records = Artifact(f"{folder}/download/0123456789abcdef").shard_records()
    return f"{len(records):,} records read in one file"


def measure_planner(shards: int, rows: int, gpus: int) -> str:
    """`unclip plan` on a workspace whose download and embeddings are finished."""
    del gpus
    from pipeline.recipe.plan import artifact_of, make_plan
    from pipeline.recipe.recipe import parse_recipe
    from pipeline.recipe.status import plan_status

    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe({"workspace": folder})
        steps = make_plan(recipe)
        for step in steps:
            if step.name in {"download", "embed"}:
                finish(artifact_of(Workspace(folder), step), shards, rows, step.name, step.key)
        start = time.monotonic()
        statuses = plan_status(Workspace(folder), steps)
        done = sum(status.state == "done" for status in statuses)
    return f"{done} finished steps of {shards:,} shards; the plan alone {time.monotonic() - start:.1f} s"


def measure_cache(shards: int, rows: int, gpus: int) -> str:
    """A cache of many files that may hold a quarter of them: the rest is evicted as the files come."""
    del shards, rows, gpus
    from pipeline.workspace import cache

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"UNCLIP_CACHE": folder, "UNCLIP_CACHE_GB": str(_CACHED_FILES * 1000 / 4 / 1e9)}
        cache._GRACE_S = 0.0  # (files come within the minute in which one that was used stays)
        for number in range(_CACHED_FILES):
            version = cache.Version(str(number), 1000)
            path, _ = cache.cached_path(
                f"s3://b/{number // 1000}/{number}",
                version,
                lambda local: local.write_bytes(bytes(1000)) and None,
                _any,
            )
            assert path.exists()
        kept = sum(1 for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))
    assert kept <= _CACHED_FILES * 0.27
    return f"{_CACHED_FILES:,} files came, {kept:,} stay"


def measure_lock(shards: int, rows: int, gpus: int) -> str:
    """Many who want one workspace: each gets it once, never two at a time."""
    del shards, rows, gpus
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        rivals = [context.Process(target=_take_turn, args=(folder,)) for _ in range(_RIVALS)]
        for one in rivals:
            one.start()
        for one in rivals:
            one.join()
        turns = (Path(folder) / "turns").read_text().split()
    assert turns == ["in", "out"] * _RIVALS
    return f"{_RIVALS} processes, one after the other"


def _take_turn(folder: str) -> None:
    from pipeline.errors import StepError
    from pipeline.workspace.lock import locked_workspace

    while True:
        try:
            with locked_workspace(Workspace(folder), _any), (Path(folder) / "turns").open("a") as turns:
                turns.write("in\n")
                turns.flush()
                turns.write("out\n")
        except StepError:
            time.sleep(0.01)
        else:
            return


def _any(_text: str) -> None:
    """Takes what is not looked at."""


def finish(artifact: Artifact, shards: int, rows: int, step: str = "s", key: str = "k") -> None:
    """Commit an artifact of so many shards, each with the record of a tar and a table that are not there."""
    files = {
        f"{n:06d}.{end}": {"bytes": 2 * 10**8, "sha256": f"{n:064d}"}
        for n in range(shards)
        for end in ("tar", "parquet")
    }
    lines = (
        ShardRecord(
            shard=f"{n:06d}",
            counts={"in": rows, "ok": rows},
            files={f"{n:06d}.{end}": files[f"{n:06d}.{end}"] for end in ("tar", "parquet")},
        )
        for n in range(shards)
    )
    artifact.write_json(ALL_RECORDS, [line.to_dict() for line in lines])
    counts = {"in": rows * shards, "ok": rows * shards}
    artifact.commit(Manifest(step=step, key=key, step_version=1, section={}, inputs={}, counts=counts, files=files))


_PARTS: dict[str, Callable[[int, int, int], str]] = {
    "order": measure_order,
    "ledger": measure_ledger,
    "planner": measure_planner,
    "cache": measure_cache,
    "lock": measure_lock,
}


def _run(name: str, shards: int, rows: int, gpus: int) -> None:
    start, said = time.monotonic(), _PARTS[name](shards, rows, gpus)
    wall_s, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    processor_s = used.ru_utime + used.ru_stime
    sys.stdout.write(f"| {name} | {wall_s:.1f} | {processor_s:.1f} | {used.ru_maxrss / 1e6:.2f} | {said} |\n")


def main() -> None:
    """Measure every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=256)
    parser.add_argument("--parts", nargs="*", choices=list(_PARTS), default=list(_PARTS))
    options = parser.parse_args()
    sys.stdout.write("| part | s | processor s | GB | what |\n|---|---|---|---|---|\n")
    sys.stdout.flush()
    for name in options.parts:
        process = multiprocessing.get_context("spawn").Process(
            target=_run, args=(name, options.shards, options.rows, options.gpus)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()

"""Reading embeddings beside Ray Data's iterator, and the ledger that a resumed step reads, in one run.

    python -m benchmarks.embeddings_io [--shards 40] [--rows 2500] [--embed-dim 768] [--records 10000]

Both readers give z_image and z_text of every row as arrays, float16, from the same shards: ours shard by shard as the
index reads them, Ray Data in batches of 4,096 rows (``iter_batches``), on as many CPUs. They take turns; the ratio is
of the medians; floor 2. The ledger is a step's 10,000 shard records, read as a resumed step does before its first
shard: in less than 2 s.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import ray.data

from benchmarks.side_by_side import publish
from pipeline.data.vectors import read_vectors, to_unit
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.tiny.shards import make_embeddings


def read_ours(embed: Artifact) -> int:
    """Number of rows."""
    return sum(len(read_vectors(embed.path(f"{shard}.parquet")).z_text) for shard in embed.shard_records())


def read_rays(embed: Artifact) -> int:
    """Number of rows."""
    paths = [str(embed.path(f"{shard}.parquet")) for shard in embed.shard_records()]
    dataset = ray.data.read_parquet(paths, columns=["z_image", "z_text"])
    return sum(len(batch["z_text"]) for batch in dataset.iter_batches(batch_size=4096, batch_format="numpy"))


def ledger_s(folder: Path, num_records: int) -> float:
    """Seconds to read the records of a step that has many shards."""
    artifact = Artifact(str(folder))
    files = {f"{0:05d}.parquet": {"bytes": 1 << 20, "sha256": "0" * 64}}
    for number in range(num_records):
        record = ShardRecord(shard=f"{number:05d}", counts={"in": 1000, "ok": 1000}, files=files, wall_s=1.0)
        target = folder / f"{record.shard}.done.json"
        target.write_text(json.dumps(record.to_dict(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    start = time.perf_counter()
    assert len(artifact.shard_records()) == num_records
    return time.perf_counter() - start


def main() -> None:
    """Measure, and publish the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2500)
    parser.add_argument("--embed-dim", type=int, default=768)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    num_cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ledger").mkdir()
        ledger = [ledger_s(folder / "ledger", args.records) for _ in range(args.repeats)]
        num_rows = args.shards * args.rows
        vectors = to_unit(np.random.default_rng(0).standard_normal((num_rows, args.embed_dim), np.float32))
        embed = Artifact(str(folder / "embed"))
        make_embeddings(embed, vectors, vectors[::-1], args.rows)
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        readers = {"ours": read_ours, "ray_data": read_rays}
        rates: dict[str, list[float]] = {reader: [] for reader in readers}
        for turn in range(args.repeats + 1):
            for reader, read in readers.items():
                start = time.perf_counter()
                assert read(embed) == num_rows
                if turn:  # the first turn warms up
                    rates[reader].append(num_rows / (time.perf_counter() - start))
        ray.shutdown()
    medians = {reader: statistics.median(values) for reader, values in rates.items()}
    ours, theirs = medians["ours"], medians["ray_data"]
    rows: list[dict[str, object]] = [
        {"what": "embeddings, rows a second", "ours": ours, "ray_data": theirs, "ratio": ours / theirs, "floor": 2.0},
        {"what": f"ledger of {args.records:,} shards, s", "ours": statistics.median(ledger), "below": 2.0},
    ]
    names = ("what", "ours", "ray_data", "ratio", "floor", "below")
    settings = {"rows": num_rows, "embed_dim": args.embed_dim, "cpus": num_cpus, "rates": rates, "ledger_s": ledger}
    publish("embeddings_io", [{name: row.get(name) for name in names} for row in rows], settings)


if __name__ == "__main__":
    main()

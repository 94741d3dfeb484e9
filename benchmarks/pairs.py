"""Memory and speed of the pairs step, by the number of rows: does a list of 100M need more memory than one of 1M?

    python -m benchmarks.pairs

Makes lists of 1M, 2M and 5M rows (a few are repeated) and writes each as pairs in a process of its
own, with one worker. `peak_mib` is the process's largest resident set less that after its imports. Floor: the peak of
the largest list is at most 1.25 times that of the smallest, which is smaller than one piece (256 MB, here about 5M
rows); from one piece on the peak is flat (docs/lab.md). The hours for 100M rows follow from one worker's speed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.side_by_side import publish
from pipeline.data.make_pairs import write_pairs
from pipeline.data.sources import Source
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.workspace.store import Artifact

_ROWS_PER_FILE = 250_000
_WORDS = ("a", "red", "blue", "large", "small", "house", "tree", "cat", "dog", "on", "the", "under", "photo", "street")


def write_list(folder: Path, num_rows: int, kind: str) -> None:
    """Write a list in parts: URLs of 40 letters, captions of twelve words."""
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, _ROWS_PER_FILE):
        count = min(_ROWS_PER_FILE, num_rows - start)
        numbers = np.arange(start, start + count)
        numbers = np.where(numbers % 20 == 19, numbers // 2, numbers)
        captions = [" ".join(rng.choice(_WORDS, 12)) for _ in range(997)]
        urls = [f"https://example.org/pictures/{number:012d}.jpg" for number in numbers]
        texts = [f"{captions[number % 997]} {number}" for number in numbers]
        path = folder / f"{start // _ROWS_PER_FILE:05d}.{kind}"
        if kind == "parquet":
            table = pa.table({"URL": urls, "TEXT": texts, "similarity": rng.random(count), "hash": numbers})
            pq.write_table(table, path, row_group_size=50_000)
        else:
            lines = (f"{url}\t{text}\n" for url, text in zip(urls, texts, strict=True))
            path.write_text("URL\tTEXT\n" + "".join(lines), encoding="utf-8")


def _resident_mib(field: str) -> float:
    """VmRSS, now, or VmHWM, the largest since it was reset; getrusage counts the process that started this one too."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def measure(folder: Path, output: Path) -> dict[str, Any]:
    """Write the pairs of a list in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
    idle_mib = _resident_mib("VmRSS")
    start, before_s = time.perf_counter(), time.process_time()
    summary = write_pairs(Source(PairsConfig(source="list", path=str(folder))), Artifact(str(output)))
    seconds, processor_s = time.perf_counter() - start, time.process_time() - before_s
    peak_mib = _resident_mib("VmHWM") - idle_mib
    return {"counts": dict(summary.counts), "seconds": seconds, "processor_s": processor_s, "peak_mib": peak_mib}


def run(sizes: list[int], kinds: list[str]) -> list[dict[str, Any]]:
    """One row for each size and format."""
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        smallest = 0.0
        for num_rows in sizes:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "list"
                folder.mkdir()
                write_list(folder, num_rows, kind)
                command = [sys.executable, "-m", "benchmarks.pairs", "--measure", str(folder), f"{name}/out"]
                measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            smallest = smallest or measured["peak_mib"]
            rows.append(
                {
                    "format": kind,
                    "rows": num_rows,
                    "repeated": measured["counts"]["duplicate"],
                    "rows_per_processor_s": round(num_rows / measured["processor_s"]),
                    "hours_for_100M": round(1e8 * measured["processor_s"] / num_rows / 3600, 2),
                    "peak_mib": round(measured["peak_mib"]),
                    "of_smallest": round(measured["peak_mib"] / smallest, 2),
                    "at_most": 1.25,
                }
            )
    return rows


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 2_000_000, 5_000_000])
    parser.add_argument("--formats", nargs="+", default=["parquet", "tsv"])
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    publish("pairs", run(arguments.sizes, arguments.formats), {"sizes": arguments.sizes, "formats": arguments.formats})


if __name__ == "__main__":
    main()

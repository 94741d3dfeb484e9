"""Downloads of what never ends and of what takes much memory: seconds beyond the deadline, memory over idle.

    python -m benchmarks.faults [--rounds 3]

A shard of 100 URLs, whose hosts drip, stop in the middle, never answer, or have addresses at which nobody is: seconds
until it is written, less the recipe's deadline. Floor: less than 2. A shard of bombs of every format
(benchmarks/bombs.py): the peak of the process that decodes and of the one that downloads, less what each has when it
is idle. Floor: less than 400 MB, and a cause for every row.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bombs import make_bombs
from benchmarks.side_by_side import publish
from pipeline.data.causes import cause_of
from pipeline.data.download import Downloader
from pipeline.data.rows import make_uid
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadConfig
from tests.data.hostile import HostileServer, dead_addresses, urls_that_never_end

_NUM_URLS, _TIMEOUT_S, _DEADLINE_S = 100, 2, 3
_LATE_S, _MOST_MB = 2.0, 400.0


def late_s(folder: Path) -> tuple[float, int]:
    """Seconds of a shard of hosts that never end beyond the deadline; and the rows that have a cause."""
    config = DownloadConfig(timeout_s=_TIMEOUT_S, deadline_s=_DEADLINE_S)
    rules = AddressRules(["127.0.0.0/8"])
    with HostileServer() as server, dead_addresses() as port, Downloader(config, rules) as downloader:
        rows = _rows(urls_that_never_end(server, port, _NUM_URLS))
        start = time.monotonic()
        downloader.download(rows, "00000", _files(folder))
        return time.monotonic() - start - _DEADLINE_S, _num_with_cause(folder)


def bombs_mb(folder: Path) -> tuple[dict[str, float], int, int]:
    """Peaks over idle of a shard of bombs, in MB; the rows that have a cause, and all."""
    urls: list[str] = []
    for number, data in enumerate(make_bombs().values()):
        path = folder / str(number)
        path.write_bytes(data)
        urls.append(path.as_uri())
    with Downloader(DownloadConfig(), AddressRules(folders=[str(folder)])) as downloader:
        processes = {"download": os.getpid()}
        for child in psutil.Process().children(recursive=True):
            if "pipeline.data.decoders" in child.cmdline():
                processes["decoder"] = child.pid
        idle = {name: _status_mb(pid, "VmRSS") for name, pid in processes.items()}
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins anew (Linux: proc(5))
        downloader.download(_rows(urls), "00000", _files(folder))
        peaks = {name: _status_mb(pid, "VmHWM") - idle[name] for name, pid in processes.items()}
    return peaks, _num_with_cause(folder), len(urls)


def main() -> None:
    """Measure, and publish the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds, labelled = late_s(Path(folder))
        name = "hosts that never end: seconds beyond the deadline"
        table.append(_row(name, number, seconds, _LATE_S, labelled, _NUM_URLS))
        with tempfile.TemporaryDirectory() as folder:
            peaks, labelled, num_bombs = bombs_mb(Path(folder))
        for process, peak in peaks.items():
            name = f"bombs: MB over idle, process of the {process}"
            table.append(_row(name, number, peak, _MOST_MB, labelled, num_bombs))
    table.sort(key=lambda row: row["what"])
    publish("faults", table, {"timeout_s": _TIMEOUT_S, "deadline_s": _DEADLINE_S})


def _row(what: str, number: int, value: float, below: float, labelled: int, num_rows: int) -> dict[str, Any]:
    holds = value < below and labelled == num_rows
    return {
        "what": what,
        "round": number,
        "value": value,
        "below": below,
        "rows": num_rows,
        "with_cause": labelled,
        "holds": holds,
    }


def _rows(urls: list[str]) -> pa.Table:
    columns = {"uid": [make_uid(url, "") for url in urls], "split": ["train"] * len(urls)}
    return pa.table(columns | {"caption": [""] * len(urls), "url": urls})


def _files(folder: Path) -> ShardFiles:
    return ShardFiles(folder / "a.tar", folder / "a.parquet", folder / "a.json")


def _num_with_cause(folder: Path) -> int:
    messages = pq.read_table(_files(folder).parquet).column("error_message").to_pylist()
    return sum(bool(message and cause_of(message) != "other") for message in messages)


def _status_mb(pid: int, field: str) -> float:
    """Resident memory (VmRSS) of a process, or its peak (VmHWM), in MB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field)) / 1e6


if __name__ == "__main__":
    main()

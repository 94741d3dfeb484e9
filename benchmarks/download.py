"""Downloads against img2dataset: pictures per second, from the same server, list and cores.

    python -m benchmarks.download [--rounds 3] [--pictures 6000]

A process serves photographs with keep-alive from memory, on the same cores as both programs. Each round
runs both, one after the other, as a command with a process a core and the same size, resize mode, encoding, checksum
and shards; ours without Ray, whose workers do the same. Pictures per second are those of the shards:
from the begin of the first to the end of the last, without the start of either program. Floor: 1.5 times img2dataset's.
Processor milliseconds are those of all processes of a command for each picture, beyond those of a command with one
shard for each process: img2dataset's processes load what they need with their first shard.
"""

import argparse
import asyncio
import contextlib
import gc
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from benchmarks.side_by_side import publish

FLOOR = 1.5
_SIZES = {
    "640 x 480": [(640, 480)] * 20,
    "sizes of the web": [
        *[(320, 240)] * 3, *[(500, 375)] * 5, *[(640, 480)] * 5, *[(1024, 768)] * 4, *[(1600, 1200)] * 2, (3000, 2000),
    ],
}  # fmt: skip
"""Sets of pictures; the second has some of each size that lists of web pictures have."""
_SHARD_ROWS = 500
_IMAGE_PX = 256
_AT_ONCE = 2
"""Shards that a worker of ours makes at a time."""


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A picture with about the spectrum of a photograph, as a JPEG file."""
    random = np.random.default_rng(seed)
    noise = Image.fromarray(np.uint8(np.clip(random.normal(128, 60, (480, 640, 3)), 0, 255)))
    layers = np.zeros((480, 640, 3))
    for radius in (1, 4, 16, 64):
        layer = np.asarray(noise.filter(ImageFilter.GaussianBlur(radius))).astype(float) - 128
        layers += layer / max(layer.std(), 1e-6) * radius**0.5
    image = Image.fromarray(np.uint8(np.clip(128 + 9 * layers, 0, 255))).resize(size, Image.Resampling.BICUBIC)
    grain = random.normal(0, 2, (size[1], size[0], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(np.asarray(image) + grain, 0, 255))).save(buffer, "JPEG", quality=84)
    return buffer.getvalue()


class _Host(asyncio.Protocol):
    """Answers one connection, with little work: both programs have it beside them on their cores.

    Args:
        answers: Whole answers of each set of pictures, by whether the connection stays open.
    """

    def __init__(self, answers: dict[bool, list[list[bytes]]]) -> None:
        self._answers = answers
        self._waiting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._waiting += data
        while b"\r\n\r\n" in self._waiting:
            head, _, self._waiting = self._waiting.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            stays_open = b"connection: close" not in head.lower()
            if path[1:2].isdigit():
                answers = self._answers[stays_open][int(path[1:2])]
                self._transport.write(answers[int(path[3:-4]) % len(answers)])
            else:
                self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            if not stays_open:
                self._transport.close()


async def _serve(port_file: Path) -> None:
    sets = [[photograph(seed, size) for seed, size in enumerate(sizes)] for sizes in _SIZES.values()]
    heads = {True: "", False: "Connection: close\r\n"}
    answers = {
        stays_open: [
            [f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body for body in bodies]
            for bodies in sets
        ]
        for stays_open, head in heads.items()
    }
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Host(answers), "127.0.0.1", 0, backlog=1024)
    port_file.write_text(str(server.sockets[0].getsockname()[1]))
    await server.serve_forever()


@contextlib.contextmanager
def served(folder: Path) -> Generator[str]:
    """The base URL of a running server."""
    port_file = folder / "port"
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.download", "--serve", str(port_file)])
    try:
        while not port_file.exists() or not port_file.read_text():
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        child.kill()
        child.wait()


@dataclass(frozen=True)
class Run:
    """One command."""

    per_s: float
    """Pictures per second between the begin of the first shard and the end of the last."""
    pictures: int
    """How many came through."""
    command_s: float
    """The whole command, in seconds."""
    cpu_s: float
    """Processor time of all its processes, in seconds."""


def _run(command: list[str], out: Path, environment: dict[str, str]) -> Run:
    start_s, start_cpu_s = time.monotonic(), _cpu_s()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    command_s, cpu_s = time.monotonic() - start_s, _cpu_s() - start_cpu_s
    stats = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
    pictures = sum(one["successes"] for one in stats)
    shards_s = max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)
    return Run(pictures / shards_s, pictures, command_s, cpu_s)


def _cpu_s() -> float:
    """Processor time of the children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_theirs(table: Path, out: Path, num_processes: int) -> Run:
    """img2dataset's command."""
    options = {
        "url_list": str(table),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": ["uid", "split"],
        "output_folder": str(out),
        "output_format": "webdataset",
        "processes_count": num_processes,
        "thread_count": 32,
        "number_sample_per_shard": _SHARD_ROWS,
        "image_size": _IMAGE_PX,
        "resize_mode": "center_crop",
        "encode_quality": 95,
        "compute_hash": "sha256",
        "enable_wandb": False,
    }
    command = [sys.executable, "-m", "benchmarks.download", "--img2dataset", json.dumps(options)]
    return _run(command, out, {"NO_ALBUMENTATIONS_UPDATE": "1"})


def run_ours(table: Path, out: Path, num_processes: int) -> Run:
    """Our downloader in as many processes, as ``run_theirs``."""
    out.mkdir()
    command = [sys.executable, "-m", "benchmarks.download", "--ours", str(table), str(out), str(num_processes)]
    return _run(command, out, {})


def _download_ours(table: Path, out: Path, num_processes: int) -> None:
    rows = pq.read_table(table)
    shards = [f"{number:05d}" for number in range(-(-rows.num_rows // _SHARD_ROWS))]
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    for shard in [*shards, *[""] * (num_processes * _AT_ONCE)]:
        waiting.put(shard)
    workers = [context.Process(target=_work, args=(table, out, waiting)) for _ in range(num_processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def _work(table: Path, out: Path, waiting: Any) -> None:
    """Take the next shard whenever one is done, and two at a time, as a worker of the step does."""
    from pipeline.data.download import Downloader
    from pipeline.data.shard_writer import ShardFiles
    from pipeline.data.urls import AddressRules
    from pipeline.recipe.sections import DownloadConfig

    config = DownloadConfig(samples_per_shard=_SHARD_ROWS, image_px=_IMAGE_PX)
    rows = pq.read_table(table).select(["uid", "split", "caption", "url"])
    with Downloader(config, AddressRules(["127.0.0.1/32"])) as downloader, ThreadPoolExecutor(_AT_ONCE) as pool:
        gc.freeze()  # as the step's worker does

        def make(_: int) -> None:
            while shard := waiting.get():
                part = rows.slice(int(shard) * _SHARD_ROWS, _SHARD_ROWS)
                files = ShardFiles(out / f"{shard}.tar", out / f"{shard}.parquet", out / f"{shard}_stats.json")
                downloader.download(part, shard, files)

        list(pool.map(make, range(_AT_ONCE)))


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--img2dataset", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(_serve(Path(arguments.serve)))
    if arguments.ours:
        _download_ours(Path(arguments.ours[0]), Path(arguments.ours[1]), int(arguments.ours[2]))
        return
    if arguments.img2dataset:
        from img2dataset import download

        download(**json.loads(arguments.img2dataset))
        return
    cores = os.cpu_count() or 1
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as url:
        for number, kind in enumerate(_SIZES):
            rows += _compare(Path(name) / str(number), f"{url}/{number}", kind, arguments, cores)
    publish("download", rows, {"floor": FLOOR, "cores": cores, "image_px": _IMAGE_PX, "shard_rows": _SHARD_ROWS})


def _compare(folder: Path, url: str, kind: str, arguments: argparse.Namespace, cores: int) -> list[dict[str, object]]:
    """Rounds of one set of pictures, and their median."""
    folder.mkdir()
    num_warm = cores * _SHARD_ROWS
    _write_list(folder / "warm.parquet", url, num_warm)
    _write_list(folder / "table.parquet", url, arguments.pictures)
    both: list[tuple[str, Callable[[Path, Path, int], Run]]] = [("our", run_ours), ("their", run_theirs)]
    start_cpu_s = {name: run(folder / "warm.parquet", folder / f"{name}-warm", cores).cpu_s for name, run in both}
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        results = {
            name: run(folder / "table.parquet", folder / f"{name}-{number}", cores)
            for name, run in both[:: 1 if number % 2 else -1]
        }
        assert all(result.pictures == arguments.pictures for result in results.values())
        beyond = arguments.pictures - num_warm
        cpu_ms = {name: 1000 * (results[name].cpu_s - start_cpu_s[name]) / beyond for name, _ in both}
        ours, theirs = results["our"], results["their"]
        rates = {"ours_per_s": ours.per_s, "theirs_per_s": theirs.per_s, "ratio": ours.per_s / theirs.per_s}
        times = {"our_cpu_ms": cpu_ms["our"], "their_cpu_ms": cpu_ms["their"]}
        commands = {"our_command_s": ours.command_s, "their_command_s": theirs.command_s}
        rounds.append(rates | times | {"cpu_ratio": cpu_ms["their"] / cpu_ms["our"]} | commands)
    middle = {key: median(row[key] for row in rounds) for key in rounds[0]}
    shown = [(str(number), row) for number, row in enumerate(rounds)] + [("median", middle)]
    return [{"pictures": kind, "round": name, **row} for name, row in shown]


def _write_list(path: Path, url: str, pictures: int) -> None:
    urls = [f"{url}/{number}.jpg" for number in range(pictures)]
    columns = {"url": urls, "caption": ["a photograph"] * len(urls), "uid": urls, "split": ["train"] * len(urls)}
    pq.write_table(pa.table(columns), path)


if __name__ == "__main__":
    main()

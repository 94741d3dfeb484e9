"""Downloads against img2dataset: pictures per second, from the same server, list and cores.

    python -m benchmarks.download [--rounds 3] [--pictures 3000]

A process serves photographs of some 80 KB with keep-alive from memory, on the same cores as both programs. Each round
runs both, one after the other, as a command with a process a core and the same size, resize mode, encoding, checksum
and shards; ours without Ray, whose workers do the same. Pictures per second are those of the shards:
from the begin of the first to the end of the last, without the start of either program. Floor: 1.5 times img2dataset's.
"""

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from benchmarks.side_by_side import publish

FLOOR = 1.5
_NUM_FILES = 64
_SIZE = (640, 480)
_SHARD_ROWS = 500
_IMAGE_PX = 256


def photographs() -> list[bytes]:
    """Pictures with the spectrum of photographs, as JPEG files of some 80 KB."""
    files: list[bytes] = []
    for seed in range(_NUM_FILES):
        noise = np.random.default_rng(seed).normal(0, 1, (_SIZE[1], _SIZE[0], 3))
        layers = np.zeros_like(noise)
        for radius in (1, 4, 16, 64):
            small = Image.fromarray(np.uint8(np.clip(128 + 60 * noise, 0, 255)))
            layer = np.asarray(small.filter(ImageFilter.GaussianBlur(radius))).astype(float) - 128
            layers += layer / max(layer.std(), 1e-6) * radius**0.5
        image = Image.fromarray(np.uint8(np.clip(128 + 9 * layers, 0, 255)))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=84)
        files.append(buffer.getvalue())
    return files


async def _serve(port_file: Path) -> None:
    files = photographs()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1]
                is_picture = path.startswith(b"/p/")
                body = files[int(path[3:-4]) % len(files)] if is_picture else b""
                status = b"200 OK" if is_picture else b"404 Not Found"
                is_last = b"connection: close" in head.lower()
                ending = b"Connection: close\r\n" if is_last else b""
                length = str(len(body)).encode()
                writer.write(
                    b"HTTP/1.1 " + status + b"\r\nContent-Length: " + length + b"\r\n" + ending + b"\r\n" + body
                )
                await writer.drain()
                if is_last:
                    break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
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


def _rate(folder: Path) -> tuple[float, int]:
    """Pictures per second between the begin of the first shard and the end of the last, and their number."""
    stats = [json.loads(path.read_text()) for path in folder.glob("*_stats.json")]
    successes = sum(one["successes"] for one in stats)
    return successes / (max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)), successes


def run_theirs(table: Path, out: Path, num_processes: int) -> tuple[float, float, int]:
    """img2dataset's command: pictures per second in its shards, seconds of the whole command, pictures."""
    options = {
        "url_list": table, "input_format": "parquet", "url_col": "url", "caption_col": "caption", "output_folder": out,
        "output_format": "webdataset", "processes_count": num_processes, "thread_count": 32, "image_size": _IMAGE_PX,
        "resize_mode": "center_crop", "encode_quality": 95, "number_sample_per_shard": _SHARD_ROWS,
        "compute_hash": "sha256", "enable_wandb": False, "save_additional_columns": '["uid","split"]',
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.download", "--img2dataset", *words]
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return *_rate(out)[:1], time.monotonic() - start, _rate(out)[1]


def run_ours(table: Path, out: Path, num_processes: int) -> tuple[float, float, int]:
    """Our downloader in as many processes, as ``run_theirs``."""
    out.mkdir()
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.download", "--ours", str(table), str(out), str(num_processes)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rate, count = _rate(out)
    return rate, time.monotonic() - start, count


def _download_ours(table: Path, out: Path, num_processes: int) -> None:
    rows = pq.read_table(table)
    shards = [f"{number:05d}" for number in range(-(-rows.num_rows // _SHARD_ROWS))]
    workers = [
        multiprocessing.get_context("spawn").Process(target=_work, args=(table, out, shards[first::num_processes]))
        for first in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def _work(table: Path, out: Path, shards: list[str]) -> None:
    """Two shards at a time, as a worker of the step has."""
    from pipeline.data.download import Downloader
    from pipeline.data.shard_writer import ShardFiles
    from pipeline.data.urls import AddressRules
    from pipeline.recipe.sections import DownloadConfig

    config = DownloadConfig(samples_per_shard=_SHARD_ROWS, image_px=_IMAGE_PX)
    rows = pq.read_table(table).select(["uid", "split", "caption", "url"])
    with Downloader(config, AddressRules(["127.0.0.1/32"])) as downloader, ThreadPoolExecutor(2) as pool:

        def make(shard: str) -> None:
            part = rows.slice(int(shard) * _SHARD_ROWS, _SHARD_ROWS)
            files = ShardFiles(out / f"{shard}.tar", out / f"{shard}.parquet", out / f"{shard}_stats.json")
            downloader.download(part, shard, files)

        list(pool.map(make, shards))


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--img2dataset", action="store_true", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.serve:
        asyncio.run(_serve(Path(arguments.serve)))
    if arguments.ours:
        _download_ours(Path(arguments.ours[0]), Path(arguments.ours[1]), int(arguments.ours[2]))
        return
    if arguments.img2dataset:
        import fire
        from img2dataset import download

        sys.argv = ["img2dataset", *rest]
        fire.Fire(download)
        return
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as url:
        folder = Path(name)
        urls = [f"{url}/p/{number}.jpg" for number in range(arguments.pictures)]
        table = pa.table(
            {"url": urls, "caption": ["a photograph"] * len(urls), "uid": urls, "split": ["train"] * len(urls)}
        )
        pq.write_table(table, folder / "table.parquet")
        rows: list[dict[str, object]] = []
        for number in range(arguments.rounds):
            ours = run_ours(folder / "table.parquet", folder / f"ours-{number}", cores)
            theirs = run_theirs(folder / "table.parquet", folder / f"theirs-{number}", cores)
            row = {"round": number, "ours_per_s": ours[0], "theirs_per_s": theirs[0], "ratio": ours[0] / theirs[0]}
            rows.append(row | {"our_command_s": ours[1], "their_command_s": theirs[1], "pictures": ours[2]})
            assert ours[2] == theirs[2] == arguments.pictures
        middle = {key: median(float(row[key]) for row in rows) for key in rows[0]}  # type: ignore[arg-type]
        rows.append(middle | {"round": "median"})
    settings = {"floor": FLOOR, "cores": cores, "bytes": len(photographs()[0]), "size": _SIZE, "image_px": _IMAGE_PX}
    publish("download", rows, settings)


if __name__ == "__main__":
    main()

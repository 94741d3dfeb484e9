"""The processes that decode: one that dies or hangs costs no picture but its own."""

import asyncio
import contextlib
import errno
import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import decoders
from pipeline.data.causes import FetchError
from pipeline.data.download import Downloader
from pipeline.data.resize import StoredPicture
from pipeline.data.shard_writer import failure_causes
from pipeline.data.urls import AddressRules
from pipeline.errors import StepError
from tests.data.conftest import PictureServer, make_picture
from tests.data.downloading import CONFIG, NEAR, files_in, make_rows, sizes_of
from tests.tiny.shards import download_shard


def _decoders() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "pipeline.data.decoders" in child.cmdline()]


def _large_png() -> bytes:
    """A picture that keeps a decoder busy for a while."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_a_picture_that_takes_its_decoder_down_twice_is_a_row_with_a_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, killed, large = decoders._Decoder._answer, list[int](), _large_png()

    async def kill_at_large(decoder: Any, number: int) -> StoredPicture:
        if decoder._asked[number][1] == large:
            killed.append(decoder._process.pid)
            os.kill(decoder._process.pid, signal.SIGKILL)
        return await answer(decoder, number)

    monkeypatch.setattr(decoders._Decoder, "_answer", kill_at_large)
    names = ["small.jpg", "large.png", "last.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(large if name == "large.png" else make_picture(0))
    rows = make_rows("http://x", names).set_column(4, "url", pa.array([(tmp_path / name).as_uri() for name in names]))
    config, files = replace(CONFIG, max_image_area_px=1e8), files_in(tmp_path)
    counts = download_shard(rows, "00003", config, files, AddressRules(folders=["/"]))
    messages = pq.read_table(files.parquet).column("error_message").to_pylist()
    assert messages == [None, "killer: its decoder ended with status -9", None]
    assert counts["ok"] == 2
    assert len(set(killed)) == 2
    assert _decoders() == []


def test_a_decoder_that_ends_once_costs_no_picture() -> None:
    """All that it has is sent to the next process in the same order, so no picture loses a try to another's answer."""
    picture, config = _large_png(), replace(CONFIG, max_image_area_px=1e8)

    async def run() -> tuple[list[StoredPicture], list[psutil.Process]]:
        async with decoders.Decoders(config, 1) as pool:
            tasks = [asyncio.create_task(pool.store(io.BytesIO(picture))) for _ in range(12)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            [first] = _decoders()
            first.kill()
            stored = await asyncio.gather(*tasks)
            return stored, [first, *_decoders()]

    stored, processes = asyncio.run(run())
    assert len(stored) == 12
    assert len({process.pid for process in processes}) == 2


def test_a_machine_that_starts_no_decoder_for_a_moment_costs_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_PAUSE_S", 0.01)
    start, failures = asyncio.create_subprocess_exec, [BlockingIOError(errno.EAGAIN, "Try again")] * 2

    async def start_or_fail(*arguments: Any, **options: Any) -> Any:
        if _is_lost and failures:
            raise failures.pop()
        return await start(*arguments, **options)

    async def run() -> StoredPicture:
        async with decoders.Decoders(CONFIG, 1) as pool:
            [process] = _decoders()
            process.kill()
            _is_lost.append(True)
            return await pool.store(io.BytesIO(make_picture(0)))

    _is_lost: list[bool] = []
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_or_fail)
    assert sizes_of(asyncio.run(run()))[:2] == (32, 32)
    assert failures == []


def test_a_machine_that_starts_no_decoder_ends_the_step_and_fails_no_row(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_PAUSE_S", 0.01)

    async def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with Downloader(CONFIG, NEAR) as downloader:
        [process] = _decoders()
        process.kill()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
        with pytest.raises(StepError, match=r"does not start .*Resource temporarily unavailable"):
            downloader.download(make_rows(server.url, ["jpg/1", "jpg/2"]), "00003", files_in(tmp_path))


def test_a_picture_that_is_no_longer_asked_for_costs_those_beside_it_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_TRIES", 1)
    picture, config = _large_png(), replace(CONFIG, max_image_area_px=1e8)

    async def run() -> list[Any]:
        async with decoders.Decoders(config, 1) as pool:
            tasks = [asyncio.create_task(pool.store(io.BytesIO(picture))) for _ in range(6)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            tasks[2].cancel()  # it waits behind the second, which is being decoded
            return await asyncio.gather(*tasks, return_exceptions=True)

    stored = asyncio.run(run())
    assert isinstance(stored.pop(2), asyncio.CancelledError)
    assert [type(one) for one in stored] == [StoredPicture] * 5


def test_many_pictures_through_few_decoders_come_back_to_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While decoders die at random, no row gets the picture of another."""
    pictures = [make_picture(seed, size=(96 + seed % 7, 64)) for seed in range(120)]
    write, random = decoders._Decoder._write, np.random.default_rng(0)

    def write_and_kill(decoder: Any, number: int, facts: bytes, data: bytes) -> None:
        write(decoder, number, facts, data)
        if number and random.random() < 0.05:
            decoder._kill()

    monkeypatch.setattr(decoders._Decoder, "_write", write_and_kill)
    config = replace(CONFIG, resize_mode="no", skip_reencode=True)

    async def run() -> list[bytes]:
        async with decoders.Decoders(config, 2) as pool:

            async def store(data: bytes) -> bytes:
                with contextlib.suppress(FetchError):
                    return (await pool.store(io.BytesIO(data))).data
                return b""

            tasks = [asyncio.create_task(store(data)) for data in pictures]
            await asyncio.sleep(1)
            for task in tasks[50:60]:
                task.cancel()
            return [
                one if isinstance(one, bytes) else b"" for one in await asyncio.gather(*tasks, return_exceptions=True)
            ]

    stored = asyncio.run(run())
    assert all(one in {b"", data} for one, data in zip(stored, pictures, strict=True))
    assert sum(map(bool, stored)) > 90


def test_decoders_work_in_the_event_loop_of_rays_workers() -> None:
    uvloop = pytest.importorskip("uvloop")
    picture = make_picture(0, size=(96, 64))

    async def run() -> bytes:
        async with decoders.Decoders(replace(CONFIG, resize_mode="no", skip_reencode=True), 1) as pool:
            return (await pool.store(io.BytesIO(picture))).data

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == picture


def test_a_decoder_keeps_the_memory_of_a_picture_for_the_next_one() -> None:
    """Else the system clears its pages for every picture: a quarter of the time (docs/lab.md)."""
    picture = make_picture(0, size=(640, 480))

    async def faults_for_each(count: int) -> float:
        async with decoders.Decoders(replace(CONFIG, image_px=256), 1) as pool:
            [decoder] = pool._all
            assert decoder._process is not None
            stat = Path(f"/proc/{decoder._process.pid}/stat")
            for _ in range(3):
                await pool.store(io.BytesIO(picture))
            before = _page_faults(stat)
            for _ in range(count):
                await pool.store(io.BytesIO(picture))
            return (_page_faults(stat) - before) / count

    assert asyncio.run(faults_for_each(20)) < 60


def _page_faults(stat: Path) -> int:
    return int(stat.read_text().rpartition(")")[2].split()[7])


def test_a_picture_that_keeps_its_decoder_busy_is_a_row_with_a_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_LIMIT_S", 0.05)
    picture = tmp_path / "large.png"
    picture.write_bytes(_large_png())
    rows = make_rows("http://x", ["large"]).set_column(4, "url", pa.array([picture.as_uri()]))
    files = files_in(tmp_path)
    config = replace(CONFIG, max_image_area_px=1e8)
    assert download_shard(rows, "00003", config, files, AddressRules(folders=["/"]))["failed_to_resize"] == 1
    assert failure_causes([json.loads(files.stats.read_text())]) == {"killer": 1}

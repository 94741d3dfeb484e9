import asyncio
import contextlib
import errno
import hashlib
import io
import json
import os
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from pipeline.data import decoders, download, shard_writer
from pipeline.data.causes import FetchError
from pipeline.data.download import Downloader
from pipeline.data.fetch import Fetcher
from pipeline.data.resize import Resizer, StoredPicture
from pipeline.data.rows import make_uid
from pipeline.data.shard_again import join_shard, retry_shard
from pipeline.data.shard_rows import check_columns, read_rows, shard_names
from pipeline.data.shard_writer import ShardFiles, failure_causes, key_of, repeated_pictures
from pipeline.data.urls import AddressRules
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.pictures.frame import square
from pipeline.pictures.read import PictureError, decode
from pipeline.recipe.sections import SHARD_COLUMNS, DownloadConfig, DownloadResources
from tests.data.conftest import CASES, PictureServer, make_picture
from tests.data.hostile import HostileServer, dead_addresses, urls_that_never_end
from tests.tiny.pairs import write_parts
from tests.tiny.shards import download_shard

_CONFIG = DownloadConfig(
    samples_per_shard=100,
    image_px=32,
    timeout_s=1,
    deadline_s=3.5,
    max_image_area_px=1e6,
    extra_columns=("score",),
)
_NEAR = AddressRules(["127.0.0.0/8"])
_FAULTS = {
    "gone/1": ("failed_to_download", "http-404: Not Found"),
    "slow/1": ("failed_to_download", "timeout"),
    "drip/1": ("failed_to_download", "deadline"),
    "short/1": ("failed_to_download", "body-cut"),
    "noai/1": ("failed_to_download", "x-robots-tag: noai"),
    "html/1": ("failed_to_resize", "not a picture"),
    "cut/1": ("failed_to_resize", "image file is truncated"),
    "cutpng/1": ("failed_to_resize", "image file is truncated"),
    "bomb/1": ("failed_to_resize", "image area too large"),
}


def _rows(url: str, paths: Iterable[str]) -> pa.Table:
    return _rows_of([f"{url}/{path}" for path in paths])


def _rows_of(urls: Sequence[str]) -> pa.Table:
    captions = [f"picture {url.partition('//')[2].partition('/')[2]}" for url in urls]
    return pa.table(
        {
            "uid": [make_uid(*pair) for pair in zip(urls, captions, strict=True)],
            "split": ["train"] * len(urls),
            "score": [index / 4 for index in range(len(urls))],
            "caption": captions,
            "url": urls,
        }
    )


def _files(folder: Path) -> ShardFiles:
    folder.mkdir(exist_ok=True)
    return ShardFiles(folder / "00003.tar", folder / "00003.parquet", folder / "00003_stats.json")


def _download(rows: pa.Table, folder: Path, config: DownloadConfig = _CONFIG) -> tuple[ShardFiles, Counter[str]]:
    files = _files(folder)
    return files, download_shard(rows, "00003", config, files, _NEAR)


def test_download_shard_accounts_for_every_row(server: PictureServer, tmp_path: Path) -> None:
    good = [f"jpg/{i}" for i in range(12)] + [f"png/{i}" for i in range(6)]
    rows = _rows(server.url, [*good[:5], *_FAULTS, *good[5:]])
    (_, parquet, stats), counts = _download(rows, tmp_path)
    assert counts == {"in": 27, "ok": 18, "failed_to_download": 5, "failed_to_resize": 4}
    table = pq.read_table(parquet)
    assert table.column_names[:5] == ["uid", "split", "score", "caption", "url"]
    assert table.column("key").to_pylist() == [f"00003{i:02d}" for i in range(27)]
    assert table.select(rows.column_names).equals(rows)
    assert set(table.column_names) - SHARD_COLUMNS == {"uid", "split", "score"}
    table_rows = {row["url"].removeprefix(server.url + "/"): row for row in table.to_pylist()}
    for path, (status, message) in _FAULTS.items():
        assert table_rows[path]["status"] == status, path
        assert table_rows[path]["error_message"] == message, path
    causes = failure_causes([json.loads(stats.read_text())])
    assert causes.total() == 9
    assert causes["image file is truncated"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00003.parquet", "00003.tar", "00003_stats.json"]


def test_parts_of_a_shard_are_joined_if_no_row_took_workers_down(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, ["jpg/0", "gone/1", "jpg/2", "jpg/3"])
    whole, _ = _download(rows, tmp_path / "whole")
    joined, parts = _files(tmp_path / "joined"), [_files(tmp_path / name) for name in ("first", "second")]
    with Downloader(_CONFIG, _NEAR) as downloader:
        for start, part in zip((0, 2), parts, strict=True):
            downloader.download(rows.slice(start, 2), "00003", part, first=start)
    counts = join_shard(rows, "00003", parts, [], joined, _CONFIG)
    assert counts == {"in": 4, "ok": 3, "failed_to_download": 1, "failed_to_resize": 0}
    assert [file.read_bytes() for file in joined[:2]] == [file.read_bytes() for file in whole[:2]]


def test_download_shard_is_read_by_webdataset(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [f"jpg/{i}" for i in range(9)])
    (tar, _, _), _ = _download(rows, tmp_path)
    samples: list[Any] = list(wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"00003{i:02d}" for i in range(9)]
    assert [sample["txt"] for sample in samples] == rows.column("caption").to_pylist()
    assert [sample["json"]["uid"] for sample in samples] == rows.column("uid").to_pylist()
    assert {sample["jpg"].size for sample in samples} == {(32, 32)}
    assert samples[5]["json"]["score"] == 1.25


def test_download_shard_gives_the_same_bytes_again(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [*(f"jpg/{i}" for i in range(24)), "gone/2"])
    results: list[list[bytes]] = []
    for name in ("one", "two"):
        files, _ = _download(rows, tmp_path / name)
        results.append([files.tar.read_bytes(), files.parquet.read_bytes()])
    assert results[0] == results[1]


def test_download_shard_spares_a_host_and_gives_the_same_bytes(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [f"pause/{i}" for i in range(12)])
    results: list[bytes] = []
    for max_per_host in (0, 2):
        server.most.clear()
        config = replace(_CONFIG, resources=DownloadResources(max_per_host=max_per_host))
        files, counts = _download(rows, tmp_path / str(max_per_host), config)
        assert counts["ok"] == 12
        assert (server.most["127.0.0.1"] <= 2) == (max_per_host == 2)
        results.append(files.tar.read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("robots_txt", [False, True])
def test_a_crowded_host_holds_up_no_other(hostile: HostileServer, tmp_path: Path, *, robots_txt: bool) -> None:
    resources = DownloadResources(max_per_host=1, num_connections=2)
    config = replace(_CONFIG, resources=resources, robots_txt=robots_txt, tdm_reservation=False)
    crowded = [f"{hostile.url}/wait?n={number}" for number in range(12)]
    other = f"http://127.0.0.2:{hostile.port}/ok"
    with Downloader(config, _NEAR) as downloader:
        assert downloader.download(_rows_of([*crowded, other]), "00003", _files(tmp_path))["ok"] == 13
    assert hostile.times["127.0.0.2"][-1] < hostile.times["127.0.0.1"][8]


def test_download_shard_without_any_picture_is_an_empty_tar(server: PictureServer, tmp_path: Path) -> None:
    files, counts = _download(_rows(server.url, ["gone/3", "gone/4"]), tmp_path)
    assert counts["ok"] == 0
    with tarfile.open(files.tar) as tar:
        assert tar.getnames() == []


def test_download_shard_says_that_the_disk_is_full(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ((download, "_append"), (shard_writer, "_write_member")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, write)
            with pytest.raises(StepError, match=r"download: shard 00003: .*the disk is full"):
                _download(_rows(server.url, ["jpg/1", "jpg/2"]), tmp_path)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("no", (96, 64)),
        ("keep_ratio", (48, 32)),
        ("center_crop", (32, 32)),
        ("border", (32, 32)),
        ("keep_ratio_largest", (32, 21)),
    ],
)
def test_resizer_gives_every_mode_its_size(mode: Any, size: tuple[int, int]) -> None:
    picture = make_picture(0)
    stored = Resizer(replace(_CONFIG, resize_mode=mode, encode_format="png", encode_quality=1)).store(picture)
    assert _sizes(stored) == (*size, 96, 64)
    pixels = np.asarray(decode(stored.data, where="x"))
    assert pixels.shape == (*size[::-1], 3)
    if mode == "border":
        assert (pixels[:5] == 255).all()
        assert (pixels[27:] == 255).all()
        assert not (pixels[6:26] == 255).all(axis=(1, 2)).any()
    if mode == "center_crop":
        assert np.abs(pixels.astype(int) - square(decode(picture, where="x"), 32)).mean() < 3


def _sizes(stored: StoredPicture) -> tuple[int, ...]:
    return stored.width, stored.height, stored.original_width, stored.original_height


def test_resizer_keeps_small_pictures_if_configured_and_enlarges_otherwise() -> None:
    picture = make_picture(0, size=(24, 16))
    assert _sizes(Resizer(replace(_CONFIG, resize_only_if_bigger=True)).store(picture))[:2] == (24, 16)
    assert _sizes(Resizer(_CONFIG).store(picture))[:2] == (32, 32)


def test_resizer_keeps_the_bytes_of_a_plain_picture_of_the_right_size_only() -> None:
    config = replace(_CONFIG, skip_reencode=True, resize_mode="no")
    plain, lying = make_picture(0), (CASES / "lying-down.jpg").read_bytes()
    assert Resizer(config).store(plain).data == plain
    turned = Resizer(config).store(lying)
    assert turned.data != lying
    assert _sizes(turned) == (64, 96, 64, 96)
    assert Resizer(config).store(make_picture(0, kind="PNG")).data[:2] == b"\xff\xd8"
    smaller = replace(config, resize_mode="center_crop")
    assert Resizer(smaller).store(plain).data != plain


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_image_px": 65}, "image too small"),
        ({"max_aspect_ratio": 1.4}, "aspect ratio too large"),
        ({"max_image_area_px": 6143.0}, "image area too large"),
        ({"max_memory_bytes": 20_000}, "image needs too much memory"),
    ],
)
def test_resizer_refuses_what_the_recipe_refuses(change: dict[str, float], reason: str) -> None:
    with pytest.raises(PictureError) as caught:
        Resizer(replace(_CONFIG, **change)).store(make_picture(0))
    assert caught.value.reason == reason


def test_bytes_after_the_end_of_a_png_do_not_matter() -> None:
    picture = make_picture(0, kind="PNG")
    config = replace(_CONFIG, encode_format="png", encode_quality=1)
    assert Resizer(config).store(picture + b"x" * 65).data == Resizer(config).store(picture).data


def test_boxes_are_blurred_where_they_are_in_the_stored_picture() -> None:
    config = replace(_CONFIG, encode_format="png", encode_quality=1, image_px=64, blur_column="faces")
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    plain = np.asarray(decode(Resizer(config).store(buffer.getvalue()).data, where="x")).astype(int)
    box = ((0.45, 0.3, 0.55, 0.5),)  # the square is the middle half of the width
    blurred = np.asarray(decode(Resizer(config).store(buffer.getvalue(), box).data, where="x")).astype(int)
    changed = np.abs(plain - blurred).max(axis=2) > 8
    rows, columns = np.nonzero(changed)
    assert (rows.min() < 26 <= rows.max(), columns.min() < 30 <= columns.max()) == (True, True)
    assert not changed[45:].any()
    assert not changed[:, :14].any()
    outside = Resizer(config).store(buffer.getvalue(), ((0.0, 0.0, 0.2, 1.0),))
    assert np.array_equal(np.asarray(decode(outside.data, where="x")), plain)


def test_rows_have_their_boxes_and_their_checksums(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [f"jpg/{i}" for i in range(4)])
    right = hashlib.md5(make_picture(0), usedforsecurity=False).hexdigest()
    sums = [right.upper(), hashlib.sha256(make_picture(1)).hexdigest(), right, "12"]
    rows = rows.append_column("faces", pa.array([None, [[0.4, 0.4, 0.6, 0.6]], None, None]))
    rows = rows.append_column("sum", pa.array(sums))
    config = replace(_CONFIG, blur_column="faces", hash_column="sum", compute_hash="md5")
    files, counts = _download(rows, tmp_path, config)
    assert counts == {"in": 4, "ok": 2, "failed_to_download": 2, "failed_to_resize": 0}
    table = pq.read_table(files.parquet)
    assert not {"faces", "sum", "sha256"} & set(table.column_names)
    assert table.column("md5")[0].as_py() == right
    messages = table.column("error_message").to_pylist()
    assert messages[2:] == ["hash", "hash: the list's checksum is no MD5, SHA-256 or SHA-512"]
    blurred, plain = _stored(files.tar), _stored(_download(rows, tmp_path / "plain")[0].tar)
    assert blurred["0000300.jpg"] == plain["0000300.jpg"]
    assert blurred["0000301.jpg"] != plain["0000301.jpg"]


_ODD_URLS = {
    "http://h:" + "1" * 5000 + "/a.jpg": "url",
    "file:///tmp/%00x": "scheme",
    "{url}/status?code=429&after=Wed,%2021%20Oct%2099999999999999999999%2007:28:00%20GMT": "http-429",
    "{url}/ok?unforeseen": "other",
    "{url}/ok?memory": "other",
}


def test_nothing_that_a_row_brings_ends_its_shard(
    hostile: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.tdm["127.0.0.1"] = "[" * 100_000
    get = Fetcher._get

    async def get_or_raise(fetcher: Fetcher, url: Any, *arguments: Any, **options: Any) -> Any:
        if "unforeseen" in url.target or "memory" in url.target:
            raise RecursionError if "unforeseen" in url.target else MemoryError
        return await get(fetcher, url, *arguments, **options)

    monkeypatch.setattr(Fetcher, "_get", get_or_raise)
    login = f"{hostile.url}/ok?seed=2".replace("//", "//a%3Ab@")
    urls = [f"{hostile.url}/ok?seed=1", *(url.replace("{url}", hostile.url) for url in _ODD_URLS), login]
    files, counts = _download(_rows_of(urls), tmp_path)
    messages = pq.read_table(files.parquet).column("error_message").to_pylist()
    causes = [message and message.partition(":")[0] for message in messages]
    assert causes == [None, *_ODD_URLS.values(), None]
    assert messages[4:6] == ["other: RecursionError", "other: MemoryError"]
    assert counts["ok"] == 2


@pytest.mark.parametrize(
    "error", [ConfigError("no credentials"), StepError("the clock is wrong"), OSError(errno.ENOSPC, "full")]
)
def test_what_no_row_brings_ends_the_shard(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Fetcher, "fetch", fail)
    with pytest.raises(StepError if isinstance(error, OSError) else type(error)):
        _download(_rows(server.url, ["jpg/1", "jpg/2"]), tmp_path)


_BOXES = {
    None: True,
    "": True,
    "[]": True,
    "null": True,
    "[[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]": True,
    "[[-0.1, 0, 0.5, 1.02]]": True,
    "[[0.1, 0.2, 0.3]]": False,
    "[[0.1, 0.2, 0.3, NaN]]": False,
    "[[0.1, 0.2, 0.3, 1e999]]": False,
    "[[0.3, 0.2, 0.1, 0.4]]": False,
    "[[120, 30, 200, 80]]": False,
    "[0.1, 0.2, 0.3, 0.4]": False,
    '{"x": 1}': False,
    "5": False,
    "[[0.1, 0.2": False,
    "faces": False,
    "[" * 100_000: False,
    "9" * 5000: False,
}


def test_a_picture_whose_boxes_are_malformed_is_not_stored(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [f"jpg/{5000 + i}" for i in range(len(_BOXES))]).append_column(
        "faces", pa.array(list(_BOXES))
    )
    files, _ = _download(rows, tmp_path, replace(_CONFIG, blur_column="faces"))
    messages = pq.read_table(files.parquet).column("error_message").to_pylist()
    assert messages == [None if is_good else "boxes" for is_good in _BOXES.values()]
    assert not any(server.requests[f"/jpg/{5000 + i}"] for i, is_good in enumerate(_BOXES.values()) if not is_good)


def test_read_rows_reads_one_shard_of_any_parts_and_row_groups(tmp_path: Path) -> None:
    rows = _rows("http://x", [f"jpg/{i}" for i in range(250)])
    pairs = write_parts(tmp_path, [rows.slice(0, 130), rows.slice(130)])
    config = DownloadConfig(samples_per_shard=100, extra_columns=("score",))
    assert shard_names([250], 100) == ["00000", "00001", "00002"]
    parts = [read_rows(pairs, shard, config) for shard in shard_names([250], 100)]
    assert [part.num_rows for part in parts] == [100, 100, 50]
    assert pa.concat_tables(parts).equals(rows)


def test_check_columns_names_what_is_wrong() -> None:
    columns = ["uid", "url", "caption", "split"]
    with pytest.raises(DataError, match=r"pairs.parquet: no column punsafe; it has uid, url"):
        check_columns(DownloadConfig(extra_columns=("punsafe",)), columns, "pairs.parquet")


def test_extra_columns_of_any_type_are_passed_through(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, ["jpg/1"]).set_column(2, "score", pa.array([[0.5, None]]))
    files, counts = _download(rows, tmp_path)
    assert counts["ok"] == 1
    assert pq.read_table(files.parquet).column("score").to_pylist() == ["[0.5, None]"]


def _stored(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def test_shard_names_sort_beyond_five_digits() -> None:
    names = shard_names([1_000_010], 10)
    assert (names[0], names[-1]) == ("000000", "100000")
    assert names == sorted(names)
    assert shard_names([40], 20) == ["00000", "00001"]
    assert [key_of("00003", 7, size) for size in (1, 10, 11, 1000)] == ["00010", "000037", "0000307", "00003007"]


def test_one_url_with_several_captions_is_fetched_once(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, ["jpg/77"] * 5 + ["jpg/78"])
    rows = rows.set_column(3, "caption", pa.array([f"caption {i}" for i in range(6)]))
    files, counts = _download(rows, tmp_path)
    assert counts["ok"] == 6
    assert server.requests["/jpg/77"] == 1
    stored = _stored(files.tar)
    assert len({stored[f"000030{i}.jpg"] for i in range(5)}) == 1
    assert [stored[f"000030{i}.txt"].decode() for i in range(6)] == [f"caption {i}" for i in range(6)]


def test_placeholders_and_pictures_of_one_pixel_are_reported(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [*(f"jpg/5?{i}" for i in range(7)), "pixel/1", "jpg/1", "jpg/2"])
    files, counts = _download(rows, tmp_path)
    assert counts["ok"] == 10
    stats = json.loads(files.stats.read_text())
    assert stats["one_pixel"] == 1
    digest = hashlib.sha256(make_picture(5)).hexdigest()
    assert stats["repeated"] == {digest: {"urls": 7, "url": f"{server.url}/jpg/5?0"}}
    assert repeated_pictures([stats, stats])[0] == {"digest": digest, "urls": 14, "url": f"{server.url}/jpg/5?0"}


def test_a_hundred_urls_of_hosts_that_never_end_take_one_deadline(hostile: HostileServer, tmp_path: Path) -> None:
    config = replace(_CONFIG, timeout_s=2, deadline_s=3, extra_columns=())
    with dead_addresses() as port, Downloader(config, _NEAR) as downloader:
        rows = _rows_of(urls_that_never_end(hostile, port, 100)).drop_columns(["score"])
        start = time.monotonic()
        counts = downloader.download(rows, "00003", _files(tmp_path))
        assert time.monotonic() - start < config.deadline_s + 2
    assert counts == {"in": 100, "ok": 0, "failed_to_download": 100, "failed_to_resize": 0}
    assert json.loads(_files(tmp_path).stats.read_text())["status_dict"].keys() <= {"timeout", "deadline"}


def test_progress_counts_rows_and_causes_while_they_come(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PROGRESS_S", 0.1)
    readings: list[tuple[int, Counter[str]]] = []
    rows = _rows(server.url, ["jpg/1", "gone/1", "gone/2", "slow/1", "jpg/2"])
    with Downloader(_CONFIG, _NEAR) as downloader:
        downloader.download(rows, "00003", _files(tmp_path), lambda done, causes: readings.append((done, causes)))
    assert (4, {"http-404": 2}) in readings
    assert readings[-1] == (5, {"http-404": 2, "timeout": 1})


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
    rows = _rows("http://x", names).set_column(4, "url", pa.array([(tmp_path / name).as_uri() for name in names]))
    config, files = replace(_CONFIG, max_image_area_px=1e8), _files(tmp_path)
    counts = download_shard(rows, "00003", config, files, AddressRules(folders=["/"]))
    messages = pq.read_table(files.parquet).column("error_message").to_pylist()
    assert messages == [None, "killer: its decoder ended with status -9", None]
    assert counts["ok"] == 2
    assert len(set(killed)) == 2
    assert _decoders() == []


def test_a_decoder_that_ends_once_costs_no_picture() -> None:
    """All that it has is sent to the next process in the same order, so no picture loses a try to another's answer."""
    picture, config = _large_png(), replace(_CONFIG, max_image_area_px=1e8)

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
        async with decoders.Decoders(_CONFIG, 1) as pool:
            [process] = _decoders()
            process.kill()
            _is_lost.append(True)
            return await pool.store(io.BytesIO(make_picture(0)))

    _is_lost: list[bool] = []
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_or_fail)
    assert _sizes(asyncio.run(run()))[:2] == (32, 32)
    assert failures == []


def test_a_machine_that_starts_no_decoder_ends_the_step_and_fails_no_row(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_PAUSE_S", 0.01)

    async def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with Downloader(_CONFIG, _NEAR) as downloader:
        [process] = _decoders()
        process.kill()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
        with pytest.raises(StepError, match=r"does not start .*Resource temporarily unavailable"):
            downloader.download(_rows(server.url, ["jpg/1", "jpg/2"]), "00003", _files(tmp_path))


def test_a_picture_that_is_no_longer_asked_for_costs_those_beside_it_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_TRIES", 1)
    picture, config = _large_png(), replace(_CONFIG, max_image_area_px=1e8)

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
    config = replace(_CONFIG, resize_mode="no", skip_reencode=True)

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
        async with decoders.Decoders(replace(_CONFIG, resize_mode="no", skip_reencode=True), 1) as pool:
            return (await pool.store(io.BytesIO(picture))).data

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == picture


def test_a_decoder_keeps_the_memory_of_a_picture_for_the_next_one() -> None:
    """Else the system clears its pages for every picture: a quarter of the time (docs/lab.md)."""
    picture = make_picture(0, size=(640, 480))

    async def faults_for_each(count: int) -> float:
        async with decoders.Decoders(replace(_CONFIG, image_px=256), 1) as pool:
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
    rows = _rows("http://x", ["large"]).set_column(4, "url", pa.array([picture.as_uri()]))
    files = _files(tmp_path)
    config = replace(_CONFIG, max_image_area_px=1e8)
    assert download_shard(rows, "00003", config, files, AddressRules(folders=["/"]))["failed_to_resize"] == 1
    assert failure_causes([json.loads(files.stats.read_text())]) == {"killer": 1}


def test_retry_tries_failed_rows_of_a_class_and_keeps_the_rest(hostile: HostileServer, tmp_path: Path) -> None:
    paths = ["ok?seed=1", "status?code=503&times=1", "status?code=500&times=1", "missing", "ok?seed=2"]
    rows = _rows(hostile.url, paths)
    config = replace(_CONFIG, retries=0)
    with Downloader(config, _NEAR) as downloader:
        old = _files(tmp_path / "old")
        assert downloader.download(rows, "00003", old)["ok"] == 2
        hostile.requests.clear()
        (tmp_path / "new").mkdir()
        assert retry_shard(downloader, rows, old, _files(tmp_path / "none"), "http-404", lambda *_: None) is None
        none = retry_shard(downloader, rows, old, _files(tmp_path / "none"), "all", lambda *_: None, only=range(1))
        assert none is None
        assert list((tmp_path / "none").iterdir()) == []
        hostile.requests[f"127.0.0.1/{paths[1]}"] = hostile.requests[f"127.0.0.1/{paths[2]}"] = 1
        new = _files(tmp_path / "new")
        counts = retry_shard(downloader, rows, old, new, "http-5")
        assert counts is None  # a class is the whole of a status, or http
        counts = retry_shard(downloader, rows, old, new, "http-503")
        assert counts == {"in": 5, "ok": 3, "failed_to_download": 2, "failed_to_resize": 0}
        asked = {target for target, count in hostile.requests.items() if count and "robots" not in target}
        assert f"127.0.0.1/{paths[0]}" not in asked
        last = _files(tmp_path / "last")
        assert retry_shard(downloader, rows, new, last, "all") == {
            "in": 5, "ok": 4, "failed_to_download": 1, "failed_to_resize": 0,
        }  # fmt: skip
        whole = _files(tmp_path / "whole")
        downloader.download(rows, "00003", whole)
    before, after = _stored(old.tar), _stored(last.tar)
    assert {name: data for name, data in after.items() if name in before} == before
    assert last.tar.read_bytes() == whole.tar.read_bytes()
    assert last.parquet.read_bytes() == whole.parquet.read_bytes()
    with pytest.raises(DataError, match="other rows than the pairs"), Downloader(config, _NEAR) as downloader:
        retry_shard(downloader, rows.take([1, 0, 2, 3, 4]), old, new, "all")

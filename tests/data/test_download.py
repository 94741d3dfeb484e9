"""A shard from a web server that fails in the ways of the real web."""

import errno
import hashlib
import json
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.data import download, shard_writer
from pipeline.data.download import Downloader
from pipeline.data.shard_writer import failure_causes, repeated_pictures
from pipeline.errors import StepError
from pipeline.recipe.sections import SHARD_COLUMNS, DownloadResources
from tests.data.conftest import PictureServer, make_picture
from tests.data.downloading import CONFIG, NEAR, download_rows, files_in, make_rows, members_of, rows_of
from tests.data.hostile import HostileServer, dead_addresses, urls_that_never_end

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


def test_download_shard_accounts_for_every_row(server: PictureServer, tmp_path: Path) -> None:
    good = [f"jpg/{i}" for i in range(12)] + [f"png/{i}" for i in range(6)]
    rows = make_rows(server.url, [*good[:5], *_FAULTS, *good[5:]])
    (_, parquet, stats), counts = download_rows(rows, tmp_path)
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


def test_download_shard_is_read_by_webdataset(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, [f"jpg/{i}" for i in range(9)])
    (tar, _, _), _ = download_rows(rows, tmp_path)
    samples: list[Any] = list(wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"00003{i:02d}" for i in range(9)]
    assert [sample["txt"] for sample in samples] == rows.column("caption").to_pylist()
    assert [sample["json"]["uid"] for sample in samples] == rows.column("uid").to_pylist()
    assert {sample["jpg"].size for sample in samples} == {(32, 32)}
    assert samples[5]["json"]["score"] == 1.25


def test_download_shard_gives_the_same_bytes_again(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, [*(f"jpg/{i}" for i in range(24)), "gone/2"])
    results: list[list[bytes]] = []
    for name in ("one", "two"):
        files, _ = download_rows(rows, tmp_path / name)
        results.append([files.tar.read_bytes(), files.parquet.read_bytes()])
    assert results[0] == results[1]


def test_download_shard_spares_a_host_and_gives_the_same_bytes(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, [f"pause/{i}" for i in range(12)])
    results: list[bytes] = []
    for max_per_host in (0, 2):
        server.most.clear()
        config = replace(CONFIG, resources=DownloadResources(max_per_host=max_per_host))
        files, counts = download_rows(rows, tmp_path / str(max_per_host), config)
        assert counts["ok"] == 12
        assert (server.most["127.0.0.1"] <= 2) == (max_per_host == 2)
        results.append(files.tar.read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("robots_txt", [False, True])
def test_a_crowded_host_holds_up_no_other(hostile: HostileServer, tmp_path: Path, *, robots_txt: bool) -> None:
    resources = DownloadResources(max_per_host=1, num_connections=2)
    config = replace(CONFIG, resources=resources, robots_txt=robots_txt, tdm_reservation=False)
    crowded = [f"{hostile.url}/wait?n={number}" for number in range(12)]
    other = f"http://127.0.0.2:{hostile.port}/ok"
    with Downloader(config, NEAR) as downloader:
        assert downloader.download(rows_of([*crowded, other]), "00003", files_in(tmp_path))["ok"] == 13
    assert hostile.times["127.0.0.2"][-1] < hostile.times["127.0.0.1"][8]


def test_download_shard_without_any_picture_is_an_empty_tar(server: PictureServer, tmp_path: Path) -> None:
    files, counts = download_rows(make_rows(server.url, ["gone/3", "gone/4"]), tmp_path)
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
                download_rows(make_rows(server.url, ["jpg/1", "jpg/2"]), tmp_path)


def test_one_url_with_several_captions_is_fetched_once(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, ["jpg/77"] * 5 + ["jpg/78"])
    rows = rows.set_column(3, "caption", pa.array([f"caption {i}" for i in range(6)]))
    files, counts = download_rows(rows, tmp_path)
    assert counts["ok"] == 6
    assert server.requests["/jpg/77"] == 1
    stored = members_of(files.tar)
    assert len({stored[f"000030{i}.jpg"] for i in range(5)}) == 1
    assert [stored[f"000030{i}.txt"].decode() for i in range(6)] == [f"caption {i}" for i in range(6)]


def test_placeholders_and_pictures_of_one_pixel_are_reported(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, [*(f"jpg/5?{i}" for i in range(7)), "pixel/1", "jpg/1", "jpg/2"])
    files, counts = download_rows(rows, tmp_path)
    assert counts["ok"] == 10
    stats = json.loads(files.stats.read_text())
    assert stats["one_pixel"] == 1
    digest = hashlib.sha256(make_picture(5)).hexdigest()
    assert stats["repeated"] == {digest: {"urls": 7, "url": f"{server.url}/jpg/5?0"}}
    assert repeated_pictures([stats, stats])[0] == {"digest": digest, "urls": 14, "url": f"{server.url}/jpg/5?0"}


def test_a_hundred_urls_of_hosts_that_never_end_take_one_deadline(hostile: HostileServer, tmp_path: Path) -> None:
    config = replace(CONFIG, timeout_s=2, deadline_s=3, extra_columns=())
    with dead_addresses() as port, Downloader(config, NEAR) as downloader:
        rows = rows_of(urls_that_never_end(hostile, port, 100)).drop_columns(["score"])
        start = time.monotonic()
        counts = downloader.download(rows, "00003", files_in(tmp_path))
        assert time.monotonic() - start < config.deadline_s + 2
    assert counts == {"in": 100, "ok": 0, "failed_to_download": 100, "failed_to_resize": 0}
    assert json.loads(files_in(tmp_path).stats.read_text())["status_dict"].keys() <= {"timeout", "deadline"}


def test_progress_counts_rows_and_causes_while_they_come(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PROGRESS_S", 0.1)
    readings: list[tuple[int, Counter[str]]] = []
    rows = make_rows(server.url, ["jpg/1", "gone/1", "gone/2", "slow/1", "jpg/2"])
    with Downloader(CONFIG, NEAR) as downloader:
        downloader.download(rows, "00003", files_in(tmp_path), lambda done, causes: readings.append((done, causes)))
    assert (4, {"http-404": 2}) in readings
    assert readings[-1] == (5, {"http-404": 2, "timeout": 1})

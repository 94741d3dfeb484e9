"""Shards made from shards: failed rows tried again, and parts joined."""

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.data.download import Downloader
from pipeline.data.shard_again import join_shard, retry_shard
from pipeline.data.shard_writer import ShardFiles
from pipeline.errors import DataError
from tests.data.conftest import PictureServer
from tests.data.downloading import CONFIG, NEAR, download_rows, files_in, make_rows, members_of
from tests.data.hostile import HostileServer


def test_parts_of_a_shard_are_joined_if_no_row_took_workers_down(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, ["jpg/0", "gone/1", "jpg/2", "jpg/3"])
    whole, _ = download_rows(rows, tmp_path / "whole")
    joined, parts = files_in(tmp_path / "joined"), [files_in(tmp_path / name) for name in ("first", "second", "empty")]
    with Downloader(CONFIG, NEAR) as downloader:
        for start, part in zip((0, 2, 4), parts, strict=True):
            downloader.download(rows.slice(start, 2), "00003", part, lambda *_: None, first=start)
    counts = join_shard(rows, "00003", parts, [], joined, CONFIG)
    assert counts == {"in": 4, "ok": 3, "failed_to_download": 1, "failed_to_resize": 0}
    assert [file.read_bytes() for file in joined[:2]] == [file.read_bytes() for file in whole[:2]]


_PATHS = ["ok?seed=1", "status?code=503&times=1", "status?code=500&times=1", "missing", "ok?seed=2"]
"""Two good pictures, two that come the second time, and none."""


@dataclass
class _Shard:
    downloader: Downloader
    rows: pa.Table
    old: ShardFiles
    new: ShardFiles
    """In an empty folder."""

    def retry(self, failed_class: str, **options: Any) -> Counter[str] | None:
        return retry_shard(self.downloader, self.rows, self.old, self.new, failed_class, **options)


@pytest.fixture
def shard(hostile: HostileServer, tmp_path: Path) -> Generator[_Shard]:
    """A shard with two good rows of five, and the downloader for the next try."""
    rows = make_rows(hostile.url, _PATHS)
    with Downloader(replace(CONFIG, retries=0), NEAR) as downloader:
        shard = _Shard(downloader, rows, files_in(tmp_path / "old"), files_in(tmp_path / "new"))
        assert downloader.download(rows, "00003", shard.old)["ok"] == 2
        yield shard


def test_a_retry_through_which_no_row_comes_writes_nothing(shard: _Shard) -> None:
    assert shard.retry("http-404") is None
    assert list(shard.new.tar.parent.iterdir()) == []


def test_a_retry_asks_for_the_rows_of_its_class_alone(shard: _Shard, hostile: HostileServer) -> None:
    assert shard.retry("http-503") == {"in": 5, "ok": 3, "failed_to_download": 2, "failed_to_resize": 0}
    assert [hostile.requests[f"127.0.0.1/{path}"] for path in _PATHS] == [1, 2, 1, 1, 1]


def test_a_class_of_a_retry_is_the_whole_of_a_status(shard: _Shard) -> None:
    assert shard.retry("http-5") is None


def test_a_retry_of_some_rows_asks_for_no_other(shard: _Shard, hostile: HostileServer) -> None:
    assert shard.retry("all", only=range(1)) is None
    assert shard.retry("all", only=range(2, 3)) == {"in": 5, "ok": 3, "failed_to_download": 2, "failed_to_resize": 0}
    assert [hostile.requests[f"127.0.0.1/{path}"] for path in _PATHS] == [1, 1, 2, 1, 1]


def test_the_progress_of_a_retry_counts_the_rows_that_are_kept(shard: _Shard) -> None:
    readings: list[tuple[int, Counter[str]]] = []
    shard.retry("http-404", on_progress=lambda done, causes: readings.append((done, causes)))
    assert readings[-1] == (5, {"http-404": 1})


def test_a_shard_after_its_retries_is_the_one_of_a_whole_download(shard: _Shard, tmp_path: Path) -> None:
    last, whole = files_in(tmp_path / "last"), files_in(tmp_path / "whole")
    shard.retry("http-503")
    counts = retry_shard(shard.downloader, shard.rows, shard.new, last, "all")
    assert counts == {"in": 5, "ok": 4, "failed_to_download": 1, "failed_to_resize": 0}
    shard.downloader.download(shard.rows, "00003", whole)
    before, after = members_of(shard.old.tar), members_of(last.tar)
    assert {name: data for name, data in after.items() if name in before} == before
    assert [file.read_bytes() for file in last[:2]] == [file.read_bytes() for file in whole[:2]]


def test_a_retry_refuses_a_shard_of_other_rows(shard: _Shard) -> None:
    others = shard.rows.take([1, 0, 2, 3, 4])
    with pytest.raises(DataError, match="other rows than the pairs"):
        retry_shard(shard.downloader, others, shard.old, shard.new, "all")

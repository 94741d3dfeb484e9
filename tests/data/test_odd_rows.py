"""Rows with boxes and checksums, and with what no row should have: none ends its shard."""

import errno
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.fetch import Fetcher
from pipeline.errors import ConfigError, StepError
from tests.data.conftest import PictureServer, make_picture
from tests.data.downloading import CONFIG, download_rows, make_rows, members_of, rows_of
from tests.data.hostile import HostileServer


def test_rows_have_their_boxes_and_their_checksums(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, [f"jpg/{i}" for i in range(4)])
    right = hashlib.md5(make_picture(0), usedforsecurity=False).hexdigest()
    sums = [right.upper(), hashlib.sha256(make_picture(1)).hexdigest(), right, "12"]
    rows = rows.append_column("faces", pa.array([None, [[0.4, 0.4, 0.6, 0.6]], None, None]))
    rows = rows.append_column("sum", pa.array(sums))
    config = replace(CONFIG, blur_column="faces", hash_column="sum", compute_hash="md5")
    files, counts = download_rows(rows, tmp_path, config)
    assert counts == {"in": 4, "ok": 2, "failed_to_download": 2, "failed_to_resize": 0}
    table = pq.read_table(files.parquet)
    assert not {"faces", "sum", "sha256"} & set(table.column_names)
    assert table.column("md5")[0].as_py() == right
    messages = table.column("error_message").to_pylist()
    assert messages[2:] == ["hash", "hash: the list's checksum is no MD5, SHA-256 or SHA-512"]
    blurred, plain = members_of(files.tar), members_of(download_rows(rows, tmp_path / "plain")[0].tar)
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
    files, counts = download_rows(rows_of(urls), tmp_path)
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
        download_rows(make_rows(server.url, ["jpg/1", "jpg/2"]), tmp_path)


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
    rows = make_rows(server.url, [f"jpg/{5000 + i}" for i in range(len(_BOXES))]).append_column(
        "faces", pa.array(list(_BOXES))
    )
    files, _ = download_rows(rows, tmp_path, replace(CONFIG, blur_column="faces"))
    messages = pq.read_table(files.parquet).column("error_message").to_pylist()
    assert messages == [None if is_good else "boxes" for is_good in _BOXES.values()]
    assert not any(server.requests[f"/jpg/{5000 + i}"] for i, is_good in enumerate(_BOXES.values()) if not is_good)

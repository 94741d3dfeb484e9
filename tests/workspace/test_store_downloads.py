"""Downloads of pictures that are in an object store: requests, faults, deadlines, and what may be read."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from pipeline.data.download import Downloader, address_rules
from pipeline.data.rows import make_uid
from pipeline.data.shard_writer import ShardFiles
from pipeline.errors import ConfigError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.sections import DownloadConfig
from tests.data.conftest import make_picture
from tests.s3_server import S3Server
from tests.tiny.strange_folder import PICTURES, fetch, put, put_here, strange_files
from tests.workspace.conftest import use

pc: Any = pyarrow.compute  # its functions are made when it is imported
_CONFIG = DownloadConfig(image_px=32, retries=1)


def _download(folder: str, out: Path, urls: list[str], config: DownloadConfig = _CONFIG) -> dict[str, str]:
    """What became of each URL in a download of a recipe with this folder."""
    names = [url.rpartition("/")[2] for url in urls]
    columns = {
        "uid": [make_uid(url, "") for url in urls],
        "split": ["train"] * len(urls),
        "caption": names,
        "url": urls,
    }
    rules = address_rules(PairsConfig(source="folder", path=folder), config)
    out.mkdir()
    files = ShardFiles(out / "00000.tar", out / "00000.parquet", out / "00000_stats.json")
    with Downloader(config, rules) as downloader:
        downloader.download(pa.table(columns), "00000", files)
    rows = pq.read_table(files.parquet, columns=["url", "status", "error_message"]).to_pylist()
    return {row["url"]: row["error_message"] or row["status"] for row in rows}


def test_pictures_of_a_store_are_read_once_each_and_faults_are_labelled(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    good = {name: content for name, content in strange_files().items() if name in PICTURES}
    faults = {
        "corrupt.jpg": b"no picture",
        "empty.jpg": b"",
        "cut.jpg": make_picture(1)[:-600],
        "large.jpg": bytes(99_999),
    }
    files, folder = good | faults, f"{bucket}/my pictures"
    put(folder, files)
    put(f"{bucket}/my pictures 2", {"1.jpg": make_picture(1)})
    put_here(tmp_path / "here", files)
    config = replace(_CONFIG, max_body_bytes=90_000)
    names = [*files, "missing.jpg"]
    outside = [f"{bucket}/my pictures 2/1.jpg", f"{folder}/../my pictures 2/1.jpg", "s3://other/1.jpg", "gs://b/1.jpg"]
    s3_server.counted()
    there = _download(folder, tmp_path / "1", [f"{folder}/{name}" for name in names] + outside, config)
    requests = s3_server.counted()
    assert {request.kind for request in requests} == {"GET"}
    assert len(requests) == len({request.name for request in requests}) == len(names)
    local = [(tmp_path / "here" / name).as_uri() for name in names]
    here = _download(str(tmp_path / "here"), tmp_path / "2", local, config)
    of_files = [there[f"{folder}/{name}"] for name in names]
    assert of_files == [here[url] for url in local]
    assert of_files == [
        *["success"] * len(good),
        *["not a picture", "not a picture", "image file is truncated", "body-size", "file: No such file or directory"],
    ]
    assert [there[url].partition(":")[0] for url in outside] == ["scheme"] * 4
    tables = [
        pq.read_table(tmp_path / f"{number}/00000.parquet").filter(pc.field("status") == "success") for number in (1, 2)
    ]
    assert tables[0].column("sha256").to_pylist() == tables[1].column("sha256").to_pylist()


@pytest.mark.parametrize(
    ("kind", "cause", "requests"),
    # aiohttp asks again by itself when a connection is closed before an answer
    [("500", "http-500", 1), ("throttled", "http-503", 1), ("reset", "lost", 2), ("half", "body-cut", 1)],
)
def test_a_store_is_asked_as_often_as_the_recipe_says(
    kind: str, cause: str, requests: int, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")  # a driver has its own idea
    put(f"{bucket}/folder", {"1.jpg": b"content"})
    for retries, faults, result in [(0, 1, cause), (1, 2, cause), (1, 1, b"content")]:
        s3_server.fail(kind, "GET", "1.jpg", times=faults * requests)
        s3_server.counted()
        assert asyncio.run(fetch(f"{bucket}/folder/1.jpg", replace(_CONFIG, retries=retries))) == result
        assert len(s3_server.counted()) == faults * requests + (faults <= retries)


@pytest.mark.parametrize(("limits", "cause"), [({"timeout_s": 1}, "timeout"), ({"deadline_s": 0.7}, "deadline")])
def test_a_store_that_is_slow_costs_a_picture_its_deadline_and_no_more(
    limits: dict[str, Any], cause: str, bucket: str, s3_server: S3Server
) -> None:
    put(f"{bucket}/folder", {"1.jpg": b"content"})
    s3_server.fail("slow", "GET", "1.jpg", seconds=4.0)
    start = time.monotonic()
    assert asyncio.run(fetch(f"{bucket}/folder/1.jpg", replace(_CONFIG, retries=0, **limits))) == cause
    assert time.monotonic() - start < 3.5


def test_a_download_without_credentials_ends_with_one_sentence(
    bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{bucket}/folder", {"1.jpg": make_picture(1)})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    use({"AWS_ENDPOINT_URL": s3_server.endpoint}, monkeypatch)
    with pytest.raises(ConfigError, match=r"/folder: no access .*AWS_ACCESS_KEY_ID"):
        _download(f"{bucket}/folder", tmp_path / "out", [f"{bucket}/folder/1.jpg"])


def test_a_list_names_files_of_a_store_only_in_folders_that_are_allowed(bucket: str, tmp_path: Path) -> None:
    put(bucket, {"a/1.jpg": make_picture(1), "b/1.jpg": make_picture(1)})
    urls = [f"{bucket}/a/1.jpg", f"{bucket}/b/1.jpg"]
    results: list[list[str]] = []
    for number, allowed in enumerate([(), (f"{bucket}/a",)]):
        results.append(
            list(
                _download(
                    str(tmp_path), tmp_path / str(number), urls, replace(_CONFIG, allowed_folders=allowed)
                ).values()
            )
        )
    assert results[0] == ["scheme: s3: URLs are not fetched"] * 2
    assert results[1][0] == "success"
    assert results[1][1].startswith("scheme: s3: URLs are not fetched outside of the folders")

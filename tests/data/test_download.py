import errno
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.data import download
from pipeline.data.download import PictureResizer, check_columns, download_shard, failure_causes, read_rows, shard_names
from pipeline.data.rows import make_uid
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.pictures import decode, square
from pipeline.recipe.sections import DownloadConfig, DownloadResources
from tests.data.conftest import CASES, PictureServer, make_picture

_CONFIG = DownloadConfig(
    samples_per_shard=100,
    image_px=32,
    timeout_s=1,
    deadline_s=1.5,
    num_threads=8,
    max_image_area_px=1e6,
    extra_columns=("score",),
)
_FAULTS = {
    "gone/1": ("failed_to_download", "HTTP Error 404: Not Found"),
    "slow/1": ("failed_to_download", "timed out"),
    "drip/1": ("failed_to_download", "too slow: not finished by its deadline"),
    "short/1": ("failed_to_download", "IncompleteRead"),
    "noai/1": ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive"),
    "html/1": ("failed_to_resize", "not a picture"),
    "cut/1": ("failed_to_resize", "image file is truncated"),
    "cutpng/1": ("failed_to_resize", "image file is truncated"),
    "bomb/1": ("failed_to_resize", "image area too large"),
}


def _rows(url: str, paths: Iterable[str]) -> pa.Table:
    urls = [f"{url}/{path}" for path in paths]
    captions = [f"picture {path}" for path in paths]
    return pa.table(
        {
            "uid": [make_uid(*pair) for pair in zip(urls, captions, strict=True)],
            "split": ["train"] * len(urls),
            "score": [index / 4 for index in range(len(urls))],
            "caption": captions,
            "url": urls,
        }
    )


def _files(folder: Path) -> tuple[Path, Path, Path]:
    folder.mkdir(exist_ok=True)
    return folder / "00003.tar", folder / "00003.parquet", folder / "00003_stats.json"


def test_download_shard_accounts_for_every_row(server: PictureServer, tmp_path: Path) -> None:
    good = [f"jpg/{i}" for i in range(12)] + [f"png/{i}" for i in range(6)]
    rows = _rows(server.url, [*good[:5], *_FAULTS, *good[5:]])
    tar, parquet, stats = _files(tmp_path)
    counts = download_shard(rows, "00003", _CONFIG, tar, parquet, stats)
    assert counts == {"in": 27, "ok": 18, "failed_to_download": 5, "failed_to_resize": 4}
    table = pq.read_table(parquet)
    assert table.column_names[:5] == ["uid", "split", "score", "caption", "url"]
    assert table.column("key").to_pylist() == [f"00003{i:02d}" for i in range(27)]
    assert table.select(rows.column_names).equals(rows)
    table_rows = {row["url"].removeprefix(server.url + "/"): row for row in table.to_pylist()}
    for path, (status, message) in _FAULTS.items():
        assert table_rows[path]["status"] == status, path
        assert table_rows[path]["error_message"].startswith(message), (path, table_rows[path]["error_message"])
    causes = failure_causes([json.loads(stats.read_text())])
    assert causes.total() == 9
    assert causes["image file is truncated"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00003.parquet", "00003.tar", "00003_stats.json"]


def test_download_shard_is_read_by_webdataset(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [f"jpg/{i}" for i in range(9)])
    tar, parquet, stats = _files(tmp_path)
    download_shard(rows, "00003", _CONFIG, tar, parquet, stats)
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
        files = _files(tmp_path / name)
        download_shard(rows, "00003", _CONFIG, *files)
        results.append([path.read_bytes() for path in files[:2]])
    assert results[0] == results[1]


def test_download_shard_spares_a_host_and_gives_the_same_bytes(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, [f"pause/{i}" for i in range(12)])
    results: list[bytes] = []
    for max_per_host in (0, 2):
        server.most.clear()
        files = _files(tmp_path / str(max_per_host))
        config = replace(_CONFIG, resources=DownloadResources(max_per_host=max_per_host))
        assert download_shard(rows, "00003", config, *files)["ok"] == 12
        assert (server.most["127.0.0.1"] <= 2) == (max_per_host == 2)
        results.append(files[0].read_bytes())
    assert results[0] == results[1]


def test_download_shard_follows_file_urls(server: PictureServer, tmp_path: Path) -> None:
    picture = tmp_path / "a picture.jpg"
    picture.write_bytes(download.__file__.encode())
    rows = _rows(server.url, ["jpg/1"])
    rows = rows.set_column(4, "url", pa.array([picture.as_uri()]))
    counts = download_shard(rows, "00003", _CONFIG, *_files(tmp_path / "out"))
    assert counts["failed_to_resize"] == 1  # it was fetched, but it is not a picture


def test_download_shard_without_any_picture_is_an_empty_tar(server: PictureServer, tmp_path: Path) -> None:
    files = _files(tmp_path)
    counts = download_shard(_rows(server.url, ["gone/3", "gone/4"]), "00003", _CONFIG, *files)
    assert counts["ok"] == 0
    with tarfile.open(files[0]) as tar:
        assert tar.getnames() == []


def test_download_shard_says_that_the_disk_is_full(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.WebDatasetSampleWriter, "write", write)
    with pytest.raises(StepError, match=r"download: shard 00003: .*the disk is full"):
        download_shard(_rows(server.url, ["jpg/1", "jpg/2"]), "00003", _CONFIG, *_files(tmp_path))
    assert list(tmp_path.iterdir()) == []


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
    resize = PictureResizer(replace(_CONFIG, resize_mode=mode, encode_format="png", encode_quality=1))
    data, *sizes, error = resize(io.BytesIO(picture))
    assert error is None
    assert sizes == [*size, 96, 64]
    pixels = np.asarray(decode(data, where="x"))
    assert pixels.shape == (*size[::-1], 3)
    if mode == "border":
        assert (pixels[:5] == 255).all()
        assert (pixels[27:] == 255).all()
        assert not (pixels[6:26] == 255).all(axis=(1, 2)).any()
    if mode == "center_crop":
        assert np.array_equal(pixels, square(decode(picture, where="x"), 32))


def test_resizer_keeps_small_pictures_if_configured_and_enlarges_otherwise() -> None:
    picture = make_picture(0, size=(24, 16))
    small = PictureResizer(replace(_CONFIG, resize_only_if_bigger=True))(io.BytesIO(picture))
    assert small[1:3] == (24, 16)
    assert PictureResizer(_CONFIG)(io.BytesIO(picture))[1:3] == (32, 32)


def test_resizer_keeps_the_bytes_of_a_plain_picture_of_the_right_size_only() -> None:
    config = replace(_CONFIG, skip_reencode=True, resize_mode="no")
    plain, lying = make_picture(0), (CASES / "lying-down.jpg").read_bytes()
    assert PictureResizer(config)(io.BytesIO(plain))[0] == plain
    turned = PictureResizer(config)(io.BytesIO(lying))
    assert turned[0] != lying
    assert turned[1:5] == (64, 96, 64, 96)
    assert PictureResizer(config)(io.BytesIO(make_picture(0, kind="PNG")))[0][:2] == b"\xff\xd8"
    smaller = replace(config, resize_mode="center_crop")
    assert PictureResizer(smaller)(io.BytesIO(plain))[0] != plain


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_image_px": 65}, "image too small"),
        ({"max_aspect_ratio": 1.4}, "aspect ratio too large"),
        ({"max_image_area_px": 6143.0}, "image area too large"),
    ],
)
def test_resizer_refuses_what_the_recipe_refuses(change: dict[str, float], reason: str) -> None:
    resize = PictureResizer(replace(_CONFIG, **change))
    assert resize(io.BytesIO(make_picture(0))) == (None, None, None, None, None, reason)


def test_read_rows_reads_one_shard_of_any_row_groups(tmp_path: Path) -> None:
    rows = _rows("http://x", [f"jpg/{i}" for i in range(250)])
    path = tmp_path / "pairs.parquet"
    pq.write_table(rows, path, row_group_size=70)
    config = DownloadConfig(samples_per_shard=100, extra_columns=("score",))
    assert shard_names(250, 100) == ["00000", "00001", "00002"]
    parts = [read_rows(path, shard, config) for shard in shard_names(250, 100)]
    assert [part.num_rows for part in parts] == [100, 100, 50]
    assert pa.concat_tables(parts).equals(rows)


def test_check_columns_names_what_is_wrong() -> None:
    columns = ["uid", "url", "caption", "split", "sha256"]
    with pytest.raises(DataError, match=r"pairs.parquet: no column punsafe; it has uid, url"):
        check_columns(DownloadConfig(extra_columns=("punsafe",)), columns, "pairs.parquet")
    with pytest.raises(ConfigError, match=r"download.extra_columns: .*sha256"):
        check_columns(DownloadConfig(extra_columns=("sha256",)), columns, "pairs.parquet")


def test_extra_columns_of_any_type_are_passed_through(server: PictureServer, tmp_path: Path) -> None:
    rows = _rows(server.url, ["jpg/1"]).set_column(2, "score", pa.array([[0.5, None]]))
    files = _files(tmp_path)
    assert download_shard(rows, "00003", _CONFIG, *files)["ok"] == 1
    assert pq.read_table(files[1]).column("score").to_pylist() == ["[0.5, None]"]

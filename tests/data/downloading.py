"""Shards that are downloaded from the servers of these tests."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.data.resize import StoredPicture
from pipeline.data.rows import make_uid
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadConfig
from tests.tiny.shards import download_shard

CONFIG = DownloadConfig(
    samples_per_shard=100,
    image_px=32,
    timeout_s=1,
    deadline_s=3.5,
    max_image_area_px=1e6,
    extra_columns=("score",),
)
NEAR = AddressRules(["127.0.0.0/8"])


def make_rows(url: str, paths: Iterable[str]) -> pa.Table:
    """Pairs whose pictures are at paths of a server."""
    return rows_of([f"{url}/{path}" for path in paths])


def rows_of(urls: Sequence[str]) -> pa.Table:
    """Pairs with these URLs; the caption says the path."""
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


def files_in(folder: Path) -> ShardFiles:
    """The files of a shard in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    return ShardFiles(folder / "00003.tar", folder / "00003.parquet", folder / "00003_stats.json")


def download_rows(rows: pa.Table, folder: Path, config: DownloadConfig = CONFIG) -> tuple[ShardFiles, Counter[str]]:
    """A shard of these rows in a folder, and the numbers of its rows."""
    files = files_in(folder)
    return files, download_shard(rows, "00003", config, files, NEAR)


def members_of(tar: Path) -> dict[str, bytes]:
    """What a tar holds, by name."""
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def sizes_of(stored: StoredPicture) -> tuple[int, ...]:
    """Width and height as stored, then as in the file, in pixels."""
    return stored.width, stored.height, stored.original_width, stored.original_height

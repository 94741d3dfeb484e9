"""Tiny committed shards of pictures and of embeddings, without a download and without Ray."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.download import Downloader
from pipeline.data.rows import embeddings_schema, make_uid
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.urls import AddressRules
from pipeline.data.vectors import to_arrow, write_embeddings
from pipeline.pictures.png import to_png
from pipeline.recipe.sections import DownloadConfig
from pipeline.shapes.captions import training_caption
from pipeline.shapes.draw import draw
from pipeline.shapes.scene import training_scene
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

EMBED_DIM = 16


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one pair."""

    url: str
    caption: str
    picture: bytes | None
    """A file; None if the download failed."""
    split: str = "train"
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the shard's table."""


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], layout: int = tarfile.USTAR_FORMAT) -> None:
    """Write a tar of (name, data)."""
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shard(
    download: Artifact, shard: str, samples: Iterable[Sample], suffix: str, *, digits: int = 2
) -> tuple[Path, Path]:
    """Commit (tar, parquet) in img2dataset's layout; ``suffix`` is that of the pictures."""
    rows: list[dict[str, Any]] = []
    members: list[tuple[str, bytes]] = []
    for number, sample in enumerate(samples):
        row = {"uid": make_uid(sample.url, sample.caption), "url": sample.url, "caption": sample.caption}
        row |= {"split": sample.split, "key": f"{shard}{number:0{digits}d}"}
        row["status"] = "failed_to_download" if sample.picture is None else "success"
        rows.append(row | sample.columns)
        if sample.picture is not None:
            files = {suffix: sample.picture, "json": json.dumps(row).encode(), "txt": sample.caption.encode()}
            members += [(f"{row['key']}.{name}", data) for name, data in files.items()]
    with download.write(f"{shard}.tar") as path:
        write_tar(path, members)
    with download.write(f"{shard}.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    num_ok = len(members) // 3
    counts = {"in": len(rows), "ok": num_ok, "failed_to_download": len(rows) - num_ok}
    download.commit_shard(ShardRecord(shard=shard, counts=counts, files={}))
    return download.path(f"{shard}.tar"), download.path(f"{shard}.parquet")


def download_shard(
    rows: pa.Table, shard: str, config: DownloadConfig, files: ShardFiles, rules: AddressRules
) -> Counter[str]:
    """Download one shard by a downloader of its own; returns the numbers of its rows."""
    with Downloader(config, rules) as downloader:
        return downloader.download(rows, shard, files)


def noisy_shard(
    folder: Path, shard: str = "00000", *, num_rows: int = 6, failed: tuple[int, ...] = (2,)
) -> tuple[Path, Path]:
    """A shard of noisy JPEG files, not all square; rows of ``failed`` have no picture."""
    samples = (
        Sample(
            f"http://a/{shard}/{number}.jpg",
            f"caption {number}",
            None if number in failed else make_jpeg(number, size=(32, 32 + number % 3)),
        )
        for number in range(num_rows)
    )
    return write_shard(Artifact(str(folder)), shard, samples, "jpg")


def drawn_sample(number: int, *, seed: int = 0, is_validation: bool = False, failed: bool = False) -> Sample:
    """One drawn pair of the demo, 32 px."""
    scene = training_scene(seed, number)
    picture = None if failed else to_png(draw(scene, 32))
    split = "validation" if is_validation else "train"
    return Sample(f"http://127.0.0.1/{number}.png", training_caption(scene, seed, number), picture, split)


def write_download(folder: Path, *, num_shards: int = 2, num_rows: int = 12) -> Artifact:
    """Shards of drawn pairs; every fourth row failed to download, and every sixth is for validation."""
    artifact = Artifact(str(folder))
    for shard in range(num_shards):
        samples = (
            drawn_sample(shard * num_rows + i, is_validation=i % 6 == 5, failed=i % 4 == 3) for i in range(num_rows)
        )
        write_shard(artifact, f"{shard:05d}", samples, "png")
    return artifact


def write_embed(folder: Path, download: Artifact) -> Artifact:
    """Random embeddings of length one for the pictures of ``download``."""
    artifact = Artifact(str(folder))
    for name in download.shard_records():
        rows = [r for r in pq.read_table(download.path(f"{name}.parquet")).to_pylist() if r["status"] == "success"]
        vectors = np.random.default_rng(int(name)).standard_normal((2, len(rows), EMBED_DIM))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        write_vectors(artifact, name, rows, *vectors.astype(np.float16))
    return artifact


def make_embeddings(
    artifact: Artifact,
    z_image: NDArray[np.float32],
    z_text: NDArray[np.float32],
    rows_per_shard: int,
    *,
    first: int = 0,
    held_out_every: int = 0,
) -> None:
    """Commit shards of embeddings; captions and urls are ``caption N`` and ``http://a/N``, from N = ``first`` on.

    Rows are of the split train, but those whose number ``held_out_every`` divides.
    """
    for start in range(0, len(z_image), rows_per_shard):
        part = slice(start, start + rows_per_shard)
        shard = f"{start // rows_per_shard:05d}"
        rows = [
            {
                "uid": make_uid(f"http://a/{first + i}", f"caption {first + i}"),
                "key": f"{shard}{i - start:05d}",
                "url": f"http://a/{first + i}",
                "caption": f"caption {first + i}",
                "split": "validation" if held_out_every and i % held_out_every == 0 else "train",
            }
            for i in range(start, start + len(z_image[part]))
        ]
        write_vectors(artifact, shard, rows, z_image[part], z_text[part])


def write_vectors(
    artifact: Artifact, shard: str, rows: Sequence[dict[str, Any]], z_image: NDArray[Any], z_text: NDArray[Any]
) -> None:
    """Commit one shard of embeddings (N, D)."""
    columns = {name: [row[name] for row in rows] for name in ("uid", "key", "url", "caption", "split")}
    columns |= {"clip_score": (z_image.astype(np.float32) * z_text.astype(np.float32)).sum(1)}
    columns |= {"z_image": to_arrow(z_image), "z_text": to_arrow(z_text)}
    with artifact.write(f"{shard}.parquet") as path:
        schema = embeddings_schema(z_image.shape[1])
        write_embeddings([pa.table(columns, schema=schema)], path, schema)
    files = {f"{shard}.parquet": artifact.describe(f"{shard}.parquet")}
    artifact.commit_shard(ShardRecord(shard=shard, counts={"in": len(rows), "ok": len(rows)}, files=files))


def make_jpeg(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """A noisy picture."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def plain_picture(colour: str, side_px: int = 32, kind: str = "PNG") -> bytes:
    """A picture of one colour, as the bytes of a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(buffer, kind)
    return buffer.getvalue()


def pixels(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a picture file, (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))

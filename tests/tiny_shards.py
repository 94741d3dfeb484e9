"""Tiny committed artifacts of the data steps, without a download and without Ray."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from models.clip_config import ClipConfig
from pipeline.clip import create_clip, save_clip
from pipeline.data.rows import embeddings_schema, make_uid
from pipeline.data.vectors import ROW_GROUP_ROWS, to_arrow
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

TINY_CLIP = ClipConfig(
    embed_dim=16, image_px=32, vision_width=8, text_width=16, text_heads=2, text_layers=1, context_length=16
)


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP with random weights, saved."""
    torch.manual_seed(seed)
    save_clip(create_clip(TINY_CLIP), folder)
    return folder


def make_shard(
    folder: Path, shard: str = "00000", *, num_rows: int = 6, failed: tuple[int, ...] = (2,), size: int = 32
) -> tuple[Path, Path]:
    """(tar, parquet) of a shard in img2dataset's layout; rows of ``failed`` have no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    tar, parquet = folder / f"{shard}.tar", folder / f"{shard}.parquet"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(num_rows):
            url, caption = f"http://a/{shard}/{index}.jpg", f"caption {index}"
            row = {"uid": make_uid(url, caption), "url": url, "caption": caption, "split": "train"}
            row |= {"key": f"{shard}{index:02d}", "status": "failed_to_download" if index in failed else "success"}
            rows.append(row)
            if index not in failed:
                picture = make_jpeg(index, size=(size, size + index % 3))
                for name, data in (("jpg", picture), ("json", json.dumps(row).encode()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{row['key']}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    return tar, parquet


def make_jpeg(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """A noisy picture."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def make_embeddings(
    artifact: Artifact, z_image: NDArray[np.float32], z_text: NDArray[np.float32], rows_per_shard: int
) -> None:
    """Commit shards of embeddings; captions and urls are ``caption N`` and ``http://a/N``."""
    for start in range(0, len(z_image), rows_per_shard):
        shard, stop = f"{start // rows_per_shard:05d}", min(start + rows_per_shard, len(z_image))
        numbers = range(start, stop)
        columns = {
            "uid": [make_uid(f"http://a/{i}", f"caption {i}") for i in numbers],
            "key": [f"{shard}{i - start:05d}" for i in numbers],
            "url": [f"http://a/{i}" for i in numbers],
            "caption": [f"caption {i}" for i in numbers],
            "split": ["train" for _ in numbers],
            "z_image": to_arrow(z_image[start:stop]),
            "z_text": to_arrow(z_text[start:stop]),
        }
        with artifact.write(f"{shard}.parquet") as path:
            table = pa.table(columns, schema=embeddings_schema(z_image.shape[1]))
            pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, compression="none", use_dictionary=False)
        files = {f"{shard}.parquet": artifact.describe(f"{shard}.parquet")}
        artifact.commit_shard(ShardRecord(shard=shard, counts={"in": stop - start, "ok": stop - start}, files=files))

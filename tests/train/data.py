"""Committed shards in img2dataset's layout, and embeddings, for tests: tiny and real."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.rows import embeddings_schema, make_uid
from pipeline.shapes.captions import training_caption
from pipeline.shapes.draw import draw, encode
from pipeline.shapes.scene import training_scene
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

IMAGE_PX = 32
EMBED_DIM = 16


def rows_of(shard: int, num_rows: int) -> list[dict[str, str]]:
    rows = []
    for i in range(num_rows):
        number = shard * num_rows + i
        scene = training_scene(0, number)
        caption, url = training_caption(scene, 0, number), f"http://127.0.0.1/{number}.png"
        split = "validation" if i % 6 == 5 else "train"
        rows.append(
            {
                "uid": make_uid(url, caption),
                "url": url,
                "caption": caption,
                "split": split,
                "key": f"{shard:05d}{i:02d}",
            }
        )
    return rows


def write_download(folder: Path, *, num_shards: int = 2, num_rows: int = 12) -> Artifact:
    """Every fourth row failed to download."""
    artifact = Artifact(str(folder))
    for shard in range(num_shards):
        name, rows = f"{shard:05d}", rows_of(shard, num_rows)
        with artifact.write(f"{name}.tar") as path, tarfile.open(path, "w") as tar:
            for i, row in enumerate(rows):
                if i % 4 == 3:
                    row["status"] = "failed_to_download"
                    continue
                row["status"] = "success"
                picture = encode(draw(training_scene(0, shard * num_rows + i), IMAGE_PX))
                members = {"png": picture, "json": json.dumps(row).encode(), "txt": row["caption"].encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{row['key']}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with artifact.write(f"{name}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows), path)
        ok = sum(row["status"] == "success" for row in rows)
        counts = {"in": num_rows, "ok": ok, "failed_to_download": num_rows - ok}
        artifact.commit_shard(ShardRecord(shard=name, counts=counts, files={}))
    return artifact


def write_embed(folder: Path, download: Artifact) -> Artifact:
    artifact = Artifact(str(folder))
    for name in download.shard_records():
        rows = [r for r in pq.read_table(download.path(f"{name}.parquet")).to_pylist() if r["status"] == "success"]
        rng = np.random.default_rng(int(name))
        vectors = rng.standard_normal((2, len(rows), EMBED_DIM))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        for row, z_image, z_text in zip(rows, *vectors.astype(np.float16), strict=True):
            row |= {"z_image": z_image, "z_text": z_text}
            del row["status"]
        with artifact.write(f"{name}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows, schema=embeddings_schema(EMBED_DIM)), path)
        artifact.commit_shard(ShardRecord(shard=name, counts={"in": len(rows), "ok": len(rows)}, files={}))
    return artifact

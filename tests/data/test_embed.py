import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.clip import FrozenClip, load_clip
from pipeline.data.embed import Embedder
from pipeline.data.rows import embeddings_schema
from pipeline.data.shards import read_samples
from pipeline.data.vectors import read_vectors, to_arrow, to_numpy, to_unit
from pipeline.errors import DataError
from tests.tiny.networks import make_clip
from tests.tiny.shards import make_jpeg, noisy_shard, write_tar


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def _rewrite(tar: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Change the files of a tar; None leaves one out."""
    with tarfile.open(tar) as old:
        files = [(member.name, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    changed = [(name, change(name, data)) for name, data in files]
    write_tar(tar, [(name, data) for name, data in changed if data is not None])


def test_embedder_writes_clips_own_vectors_for_plain_pyarrow(clip_folder: Path, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path, num_rows=7)
    counts = Embedder(clip_folder, batch_size=4)(tar, parquet, "00000", tmp_path / "out.parquet")
    assert counts == {"in": 6, "ok": 6, "corrupt": 0}
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.equals(embeddings_schema(16))
    assert table.column("key").to_pylist() == [f"00000{i:02d}" for i in (0, 1, 3, 4, 5, 6)]
    z_image = np.array(table.column("z_image").to_pylist(), np.float32)
    z_text = np.array(table.column("z_text").to_pylist(), np.float32)
    assert np.allclose(np.linalg.norm(z_image, axis=1), 1, atol=2e-3)
    frozen = FrozenClip(load_clip(clip_folder))
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(make_jpeg(3))).convert("RGB")))[None]
    assert np.allclose(z_image[2], frozen.encode_image(pixels)[0].numpy(), atol=1e-3)
    assert np.allclose(z_text[2], frozen.encode_text(["caption 3"]).z_text[0].numpy(), atol=1e-3)
    assert read_vectors(tmp_path / "out.parquet").z_text.shape == (6, 16)


def test_embedder_gives_the_same_bytes_again(clip_folder: Path, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    for name in ("one", "two"):
        Embedder(clip_folder, batch_size=4)(tar, parquet, "00000", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_embedder_does_not_need_the_tar_in_order(clip_folder: Path, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    embedder = Embedder(clip_folder, batch_size=4)
    embedder(tar, parquet, "00000", tmp_path / "one")
    table = pq.read_table(parquet)
    pq.write_table(table.take(pa.array(range(table.num_rows - 1, -1, -1))), parquet)
    embedder(tar, parquet, "00000", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_embedder_counts_corrupt_pictures(clip_folder: Path, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    _rewrite(tar, lambda name, data: data[:40] if name in {"0000001.jpg", "0000004.jpg"} else data)
    counts = Embedder(clip_folder, batch_size=4)(tar, parquet, "00000", tmp_path / "out.parquet")
    assert counts == {"in": 5, "ok": 3, "corrupt": 2}
    assert pq.read_table(tmp_path / "out.parquet").column("key").to_pylist() == ["0000000", "0000003", "0000005"]


def test_embedder_of_a_shard_without_pictures_is_an_empty_table(clip_folder: Path, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path, num_rows=2, failed=(0, 1))
    counts = Embedder(clip_folder, batch_size=4)(tar, parquet, "00000", tmp_path / "out.parquet")
    assert counts == {"in": 0, "ok": 0, "corrupt": 0}
    assert read_vectors(tmp_path / "out.parquet").z_image.shape == (0, 16)


def test_embedder_names_what_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not an open_clip folder"):
        Embedder(tmp_path, batch_size=4)


def test_read_samples_refuses_another_uid_by_shard_row_and_uid(tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    uids = pq.read_table(parquet).column("uid").to_pylist()

    def swap(name: str, data: bytes) -> bytes:
        return json.dumps(json.loads(data) | {"uid": uids[0]}).encode() if name == "0000004.json" else data

    _rewrite(tar, swap)
    with pytest.raises(DataError, match=f"shard 00000: key 0000004: uid {uids[4]}: the row has uid {uids[0]} in"):
        list(read_samples(tar, parquet, "00000"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, data: None if name.startswith("0000003") else data,
            "shard 00000: key 0000003: uid .*no picture and json",
        ),
        (lambda name, data: b"{" if name == "0000000.json" else data, "key 0000000: .*malformed json"),
    ],
)
def test_read_samples_says_what_is_wrong_with_a_tar(change: Any, message: str, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    _rewrite(tar, change)
    with pytest.raises(DataError, match=message):
        list(read_samples(tar, parquet, "00000"))


@pytest.mark.parametrize("size", [3000, 512 * 7 + 100, 10])
def test_read_samples_refuses_a_truncated_tar(size: int, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    tar.write_bytes(tar.read_bytes()[:size])
    with pytest.raises(DataError, match=r"00000\.tar: "):
        list(read_samples(tar, parquet, "00000"))


def test_read_samples_refuses_a_tar_of_another_shard(tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    other, _ = noisy_shard(tmp_path / "other", "00001")
    tar.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"has key 0000100, which is not a good row of 00000\.parquet"):
        list(read_samples(tar, parquet, "00000"))


def test_read_samples_names_a_missing_column_and_a_damaged_table(tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    pq.write_table(pq.read_table(parquet).drop_columns(["uid"]), parquet)
    with pytest.raises(DataError, match=r"00000.parquet: no column uid; it has url"):
        list(read_samples(tar, parquet, "00000"))
    parquet.write_bytes(parquet.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00000.parquet: damaged"):
        list(read_samples(tar, parquet, "00000"))


def test_vectors_survive_arrow_and_slicing() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16)
    table = pa.table({"z": to_arrow(vectors)})
    assert np.array_equal(to_numpy(table.column("z")), vectors)
    assert np.array_equal(to_numpy(table.slice(2, 3).column("z")), vectors[2:5])
    assert to_numpy(table.slice(0, 0).column("z")).shape == (0, 3)
    assert np.allclose(np.linalg.norm(to_unit(vectors), axis=1), 1, atol=1e-6)

import io
import json
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.clip.files import load_clip
from pipeline.clip.frozen import FrozenClip
from pipeline.data.embed import Embedder
from pipeline.data.rows import embeddings_schema
from pipeline.data.shards import good_samples
from pipeline.data.vectors import read_column, read_vectors, to_arrow, to_numpy, to_unit, write_embeddings
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.sections import EmbedConfig
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


def _embedder(clip_folder: Path, **settings: Any) -> Embedder:
    return Embedder(clip_folder, EmbedConfig(**{"batch_size": 4} | settings))


def test_embedder_writes_clips_own_vectors_for_plain_pyarrow(clip_folder: Path, tmp_path: Path) -> None:
    result = _embedder(clip_folder)(*noisy_shard(tmp_path, num_rows=7), "00000")
    assert result.counts == {"in": 6, "ok": 6, "corrupt": 0}
    write_embeddings([result.table], tmp_path / "out.parquet", result.table.schema)
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
    assert np.allclose(table.column("clip_score").to_numpy(), (z_image * z_text).sum(1), atol=2e-3)
    assert read_vectors(tmp_path / "out.parquet").z_text.shape == (6, 16)


def test_embedder_gives_the_same_rows_whatever_their_order_and_in_several_threads(
    clip_folder: Path, tmp_path: Path
) -> None:
    tar, parquet = noisy_shard(tmp_path, num_rows=200)
    embedder = _embedder(clip_folder, batch_size=100)
    first = embedder(tar, parquet, "00000").table
    assert first.num_rows == 199
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(embedder, tar, parquet, "00000") for _ in range(3)]
        assert all(call.result().table.equals(first) for call in calls)
    table = pq.read_table(parquet)
    pq.write_table(table.take(pa.array(range(table.num_rows - 1, -1, -1))), parquet)
    assert embedder(tar, parquet, "00000").table.equals(first)


def test_embedder_names_corrupt_pictures_by_uid_and_reason(clip_folder: Path, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    _rewrite(tar, lambda name, data: {"0000001.jpg": data[:400], "0000004.jpg": b"no picture"}.get(name, data))
    result = _embedder(clip_folder)(tar, parquet, "00000")
    assert result.counts == {"in": 5, "ok": 3, "corrupt": 2}
    assert result.table.column("key").to_pylist() == ["0000000", "0000003", "0000005"]
    uids = pq.read_table(parquet).column("uid").to_pylist()
    assert [(row["uid"], row["key"]) for row in result.failures] == [(uids[1], "0000001"), (uids[4], "0000004")]
    assert [row["reason"] for row in result.failures] == ["image file is truncated", "not a picture"]


def test_embedder_leaves_out_embeddings_that_are_not_finite(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FrozenClip.embed_tokens

    def overflow(clip: FrozenClip, tokens: torch.Tensor) -> torch.Tensor:
        z_text = real(clip, tokens)
        z_text[1] = float("nan")
        return z_text

    monkeypatch.setattr(FrozenClip, "embed_tokens", overflow)
    result = _embedder(clip_folder, batch_size=8)(*noisy_shard(tmp_path), "00000")
    assert result.counts == {"in": 5, "ok": 4, "corrupt": 1}
    assert [(row["key"], row["reason"]) for row in result.failures] == [("0000001", "embedding is not finite")]
    assert np.isfinite(result.table.column("clip_score").to_numpy()).all()


def test_embedder_of_a_shard_without_pictures_is_an_empty_table(clip_folder: Path, tmp_path: Path) -> None:
    result = _embedder(clip_folder)(*noisy_shard(tmp_path, num_rows=2, failed=(0, 1)), "00000")
    assert result.counts == {"in": 0, "ok": 0, "corrupt": 0}
    write_embeddings([result.table], tmp_path / "out.parquet", result.table.schema)
    assert read_vectors(tmp_path / "out.parquet").z_image.shape == (0, 16)
    corrupt = tmp_path / "corrupt"
    tar, parquet = noisy_shard(corrupt, num_rows=2, failed=())
    _rewrite(tar, lambda name, data: b"x" if name.endswith("jpg") else data)
    assert _embedder(clip_folder)(tar, parquet, "00000").counts == {"in": 2, "ok": 0, "corrupt": 2}


def test_embedder_in_bfloat16_is_close_to_float32(clip_folder: Path, tmp_path: Path) -> None:
    shard = noisy_shard(tmp_path)
    columns = [
        to_unit(to_numpy(_embedder(clip_folder, precision=precision)(*shard, "00000").table.column("z_image")))
        for precision in ("float32", "bfloat16")
    ]
    cosines = (columns[0] * columns[1]).sum(1)
    assert cosines.min() > 0.995
    assert not np.array_equal(columns[0], columns[1])


def test_precisions_of_a_gpu_are_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"embed: .*precision = .float16. needs resources\.accelerator = .cuda."):
        parse_recipe({"embed": {"precision": "float16"}})


def test_embedder_refuses_a_clip_without_an_image_tower(tmp_path: Path) -> None:
    config = make_clip(tmp_path) / "open_clip_config.json"
    tables = json.loads(config.read_text())
    del tables["model_cfg"]["vision_cfg"]
    config.write_text(json.dumps(tables))
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    text = {name: tensor for name, tensor in weights.items() if not name.startswith("visual.")}
    save_file(text, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(DataError, match=r"embed: .*this CLIP has no image tower"):
        _embedder(tmp_path)


def test_embedder_names_what_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not an open_clip folder"):
        _embedder(tmp_path)


def _read(tar: Path, parquet: Path) -> None:
    rows, pictures = good_samples(tar, parquet, "00000")
    for key, uid in zip(rows.column("key").to_pylist(), rows.column("uid").to_pylist(), strict=True):
        pictures.read(key, uid)


def test_a_shard_refuses_another_uid_by_shard_row_and_uid(tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    uids = pq.read_table(parquet).column("uid").to_pylist()

    def swap(name: str, data: bytes) -> bytes:
        other = {"uid": uids[0], "url": "http://a/00000/0.jpg"}
        return json.dumps(json.loads(data) | other).encode() if name == "0000004.json" else data

    _rewrite(tar, swap)
    with pytest.raises(DataError, match=f"shard 00000: key 0000004: uid {uids[4]}: the row has uid {uids[0]} in"):
        _read(tar, parquet)


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
def test_a_shard_says_what_is_wrong_with_a_tar(change: Any, message: str, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    _rewrite(tar, change)
    with pytest.raises(DataError, match=message):
        _read(tar, parquet)


@pytest.mark.parametrize("size", [3000, 512 * 7 + 100, 10])
def test_a_shard_refuses_a_truncated_tar(size: int, tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    tar.write_bytes(tar.read_bytes()[:size])
    with pytest.raises(DataError, match=r"00000\.tar: "):
        _read(tar, parquet)


def test_a_shard_refuses_a_tar_of_another_shard(tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    other, _ = noisy_shard(tmp_path / "other", "00001")
    tar.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"has key 0000100, which is not a good row of 00000\.parquet"):
        _read(tar, parquet)


def test_a_shard_names_a_missing_column_and_a_damaged_table(tmp_path: Path) -> None:
    tar, parquet = noisy_shard(tmp_path)
    pq.write_table(pq.read_table(parquet).drop_columns(["uid"]), parquet)
    with pytest.raises(DataError, match=r"00000.parquet: no column uid; it has url"):
        _read(tar, parquet)
    parquet.write_bytes(parquet.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00000.parquet: damaged"):
        _read(tar, parquet)


@pytest.mark.parametrize("num_rows", [0, 5, 2500])
def test_a_column_of_vectors_is_read_as_pyarrow_reads_it(num_rows: int, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, num_rows, 24)).astype(np.float16)
    schema = embeddings_schema(24)
    strings = pa.array([f"row {row}" for row in range(num_rows)])
    score = pa.array(np.zeros(num_rows, np.float32))
    table = pa.table([*[strings] * 5, score, *(to_arrow(part) for part in vectors)], schema=schema)
    write_embeddings([table.slice(0, 3), table.slice(3)] if num_rows else [], tmp_path / "ours", schema)
    pq.write_table(table, tmp_path / "theirs")  # with a dictionary, compression, and pages of its own
    for name, expected in zip(("z_image", "z_text"), vectors, strict=True):
        for file in ("ours", "theirs"):
            assert np.array_equal(read_column(tmp_path / file, name), expected)
        assert np.array_equal(to_numpy(pq.read_table(tmp_path / "ours").column(name)), expected)


def test_vectors_survive_arrow_and_slicing() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16)
    table = pa.table({"z": to_arrow(vectors)})
    assert np.array_equal(to_numpy(table.column("z")), vectors)
    assert np.array_equal(to_numpy(table.slice(2, 3).column("z")), vectors[2:5])
    assert to_numpy(table.slice(0, 0).column("z")).shape == (0, 3)
    assert np.allclose(np.linalg.norm(to_unit(vectors), axis=1), 1, atol=1e-6)

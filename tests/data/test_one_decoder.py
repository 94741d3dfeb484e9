"""Files that decoders get wrong, downloaded from a real server and read by every reader: all have the same pixels."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.clip.files import load_clip
from pipeline.clip.frozen import FrozenClip
from pipeline.data.embed import Embedder
from pipeline.data.rows import make_uid
from pipeline.data.samples import Samples
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.shards import StoredPictures
from pipeline.data.training_rows import ShardReader
from pipeline.data.urls import AddressRules
from pipeline.data.vectors import Vectors, read_vectors, to_unit, write_embeddings
from pipeline.pictures.frame import square
from pipeline.pictures.read import read_file
from pipeline.recipe.sections import DownloadConfig, EmbedConfig
from pipeline.serve.uploads import decode_base64
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.data.conftest import CASES, PictureServer
from tests.tiny.networks import make_clip
from tests.tiny.shards import download_shard

_NAMES = ("lying-down.jpg", "gray16.png", "gray16.tif", "rgb16.png", "rgba16.png")
_OTHERS = ("jpg/1", "jpg/2", "png/3")
_SIDE_PX = 32  # of the shorter side that is stored, of CLIP's pictures and of the training's


@dataclass(frozen=True)
class _Data:
    download: Artifact
    rows: dict[str, dict[str, Any]]
    """By caption, which is the path of the URL."""
    vectors: Vectors
    clip: FrozenClip

    def stored(self, name: str) -> Image.Image:
        row = self.rows[f"case/{name}"]
        return StoredPictures(self.download).decode("00000", row["key"], row["uid"])


@pytest.fixture(scope="module")
def data(server: PictureServer, tmp_path_factory: pytest.TempPathFactory) -> _Data:
    """One shard, stored without loss, and its embeddings."""
    folder, download = tmp_path_factory.mktemp("embed"), Artifact(str(tmp_path_factory.mktemp("download")))
    captions = [*(f"case/{name}" for name in _NAMES), *_OTHERS]
    urls = [f"{server.url}/{caption}" for caption in captions]
    uids = [make_uid(url, caption) for url, caption in zip(urls, captions, strict=True)]
    pairs = pa.table({"uid": uids, "split": ["train"] * len(urls), "caption": captions, "url": urls})
    config = DownloadConfig(image_px=_SIDE_PX, resize_mode="keep_ratio", encode_format="png", encode_quality=1)
    files = [Path(download.uri) / f"00000{ending}" for ending in (".tar", ".parquet", "_stats.json")]
    counts = download_shard(pairs, "00000", config, ShardFiles(*files), AddressRules(["127.0.0.1/32"]))
    assert counts["ok"] == len(urls)
    download.commit_shard(ShardRecord(shard="00000", counts=dict(counts), files={}))
    clip = make_clip(folder / "clip")
    table = Embedder(clip, EmbedConfig(batch_size=4))(files[0], files[1], "00000").table
    write_embeddings([table], folder / "vectors.parquet", table.schema)
    rows = {row["caption"]: row for row in pq.read_table(files[1]).to_pylist()}
    return _Data(download, rows, read_vectors(folder / "vectors.parquet"), FrozenClip(load_clip(clip)))


def test_a_rotated_photo_is_stored_upright(data: _Data) -> None:
    stored, row = data.stored("lying-down.jpg"), data.rows["case/lying-down.jpg"]
    assert stored.size == (32, 48)
    assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (32, 48, 64, 96)
    upright = Image.open(CASES / "lying-down.jpg").transpose(Image.Transpose.ROTATE_270)
    blocks = np.asarray(upright, np.uint16).reshape(48, 2, 32, 2, 3).sum(axis=(1, 3))
    assert np.array_equal(np.asarray(stored), (blocks + 2) >> 2)


@pytest.mark.parametrize("name", _NAMES[1:])
def test_sixteen_bits_are_stored_in_eight(data: _Data, name: str) -> None:
    stored = np.asarray(data.stored(name))
    assert stored.shape == (32, 48, 3)
    assert tuple(stored[2, 2]) == ((130, 130, 130) if "gray" in name else (30, 200, 30))


@pytest.mark.parametrize("name", _NAMES)
def test_training_and_embed_read_the_square_of_what_is_stored(data: _Data, name: str) -> None:
    row, expected = data.rows[f"case/{name}"], square(data.stored(name), _SIDE_PX)
    samples = Samples(ShardReader(data.download, None, "train"), _SIDE_PX)
    batch = samples.batch(np.array([[0, samples.reader.table("00000").columns["uid"].to_pylist().index(row["uid"])]]))
    assert list(batch.uids) == [row["uid"]]
    assert np.array_equal(batch.require_images()[0].numpy(), expected)
    z_image = data.vectors.z_image[data.vectors.table.column("uid").to_pylist().index(row["uid"])]
    own = data.clip.encode_image(torch.from_numpy(expected)[None])[0].numpy()
    assert np.allclose(z_image, own, atol=1e-3)


@pytest.mark.parametrize("name", _NAMES)
def test_every_query_of_a_file_has_one_vector_and_finds_the_file(data: _Data, name: str) -> None:
    """``search --image`` and the edits read the file, the server gets it in base64."""
    path = CASES / name
    by_file = data.clip.encode_image(torch.from_numpy(np.array(read_file(str(path))))[None])
    served = decode_base64(base64.b64encode(path.read_bytes()).decode(), "image")
    assert torch.equal(data.clip.encode_image(torch.from_numpy(served)[None]), by_file)
    similarities = to_unit(data.vectors.z_image) @ by_file[0].numpy()
    row = data.vectors.table.column("caption").to_pylist().index(f"case/{name}")
    # Grey and colour are each two files of the same pixels, which tie.
    assert similarities[row] >= similarities.max() - 1e-5
    assert similarities[row] > 0.995

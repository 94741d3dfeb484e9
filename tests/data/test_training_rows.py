from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.batches import Samples
from pipeline.data.training_rows import ShardReader
from pipeline.errors import DataError
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import training_scene
from tests.tiny.shards import write_download, write_embed


def test_reader_takes_good_rows_of_its_split(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    assert reader.shards == ["00000", "00001"]
    assert reader.shard_rows == [8, 8]  # 12 rows; rows 5 and 11 are validation; 3 failed, row 11 among them
    table = reader.table("00001")
    assert table.keys == sorted(table.keys)
    assert sum(ShardReader(download, None, "validation").shard_rows) == 2
    assert len(reader.captions()) == len(set(reader.captions()))


def test_pictures_are_read_by_key(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    table, pictures = reader.table("00001"), reader.pictures("00001")
    number = 12 + int(table.keys[3][5:])
    assert np.array_equal(pictures.decode(table.keys[3], table.uids[3]), draw_array(training_scene(0, number), 32))


def test_reader_matches_embeddings_by_key_and_uid(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, write_embed(tmp_path / "embed", download), "train")
    table = reader.table("00000")
    assert table.z_image is not None
    assert table.z_image.shape == (8, 16)
    assert np.allclose(np.linalg.norm(table.z_image.astype(np.float32), axis=1), 1, atol=1e-2)


def test_training_names_the_row_whose_uid_is_not_in_the_tar(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    path = embed.path("00001.parquet")
    table = pq.read_table(path)
    uids = table["uid"].to_pylist()
    uids[2] = "f" * 32
    pq.write_table(table.set_column(0, "uid", pa.array(uids)), path)
    samples = Samples(ShardReader(download, embed, "train"), 32)
    row = samples.reader.table("00001").uids.index("f" * 32)
    with pytest.raises(DataError, match=f"shard 00001: key 0000102: uid {'f' * 32}: the row has uid "):
        samples.batch(np.array([[1, row]]))


def test_reader_names_a_missing_column(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    path = download.path("00000.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["split"]), path)
    with pytest.raises(DataError, match=r"00000\.parquet: no column split"):
        ShardReader(download, None, "train")

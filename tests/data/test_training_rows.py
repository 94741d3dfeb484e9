from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.training_rows import ShardReader
from pipeline.errors import DataError
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import training_scene
from tests.train.data import write_download, write_embed


def test_reader_takes_good_rows_of_its_split(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    assert reader.shards == ["00000", "00001"]
    assert reader.shard_rows == [8, 8]  # 12 rows less 2 of validation (5, 11) less 3 failures, one of which is row 11
    table = reader.table("00001")
    assert table.keys == sorted(table.keys)
    assert sum(ShardReader(download, None, "validation").shard_rows) == 2
    assert len(reader.captions()) == len(set(reader.captions()))


def test_pictures_come_by_key(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    table, pictures = reader.table("00001"), reader.pictures("00001")
    number = 12 + int(table.keys[3][5:])
    assert np.array_equal(pictures.decode(table.keys[3], table.uids[3], 32), draw_array(training_scene(0, number), 32))


def test_reader_joins_embeddings_by_key_and_uid(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, write_embed(tmp_path / "embed", download), "train")
    table = reader.table("00000")
    assert table.z_image is not None
    assert table.z_image.shape == (8, 16)
    assert np.allclose(np.linalg.norm(table.z_image.astype(np.float32), axis=1), 1, atol=1e-2)


def test_reader_names_the_row_whose_uid_is_not_in_the_tar(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    path = embed.path("00001.parquet")
    table = pq.read_table(path)
    uids = table["uid"].to_pylist()
    uids[2] = "f" * 32
    pq.write_table(table.set_column(0, "uid", pa.array(uids)), path)
    with pytest.raises(DataError, match=f"shard 00001: row 2: uid {'f' * 32}"):
        ShardReader(download, embed, "train").table("00001")


def test_reader_names_a_missing_column(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    path = download.path("00000.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["split"]), path)
    with pytest.raises(DataError, match=r"00000\.parquet: no column split"):
        ShardReader(download, None, "train")


def test_pictures_name_a_damaged_tar_and_a_missing_key(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    with pytest.raises(DataError, match="shard 00000: key 999: uid abc is not in the tar"):
        reader.pictures("00000").read("999", "abc")
    path = download.path("00000.tar")
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT")
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    key = reader.table("00000").keys[0]
    with pytest.raises(DataError, match=f"shard 00000: key {key}: uid abc: not a picture"):
        reader.pictures("00000").decode(key, "abc", 32)
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"shard 00000: .*not a readable tar"):
        reader.pictures("00000")

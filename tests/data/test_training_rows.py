import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.samples import Samples
from pipeline.data.shard_tables import split_counts
from pipeline.data.training_rows import ShardReader, require_rows_of
from pipeline.data.vectors import StoredColumn, read_vectors, to_unit, training_batches
from pipeline.errors import DataError
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import training_scene
from pipeline.workspace.store import Artifact
from tests.tiny.shards import EMBED_DIM, write_download, write_embed


def test_reader_takes_good_rows_of_its_split(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    assert reader.shards == ["00000", "00001"]
    assert reader.shard_rows == [8, 8]  # 12 rows; rows 5 and 11 are validation; 3 failed, row 11 among them
    table = reader.table("00001")
    keys = table.columns["key"].to_pylist()
    assert keys == sorted(keys)
    assert sum(ShardReader(download, None, "validation").shard_rows) == 2
    assert len(reader.captions()) == len(set(reader.captions()))


def test_rows_are_in_order_of_key_whatever_their_order_in_the_file(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    calm = ShardReader(download, embed, "train").table("00000")
    rows = np.arange(len(calm))
    vectors = calm.z_image(rows)  # before the file, which is mapped, is another one
    path = embed.path("00000.parquet")
    stored = pq.read_table(path)
    pq.write_table(stored.take(pa.array(np.random.default_rng(0).permutation(stored.num_rows))), path)
    table = ShardReader(download, embed, "train").table("00000")
    assert table.columns == calm.columns
    assert np.array_equal(table.z_image(rows), vectors)


def test_imported_embeddings_of_other_rows_than_the_pictures_are_named(tmp_path: Path) -> None:
    download, other = write_download(tmp_path / "download"), write_download(tmp_path / "other", num_rows=16)
    require_rows_of(download, write_embed(tmp_path / "embed", download), where="decoder")
    for pictures in (download, Artifact(str(tmp_path / "nothing"))):
        with pytest.raises(DataError, match=r"decoder: .*: shard 00000: uid \w{32} is no row of the download, whose"):
            require_rows_of(pictures, write_embed(tmp_path / "imported", other), where="decoder")


def test_pictures_are_read_by_key(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    reader = ShardReader(download, None, "train")
    table, pictures = reader.table("00001"), reader.pictures("00001")
    (key,), (uid,) = (table.take(name, np.array([3])).to_pylist() for name in ("key", "uid"))
    assert np.array_equal(pictures.decode(key, uid), draw_array(training_scene(0, 12 + int(key[5:])), 32))


def test_reader_matches_embeddings_by_key_and_uid(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    table = ShardReader(download, embed, "train").table("00000")
    stored = pq.read_table(embed.path("00000.parquet"))
    by_uid = dict(zip(stored["uid"].to_pylist(), stored["z_image"].to_pylist(), strict=True))
    rows = np.array([5, 0, 5])
    assert table.z_image(rows).tolist() == [by_uid[uid] for uid in table.take("uid", rows).to_pylist()]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"row_group_size": 3}, {"data_page_size": 8}])
def test_a_column_is_read_row_by_row_however_the_file_was_written(options: Any, tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    path = write_embed(tmp_path / "embed", download).path("00000.parquet")
    table = pq.read_table(path)
    if options:
        pq.write_table(table, path, **options)
    rows = np.array([7, 1, 1, 0])
    assert StoredColumn(path, "z_image").read(rows).tolist() == table["z_image"].take(pa.array(rows)).to_pylist()
    assert StoredColumn(path, "z_image").read(rows[:0]).shape == (0, EMBED_DIM)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"row_group_size": 3}])
@pytest.mark.parametrize("batch_rows", [4, 100])
def test_training_vectors_come_in_batches_from_here_and_from_a_store(
    batch_rows: int, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_embed(tmp_path / "embed", write_download(tmp_path / "download")).path("00000.parquet")
    if options:
        pq.write_table(pq.read_table(path), path, **options)
    vectors = read_vectors(path)
    is_train = np.array(vectors.table.column("split").to_pylist()) == "train"
    assert 0 < is_train.sum() < len(is_train)
    monkeypatch.setattr("pipeline.data.vectors.BATCH_ROWS", batch_rows)
    with path.open("rb") as stream:
        for file in (path, stream):
            batches = list(training_batches(file, ["z_image", "z_text"]))
            assert max(len(z_image) for z_image, _ in batches) <= batch_rows
            for stored, parts in zip((vectors.z_image, vectors.z_text), zip(*batches, strict=True), strict=True):
                assert np.array_equal(np.concatenate(parts), to_unit(stored[is_train]))


def test_rows_are_counted_from_the_records_and_no_file_is_opened_before_it_is_needed(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    counts = {split: ShardReader(None, embed, split).shard_rows for split in ("train", "validation")}
    for shard, record in embed.shard_records().items():
        splits = split_counts(embed.path(f"{shard}.parquet"))
        assert sum(splits.values()) == record.counts["ok"]
        embed.commit_shard(dataclasses.replace(record, splits=splits))
    path = embed.path("00001.parquet")
    path.rename(tmp_path / "away")
    for split, rows in counts.items():
        assert ShardReader(None, embed, split).shard_rows == rows
    with pytest.raises(DataError, match=r"no file 00001\.parquet"):
        ShardReader(None, embed, "train").table("00001")


def test_counts_of_a_download_leave_out_the_rows_without_a_picture(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    counts = [ShardReader(download, None, split).shard_rows for split in ("train", "validation")]
    splits = [split_counts(download.path(f"{shard}.parquet")) for shard in download.shard_records()]
    assert counts == [[one.get(name, 0) for one in splits] for name in ("train", "validation")]


def test_training_names_the_row_whose_uid_is_not_in_the_tar(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    embed = write_embed(tmp_path / "embed", download)
    path = embed.path("00001.parquet")
    table = pq.read_table(path)
    uids = table["uid"].to_pylist()
    uids[2] = "f" * 32
    pq.write_table(table.set_column(0, "uid", pa.array(uids)), path)
    samples = Samples(ShardReader(download, embed, "train"), 32)
    row = samples.reader.table("00001").columns["uid"].to_pylist().index("f" * 32)
    with pytest.raises(DataError, match=f"shard 00001: key 0000102: uid {'f' * 32}: the row has uid "):
        samples.batch(np.array([[1, row]]))


def test_reader_names_a_missing_column(tmp_path: Path) -> None:
    download = write_download(tmp_path / "download")
    path = download.path("00000.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["split"]), path)
    with pytest.raises(DataError, match=r"00000\.parquet: no column split"):
        ShardReader(download, None, "train")

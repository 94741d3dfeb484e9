"""Which rows and columns of the pairs a shard has, and its name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.shard_rows import check_columns, read_rows, shard_names
from pipeline.data.shard_writer import key_of
from pipeline.errors import DataError
from pipeline.recipe.sections import DownloadConfig
from tests.data.conftest import PictureServer
from tests.data.downloading import download_rows, make_rows
from tests.tiny.pairs import write_parts


def test_read_rows_reads_one_shard_of_any_parts_and_row_groups(tmp_path: Path) -> None:
    rows = make_rows("http://x", [f"jpg/{i}" for i in range(250)])
    pairs = write_parts(tmp_path, [rows.slice(0, 130), rows.slice(130)])
    config = DownloadConfig(samples_per_shard=100, extra_columns=("score",))
    assert shard_names([250], 100) == ["00000", "00001", "00002"]
    parts = [read_rows(pairs, shard, config) for shard in shard_names([250], 100)]
    assert [part.num_rows for part in parts] == [100, 100, 50]
    assert pa.concat_tables(parts).equals(rows)


def test_check_columns_names_what_is_wrong() -> None:
    columns = ["uid", "url", "caption", "split"]
    with pytest.raises(DataError, match=r"pairs.parquet: no column punsafe; it has uid, url"):
        check_columns(DownloadConfig(extra_columns=("punsafe",)), columns, "pairs.parquet")


def test_extra_columns_of_any_type_are_passed_through(server: PictureServer, tmp_path: Path) -> None:
    rows = make_rows(server.url, ["jpg/1"]).set_column(2, "score", pa.array([[0.5, None]]))
    files, counts = download_rows(rows, tmp_path)
    assert counts["ok"] == 1
    assert pq.read_table(files.parquet).column("score").to_pylist() == ["[0.5, None]"]


def test_shard_names_sort_beyond_five_digits() -> None:
    names = shard_names([1_000_010], 10)
    assert (names[0], names[-1]) == ("000000", "100000")
    assert names == sorted(names)
    assert shard_names([40], 20) == ["00000", "00001"]
    assert [key_of("00003", 7, size) for size in (1, 10, 11, 1000)] == ["00010", "000037", "0000307", "00003007"]

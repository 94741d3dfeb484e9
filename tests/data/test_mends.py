"""What a message proposes for a damaged shard loses nothing, and helps."""

import shutil
from pathlib import Path

import pytest

from pipeline.data.mends import repair_hint
from pipeline.data.shard_tables import read_table
from pipeline.data.tar_index import index_tar
from pipeline.errors import DataError
from pipeline.evaluate.parts import read_part
from pipeline.evaluate.work import Part
from pipeline.workspace.store import Artifact
from tests.tiny.shards import noisy_shard


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def test_a_damaged_shard_comes_from_a_copy_before_anything_is_made_again(tmp_path: Path) -> None:
    tar, table = noisy_shard(tmp_path)
    for path in (tar, table):
        _cut(path)
    with pytest.raises(DataError, match=r"00000\.tar: truncated .* copy; .* if its bytes are others .* trainings too$"):
        index_tar(tar)
    with pytest.raises(DataError, match=r"00000\.parquet: damaged .* bring it back from a copy; .* trainings too$"):
        read_table(table, ["uid"])


def test_a_damaged_copy_of_a_stores_file_is_removed_and_fetched_again(tmp_path: Path) -> None:
    artifact = Artifact("memory://damaged/download/key")
    tar, _ = noisy_shard(tmp_path)
    with artifact.write("00000.tar") as path:
        shutil.copyfile(tar, path)
    copy = artifact.path("00000.tar")
    whole = copy.read_bytes()
    copy.write_bytes(b"z" * 512 + whole[512:])
    with pytest.raises(
        DataError, match=r"this machine's copy of a file in a store: remove it, .* own is damaged: bring it back from"
    ):
        index_tar(copy)
    copy.unlink()
    assert artifact.path("00000.tar") == copy
    assert copy.read_bytes() == whole


def test_a_damaged_copy_of_a_part_of_an_evaluation_is_fetched_again() -> None:
    output, part = Artifact("memory://damaged/evaluate/key"), Part("samples", 0, 0, 1)
    output.write_bytes(f"{part.name}.parquet", b"no table")
    with pytest.raises(DataError, match=r"samples-00000\.parquet: damaged .* remove it, and it is fetched again;"):
        read_part(output, part)


def test_a_link_names_the_file_that_it_leads_to(tmp_path: Path) -> None:
    tar, _ = noisy_shard(tmp_path)
    link = tmp_path / "link.tar"
    link.symlink_to(tar)
    assert repair_hint(link) == f"it is a link to {tar.resolve()}: bring that file back from a copy"

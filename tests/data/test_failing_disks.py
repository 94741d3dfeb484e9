"""Shards on storage that does not give them for a moment, or any more, which says nothing about what they hold."""

import contextlib
import errno
import io
import os
import resource
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.rows import make_uid
from pipeline.data.shard_tables import find_rows, read_batches, read_groups, read_names, read_table
from pipeline.data.shards import ShardPictures
from pipeline.data.token_states import StoredStates, read_empty, states_file
from pipeline.data.vectors import RowGroups, StoredColumn, read_column
from pipeline.errors import DataError, StepError
from pipeline.workspace import disk
from tests.tiny.shards import make_jpeg, noisy_shard, write_download, write_embed
from tests.tiny.token_states import embed_with_states
from tests.tiny.training import tiny_inputs

_UIDS = [make_uid(f"http://a/00000/{number}.jpg", f"caption {number}") for number in range(6)]


class _Unsteady(io.FileIO):
    """A file of which one read fails after some that did not, as on a server that is started again."""

    reads_left = 0
    failures_left = 0
    code = errno.ESTALE

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        if _Unsteady.failures_left and not _Unsteady.reads_left:
            _Unsteady.failures_left -= 1
            raise OSError(_Unsteady.code, os.strerror(_Unsteady.code))
        _Unsteady.reads_left = max(0, _Unsteady.reads_left - 1)
        return super().read(-1 if size is None else size)


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> Generator[type[_Unsteady]]:
    """Arrow reads files of this kind, and asks again at once."""
    opened, read_schema = pq.ParquetFile, pq.read_schema
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened(_Unsteady(path)))
    monkeypatch.setattr(pq, "read_schema", lambda path: read_schema(_Unsteady(path)))
    monkeypatch.setattr(disk, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(disk, "_PATIENCE_S", 60.0)
    yield _Unsteady
    _Unsteady.reads_left = _Unsteady.failures_left = 0
    _Unsteady.code = errno.ESTALE


_READS: dict[str, Callable[[Path], Any]] = {
    "table": lambda path: read_table(path, ["uid", "split"]),
    "names": read_names,
    "batches": lambda path: pa.concat_tables(read_batches(path, ["uid", "z_image"], 2)),
    "groups": lambda path: pa.concat_tables(read_groups(path, ["uid", "split"])),
    "rows": lambda path: list(find_rows(path, ["split"], pa.array(["train"]), ["uid"])),
    "column": lambda path: read_column(path, "z_image").tolist(),
    "stored column": lambda path: StoredColumn(path, "z_image").read(np.arange(3)).tolist(),
    "row groups": lambda path: RowGroups.of_file(path).offsets.tolist(),
}


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """A table of embeddings in row groups of three rows."""
    path = write_embed(tmp_path / "embed", write_download(tmp_path / "download")).path("00000.parquet")
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    return path


@pytest.mark.parametrize("name", _READS)
def test_a_table_that_storage_does_not_give_for_a_moment_is_read_again(
    name: str, embeddings: Path, unsteady: type[_Unsteady], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _READS[name]
    expected = read(embeddings)
    for first in range(8):  # at the opening, and at each later read that there is
        unsteady.reads_left, unsteady.failures_left = first, 2
        assert read(embeddings) == expected
    monkeypatch.setattr(disk, "_PATIENCE_S", 0.01)
    unsteady.reads_left, unsteady.failures_left = 0, 10**6
    with pytest.raises(StepError, match=rf"^{embeddings}: cannot be read: .*see that this storage is mounted"):
        read(embeddings)


def test_parts_of_a_table_go_on_where_the_storage_failed(embeddings: Path, unsteady: type[_Unsteady]) -> None:
    whole = read_table(embeddings, ["uid"])["uid"].to_pylist()
    uids = list[str]()
    for group in read_groups(embeddings, ["uid"]):
        uids += group["uid"].to_pylist()
        unsteady.failures_left = 1
    assert uids == whole


def test_what_is_wrong_in_a_table_is_damage_and_not_waited_for(embeddings: Path, unsteady: type[_Unsteady]) -> None:
    pq.write_table(pq.read_table(embeddings), embeddings, compression="zstd")
    content = bytearray(embeddings.read_bytes())
    content[4:400] = bytes(396)  # the first pages
    embeddings.write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)00000\.parquet: damaged \(.*header failed.*trainings too$"):
        read_table(embeddings, ["uid", "key", "url"])
    embeddings.unlink()
    with pytest.raises(DataError, match=r"00000\.parquet: damaged \(.*No such file"):
        read_table(embeddings, ["uid"])


@contextlib.contextmanager
def _no_more_files() -> Generator[None]:
    """Let this process open none inside the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_that_can_open_no_more_files_has_found_no_damage(tmp_path: Path) -> None:
    tar, table = noisy_shard(tmp_path)
    for read in (lambda: read_table(table, ["uid"]), lambda: ShardPictures(tar, "00000")):
        with _no_more_files(), pytest.raises(StepError) as failure:
            read()
        assert str(failure.value).endswith(": cannot be read: Too many open files: mend it, and run again")


def test_token_states_that_storage_does_not_give_for_a_moment_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(tmp_path)
    path = embed_with_states(tmp_path / "states", inputs["download"], inputs["clip"]).path(states_file("00000"))
    for name, read in (("memory_map", StoredStates), ("ipc.open_file", read_empty)):
        with monkeypatch.context() as patch:
            failed = _fail_arrow(patch, name)
            read(path)
            assert len(failed) == 2


def _fail_arrow(patch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let a function of Arrow fail twice, as it does where the storage does; gives the failures so far."""
    module, _, function = name.rpartition(".")
    owner: Any = getattr(pa, module) if module else pa
    call, failed = getattr(owner, function), list[str]()

    def fail(*arguments: Any, **options: Any) -> Any:
        if len(failed) < 2:
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments, **options)

    patch.setattr(owner, function, fail)
    patch.setattr(disk, "_FIRST_WAIT_S", 0.001)
    return failed


@pytest.mark.parametrize("indexed", [True, False])
def test_a_picture_that_storage_does_not_give_for_a_moment_is_read_again(
    indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has the tar under another number: what is read by the old handle fails for ever."""
    tar, _ = noisy_shard(tmp_path, failed=())
    pictures = ShardPictures(tar, "00000", indexed=indexed)
    old, read, failed = tar.stat().st_ino, os.pread, list[int]()
    shutil.copy2(tar, tmp_path / "copy")  # with its time
    (tmp_path / "copy").replace(tar)

    def fail(handle: int, num_bytes: int, start: int) -> bytes:
        if os.fstat(handle).st_ino == old:
            failed.append(start)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(handle, num_bytes, start)

    monkeypatch.setattr(disk, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(os, "pread", fail)
    assert pictures.read("0000001", _UIDS[1]) == make_jpeg(1, size=(32, 33))
    assert pictures.read("0000002", _UIDS[2]) == make_jpeg(2, size=(32, 34))
    assert len(failed) == 1


def test_a_tar_that_was_written_again_without_some_samples_is_not_read_by_the_places_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar, _ = noisy_shard(tmp_path, failed=())
    pictures = ShardPictures(tar, "00000")
    shorter, _ = noisy_shard(tmp_path / "again", failed=(0, 2, 3))
    shorter.replace(tar)
    read, failed = os.pread, list[int]()

    def fail(handle: int, num_bytes: int, start: int) -> bytes:
        if not failed:
            failed.append(start)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(handle, num_bytes, start)

    monkeypatch.setattr(disk, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StepError, match=rf"^{tar}: was written again since it was opened; run again$"):
        pictures.read("0000001", _UIDS[1])
    assert len(failed) == 1


def test_a_tar_that_storage_does_not_give_any_more_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar, _ = noisy_shard(tmp_path)
    pictures = ShardPictures(tar, "00000")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(disk, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StepError, match=rf"^{tar}: cannot be read: Input/output error: see that this storage"):
        pictures.read("0000001", _UIDS[1])

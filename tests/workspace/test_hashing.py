"""Checksums of what is written from front to back."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.shard_writer import ShardFiles, ShardRow, write_shard
from pipeline.data.vectors import write_embeddings
from pipeline.evaluate.parts import write_rows
from pipeline.filter.labels import write_labels
from pipeline.workspace import local_files, stored_files
from pipeline.workspace.folder import Folder, description_of
from pipeline.workspace.hashing import HashedFile
from tests.tiny.shards import EMBED_DIM

_SCHEMA = pa.schema({"key": pa.string(), "status": pa.string(), "error_message": pa.string(), "uid": pa.string()})


def _shard(path: Path) -> ShardFiles:
    others = [path.with_name(f"{path.name}-{name}") for name in ("a", "b")]
    row = ShardRow(
        {"key": "00", "status": "failed_to_download", "error_message": "dns: no such host", "uid": "1"}, None
    )
    files = (path, *others) if path.name.endswith(".tar") else (others[0], path, others[1])
    write_shard([row], _SCHEMA, "jpg", ShardFiles(*files), start=0.0)
    return ShardFiles(*files)


def _labels(path: Path) -> None:
    measures = pa.table({"uid": ["1"], "key": ["00"], "reason": [""], "detail": [""]})
    write_labels(measures, [], path, where="here")


def _embeddings(path: Path) -> None:
    schema = pa.schema({"uid": pa.string(), "z_image": pa.list_(pa.float16(), EMBED_DIM)})
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(EMBED_DIM, np.float16)), EMBED_DIM)
    write_embeddings([pa.table({"uid": ["1"], "z_image": vectors}, schema)], path, schema)


def _parquet(path: Path) -> None:
    table = pa.table({"number": np.arange(100_000)})
    with HashedFile(path) as stream, pq.ParquetWriter(stream, table.schema) as writer:
        writer.write_table(table)
        stream.flush()
        writer.write_table(table)


def _array(path: Path) -> None:
    with HashedFile(path) as stream:
        np.save(stream, np.arange(100_000))


def _ipc(path: Path) -> None:
    table = pa.table({"number": np.arange(100_000)})
    with HashedFile(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


_WRITERS: dict[str, Callable[[Path], object]] = {
    "00000.tar": _shard,
    "00000.parquet": _shard,
    "labels.parquet": _labels,
    "embeddings.parquet": _embeddings,
    "rows.parquet": lambda path: write_rows([{"row": 1}], path),
    "groups.parquet": _parquet,
    "array.npy": _array,
    "table.arrow": _ipc,
}


@pytest.mark.parametrize("root", ["", "memory://hashed"])
@pytest.mark.parametrize("name", _WRITERS)
def test_a_file_of_a_shard_is_not_read_for_its_checksum(
    name: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise AssertionError(f"{path} is read back")

    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    files = Folder(root or str(tmp_path / "files"))
    with monkeypatch.context() as patch:
        for module in (local_files, stored_files):
            patch.setattr(module, "sha256_of", fail)
        with files.write(name) as path:
            _WRITERS[name](path)
        described = files.describe(name)
    content = files.path(name).read_bytes()
    assert described == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_file_that_is_written_again_is_described_as_it_is(tmp_path: Path) -> None:
    files = Folder(str(tmp_path))
    with files.write("file") as path:
        with HashedFile(path) as stream:
            stream.write(b"first")
        path.write_bytes(b"second")  # past it, and so of another size
    assert files.describe("file") == description_of(b"second")
    with files.write("file") as path, HashedFile(path) as stream:
        stream.write(b"third")
    with files.write("file") as path:
        path.write_bytes(b"fourth")
    assert files.describe("file") == description_of(b"fourth")


def test_nothing_is_remembered_of_a_file_that_failed(tmp_path: Path) -> None:
    files = Folder(str(tmp_path))

    def write_half() -> None:
        with files.write("file") as path, HashedFile(path) as stream:
            stream.write(b"half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_half()
    (tmp_path / "file").write_bytes(b"by hand")
    assert files.describe("file") == description_of(b"by hand")

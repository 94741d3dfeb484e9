"""A search of an index whose embeddings are in an object store: what it asks for, and that its results are exact."""

import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import far_files
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve.batch import encode_rows
from pipeline.retrieve.build import build_index
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.retrieve.index import NeighbourIndex
from pipeline.retrieve.queries import QueryEncoder
from pipeline.retrieve.query_list import PROBLEM
from pipeline.retrieve.retriever import Retriever
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.s3_server import Request, S3Server
from tests.tiny.shards import make_embeddings

_SHARDS, _ROWS, _DIM, _K = 50, 40, 16, 10
_QUERIES = np.eye(_DIM, dtype=np.float32)[:3]


@pytest.fixture
def embed(bucket: str) -> Artifact:
    """50 shards of 40 rows."""
    vectors = np.random.default_rng(0).normal(size=(2, _SHARDS * _ROWS, _DIM))
    z_image, z_text = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    artifact = Workspace(bucket).artifact("embed", "e")
    make_embeddings(artifact, z_image, z_text, _ROWS)
    return artifact


@pytest.fixture
def index(embed: Artifact, tmp_path: Path) -> Artifact:
    """Kinds with lists are ranked by the exact vectors, which are in the embeddings."""
    output = Artifact(str(tmp_path / "index"))
    build_index(embed, output, IndexConfig(kind="ivf_sq8", recall_target=1.0), seed=0)
    return output


@pytest.fixture
def exact(embed: Artifact) -> list[list[str]]:
    """The captions of the nearest rows of each query, by exact search."""
    tables = [pq.read_table(embed.path(f"{shard:05d}.parquet")) for shard in range(_SHARDS)]
    captions = np.array([caption for table in tables for caption in table["caption"].to_pylist()])
    rows = np.concatenate([np.array(table["z_image"].to_pylist(), np.float32) for table in tables])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [captions[np.argsort(-(rows @ query))[:_K]].tolist() for query in _QUERIES]


def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on this is a machine that has none of the files."""
    shutil.rmtree(tmp_path / "of-another-machine", ignore_errors=True)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "of-another-machine"))


def _find(index: NeighbourIndex) -> list[list[str]]:
    return [[near.caption for near in one] for one in index.find(_QUERIES, _K)]


def _of_embed(server: S3Server) -> list[Request]:
    return [request for request in server.counted() if "/embed/" in request.name]


def test_a_search_fetches_vectors_and_no_file(
    embed: Artifact,
    index: Artifact,
    exact: list[list[str]],
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    _elsewhere(monkeypatch, tmp_path)
    opened = NeighbourIndex.open(index)
    for _ in range(2):
        s3_server.counted()
        assert _find(opened) == exact
        requests = _of_embed(s3_server)
        assert {request.kind for request in requests} == {"ranged GET"}
        assert len(requests) == len({request.name for request in requests}) <= _SHARDS
        assert all(request.num_bytes <= _ROWS * _DIM * 2 for request in requests)
    files = list((tmp_path / "of-another-machine").rglob("*.parquet"))
    assert files == []


def test_copies_of_this_machine_are_looked_at_once(
    embed: Artifact, index: Artifact, exact: list[list[str]], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    opened = NeighbourIndex.open(index)
    s3_server.counted()
    assert _find(opened) == exact
    kinds = Counter(request.kind for request in _of_embed(s3_server))
    assert kinds.keys() == {"HEAD"}
    assert kinds["HEAD"] <= _SHARDS
    assert _find(opened) == exact
    assert _of_embed(s3_server) == []
    # Of a shard that was written again, the copy is not used.
    changed = f"{embed.uri.removeprefix('s3://')}/00007.parquet"
    s3_server.put(changed, embed.path("00007.parquet").read_bytes() + b"x")
    s3_server.counted()
    assert _find(NeighbourIndex.open(index)) == exact
    kinds |= {"ranged GET": 1, "GET": 1}  # a manifest, when the index is opened
    assert Counter(request.kind for request in _of_embed(s3_server)) == kinds


def test_files_that_are_searched_often_come_to_this_machine(
    index: Artifact, exact: list[list[str]], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", _ROWS * _DIM * 4)
    _elsewhere(monkeypatch, tmp_path)
    opened, fetched = NeighbourIndex.open(index), list[str]()
    for number in itertools.count(1):
        s3_server.counted()
        assert _find(opened) == exact
        requests = _of_embed(s3_server)
        fetched += [request.name for request in requests if request.kind == "GET" and "parquet" in request.name]
        assert len(fetched) <= number * far_files._WHOLE_FILES
        if not requests:
            break
    assert len(fetched) == len(set(fetched)) > far_files._WHOLE_FILES


def test_a_part_that_fails_is_asked_for_again_alone(
    index: Artifact, exact: list[list[str]], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    _elsewhere(monkeypatch, tmp_path)
    opened = NeighbourIndex.open(index)
    s3_server.counted()
    assert _find(opened) == exact
    num_parts = len(_of_embed(s3_server))
    s3_server.fail("reset", "GET", ".parquet", times=2)
    assert _find(opened) == exact
    assert num_parts < len(_of_embed(s3_server)) <= num_parts + 2


@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_that_is_cut_off_or_gone_is_named(
    *,
    is_there: bool,
    embed: Artifact,
    index: Artifact,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    for shard in range(_SHARDS):
        if is_there:
            s3_server.put(f"{embed.uri.removeprefix('s3://')}/{shard:05d}.parquet", b"PAR1")
        else:
            embed.remove(f"{shard:05d}.parquet")
    _elsewhere(monkeypatch, tmp_path)
    opened = NeighbourIndex.open(index)
    words = r"/embed/e/000\d\d.parquet: truncated at byte" if is_there else r"no file 000\d\d.parquet"
    with pytest.raises(DataError, match=words):
        opened.find(_QUERIES, _K)


def test_vectors_of_many_uids_are_asked_for_together(
    embed: Artifact, index: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch search by uid; a uid that no row has fails alone."""
    tables = [pq.read_table(embed.path(f"{shard:05d}.parquet"), columns=["uid", "z_image"]) for shard in range(8)]
    stored = [row for table in tables for row in table.slice(5, 32).to_pylist()]
    uids: list[str | None] = [row["uid"] for row in stored]
    uids[3:3] = ["none", None, uids[0]]
    calls, read_parts = list[int](), EmbeddedShards.read_parts

    def count(self: EmbeddedShards, parts: Sequence[tuple[int, int, int]]) -> list[bytes]:
        calls.append(len(parts))
        return read_parts(self, parts)

    monkeypatch.setattr(EmbeddedShards, "read_parts", count)
    monkeypatch.setattr(far_files, "_REQUEST_BYTES", 0)
    _elsewhere(monkeypatch, tmp_path)
    no_clip: Any = None
    encoder = QueryEncoder(no_clip, Retriever.open(index))
    queries = pa.table({"uid": uids, PROBLEM: pa.nulls(len(uids), pa.string())})
    vectors, problems = encode_rows(queries, encoder, _DIM)
    assert calls == [8]  # vectors of a shard lie beside one another
    assert problems[3:5] == ["uid: uid none: no row of the index has it", "nothing to look for"]
    assert set(problems[:3] + problems[5:]) == {""}
    expected = np.array([row["z_image"] for row in [*stored[:3], stored[0], *stored[3:]]], np.float32)
    np.testing.assert_allclose(np.delete(vectors, [3, 4], axis=0), expected, atol=1e-3)
    np.testing.assert_array_equal(encoder.row(stored[9]["uid"]), encoder.rows([stored[9]["uid"]])[0][0])
    with pytest.raises(ConfigError, match="uid none: no row of the index has it"):
        encoder.row("none")


def test_a_filter_reads_columns_by_ranges_and_once(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workspace, num_shards, num_rows = Workspace(bucket), 20, 4
    embed, download = workspace.artifact("embed", "e"), workspace.artifact("download", "d")
    vectors = np.random.default_rng(0).normal(size=(num_shards * num_rows, _DIM)).astype(np.float32)
    make_embeddings(embed, vectors, vectors, num_rows)
    exif = np.random.default_rng(0).bytes(600_000).hex()
    for shard in range(num_shards):
        keys = [f"{shard:05d}{row:05d}" for row in range(num_rows)]
        columns = {"key": keys, "width": [100 * shard + row for row in range(num_rows)], "exif": [exif, "", "", ""]}
        with download.write(f"{shard:05d}.parquet") as path:
            pq.write_table(pa.table(columns), path, compression="none")
            assert path.stat().st_size > 1 << 20
    embed.commit(Manifest(step="embed", key="e", step_version=1, section={}, inputs={"download": "d"}))
    index = Artifact(str(tmp_path / "index"))
    build_index(embed, index, IndexConfig(kind="flat", recall_target=1.0), seed=0)
    _elsewhere(monkeypatch, tmp_path)
    retriever = Retriever.open(index)
    conditions = retriever.conditions("width >= 200")
    s3_server.counted()
    [first] = retriever.search(_QUERIES[:1], 80, conditions=conditions)
    requests = [request for request in s3_server.counted() if "/download/" in request.name]
    assert len({request.name for request in requests if request.name.endswith(".parquet")}) == num_shards
    assert {request.kind for request in requests} == {"HEAD", "ranged GET"}
    assert sum(request.num_bytes for request in requests) < num_shards * 300_000
    assert len(first.neighbours) == (num_shards - 2) * num_rows
    [second] = retriever.search(_QUERIES[1:2], 80, conditions=conditions)
    assert len(second.neighbours) == len(first.neighbours)
    assert s3_server.counted() == []

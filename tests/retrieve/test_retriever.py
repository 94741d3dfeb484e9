"""Search under conditions, on 3,000 rows whose order is known from exact arithmetic."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DataError
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import retriever, rows
from pipeline.retrieve.build import build_index
from pipeline.retrieve.columns import StoredColumns
from pipeline.retrieve.retriever import Conditions, Retriever
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import stored, unit
from tests.retrieve.segments import append
from tests.tiny.shards import make_embeddings, write_tar

_NUM_ROWS, _DIM, _PER_SHARD, _COPIES = 3000, 16, 1100, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """(embed, download): every picture is there five times, with a moment's noise; one row in 50 is wide."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(_NUM_ROWS // _COPIES, _DIM)).repeat(_COPIES, 0)
    vectors = pictures + 0.01 * rng.normal(size=pictures.shape)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[rng.permutation(_NUM_ROWS)].astype(np.float32)
    workspace = Workspace(str(folder))
    embed, download = workspace.artifact("embed", "e"), workspace.artifact("download", "d")
    make_embeddings(embed, vectors, vectors[::-1].copy(), _PER_SHARD)
    for number, shard in enumerate(embed.shard_records()):
        keys = pq.read_table(embed.path(f"{shard}.parquet"), columns=["key"]).column("key")
        widths = [512 if (number * _PER_SHARD + row) % 50 == 0 else 64 for row in range(len(keys))]
        failed = {"key": [f"{shard}99999"], "width": pa.array([None], pa.int32())}  # its table has failed rows, too
        table = pa.table({"key": keys, "width": pa.array(widths, pa.int32())})
        with download.write(f"{shard}.parquet") as path:
            pq.write_table(pa.concat_tables([pa.table(failed), table]), path)
    embed.commit(Manifest(step="embed", key="e", step_version=1, section={}, inputs={"download": "d"}))
    return embed, download


@pytest.fixture(scope="module", params=["flat", "ivf_sq8"])
def search(request: pytest.FixtureRequest, data: tuple[Artifact, Artifact]) -> Retriever:
    output = Workspace(data[0].uri.rsplit("/", 2)[0]).artifact("index", request.param)
    build_index(data[0], output, IndexConfig(kind=request.param, recall_target=1.0), seed=0)
    return Retriever.open(output)


def _vectors(data: tuple[Artifact, Artifact]) -> NDArray[np.float32]:
    return stored(data[0])


def _captions(order: NDArray[np.int64]) -> list[str]:
    return [f"caption {row}" for row in order]


def test_a_filter_that_few_rows_pass_still_gives_k_rows(search: Retriever, data: tuple[Artifact, Artifact]) -> None:
    vectors = _vectors(data)
    queries = vectors[[3, 7]] + np.float32(0.1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    wide = search.conditions("width >= 512 and contains(url, 'http')")
    for query, results in zip(queries, search.search(queries, 20, conditions=wide), strict=True):
        order = [row for row in np.argsort(-(vectors @ query)) if row % 50 == 0][:20]
        assert [one.caption for one in results.neighbours] == _captions(np.array(order))
        assert results.num_candidates >= 20 * 50 / 2
        assert (results.end, results.shortage(20)) == ("enough", "")


def test_an_exhausted_index_is_said(search: Retriever, data: tuple[Artifact, Artifact]) -> None:
    [results] = search.search(_vectors(data)[:1], 100, conditions=search.conditions("width >= 512"))
    assert len(results.neighbours) == 60
    assert results.shortage(100) == "only 60 of 100: all 3,000 rows of the index were looked at"
    [results] = search.search(_vectors(data)[:1], 10, conditions=search.conditions("width > 9000"))
    assert results.neighbours == []
    assert results.shortage(10).startswith("only 0 of 10")


def test_a_search_that_reaches_its_limit_is_said(search: Retriever, data: tuple[Artifact, Artifact]) -> None:
    conditions = dataclasses.replace(search.conditions("width >= 512"), max_candidates=500)
    [results] = search.search(_vectors(data)[:1], 100, conditions=conditions)
    assert 0 < len(results.neighbours) < 60
    assert "the 500 nearest rows, the most that one search looks at" in results.shortage(100)


def test_near_duplicates_are_one_row_and_k_rows_survive(search: Retriever, data: tuple[Artifact, Artifact]) -> None:
    vectors = _vectors(data)
    [results] = search.search(vectors[:1], 40, conditions=Conditions(distinct=0.97))
    assert len(results.neighbours) == 40
    rows = np.array([int(one.caption.split()[1]) for one in results.neighbours])
    cosines = vectors[rows] @ vectors[rows].T
    assert (cosines[~np.eye(40, dtype=bool)] < 0.97).all()
    assert rows[0] == 0
    # Each is the nearest of its copies, and no picture between them is left out.
    order = np.argsort(-(vectors @ vectors[0]))
    expected: list[int] = []
    for row in order:
        if all(vectors[row] @ vectors[one] < 0.97 for one in expected):
            expected.append(int(row))
    assert rows.tolist() == expected[:40]


def test_near_duplicates_are_read_in_blocks_and_no_further_than_k(
    search: Retriever, data: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, distinct = _vectors(data)[:1], Conditions(distinct=0.97)
    whole, sizes, read = search.search(query, 40, conditions=distinct), list[int](), search.index.vectors

    def note(ids: NDArray[np.int64], *rest: Any) -> NDArray[np.float32]:
        sizes.append(len(ids))
        return read(ids, *rest)

    monkeypatch.setattr(search.index, "vectors", note)
    monkeypatch.setattr(retriever, "_DISTINCT_ROWS", 7)
    assert search.search(query, 40, conditions=distinct) == whole
    assert max(sizes) == 7
    [ids] = search.index.search(query, 3000)[1]
    sizes.clear()
    assert search._distinct(ids, 0.97, 2) == [0, 5]
    assert sum(sizes) == 7  # of 3,000


def test_both_conditions_hold_at_once(search: Retriever, data: tuple[Artifact, Artifact]) -> None:
    conditions = search.conditions("width == 512", distinct=0.97)
    [results] = search.search(_vectors(data)[:1], 30, conditions=conditions)
    rows = [int(one.caption.split()[1]) for one in results.neighbours]
    assert len(rows) == 30
    assert all(row % 50 == 0 for row in rows)


def test_more_queries_than_fit_at_once_give_the_same_rows(
    search: Retriever, data: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, wide = _vectors(data)[:9], search.conditions("width >= 512")
    together = search.search(queries, 5, conditions=wide)
    monkeypatch.setattr(retriever, "_CANDIDATES_AT_ONCE", 100)
    assert search.search(queries, 5, conditions=wide) == together


@pytest.mark.parametrize(
    ("where", "read"), [("contains(caption, '7')", {"caption"}), ("width >= 512", {"shard", "key"})]
)
def test_a_filter_reads_its_own_columns_of_the_candidates(
    where: str, read: set[str], search: Retriever, data: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions, columns, take = search.conditions(where), list[set[str]](), rows.Rows.columns

    def note(self: rows.Rows, *arguments: Any) -> pa.Table:
        table = take(self, *arguments)
        columns.append(set(table.column_names))
        return table

    monkeypatch.setattr(rows.Rows, "columns", note)
    [results] = search.search(_vectors(data)[:1], 5, conditions=conditions)
    assert len(results.neighbours) == 5
    assert columns
    assert all(names == read for names in columns)


def test_a_filter_by_an_unknown_column_lists_the_columns(search: Retriever) -> None:
    with pytest.raises(ConfigError, match=r"no column 'hight'; .*there are .*width"):
        search.conditions("hight > 3")
    with pytest.raises(ConfigError, match="no column 'z_image'"):
        search.conditions("z_image > 3")


def test_a_filter_lists_no_artifact_to_learn_its_columns(search: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand shards are minutes of listings, in every worker."""

    def names(_artifact: Artifact) -> list[str]:
        raise AssertionError("all files were listed")

    monkeypatch.setattr(Artifact, "names", names)
    fields = Retriever(search.index).fields
    assert fields["width"] == pa.int32()
    assert fields["caption"] == pa.string()


def test_columns_come_in_the_order_of_the_rows(data: tuple[Artifact, Artifact]) -> None:
    columns = StoredColumns(list(data), "00001")
    shards, keys = ["00001", "00000", "00001"], ["0000100001", "0000000050", "0000100000"]
    table = columns.take(shards, keys, ["width", "caption"])
    assert table.to_pydict() == {
        "width": [64, 512, 512],
        "caption": ["caption 1101", "caption 50", "caption 1100"],
    }
    assert columns.take([], [], ["width"]).num_rows == 0
    with pytest.raises(DataError, match="shard 00000: key none: no such row"):
        columns.take(["00000"], ["none"], ["width"])


def test_rows_of_several_sources_have_their_own_columns_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads whose shards and keys have the same names; one of them has other columns and types, one has none."""
    workspace, config = Workspace(str(tmp_path)), IndexConfig(kind="flat", num_recall_queries=2)
    vectors = unit(np.random.default_rng(0).normal(size=(9, 8)))
    index = workspace.artifact("index", "i")
    for number, name in enumerate(("first", "second", "third")):
        embed, download = workspace.artifact("embed", name), workspace.artifact("download", name)
        part = vectors[3 * number : 3 * number + 3]
        make_embeddings(embed, part, part, 3, first=3 * number)
        inputs = {} if name == "third" else {"download": name}
        embed.commit(Manifest(step="embed", key=name, step_version=1, section={}, inputs={"clip": "c"} | inputs))
        rows = pq.read_table(embed.path("00000.parquet")).select(["key", "uid"]).to_pylist()
        columns = {"key": [row["key"] for row in rows], "width": [number] * 3, "score": [0.25, 0.5, None]}
        if name == "second":  # as a list in csv
            columns |= {"width": [1.0] * 3, "height": [7, 8, 9], "score": ["0.5", "0.75", "none"]}
        with download.write("00000.parquet") as path:
            pq.write_table(pa.table(columns), path)
        with download.write("00000.tar") as path:
            files = [(row["key"], json.dumps(row).encode()) for row in rows]
            write_tar(path, [(f"{key}.{kind}", data) for key, text in files for kind, data in _files(name, text)])
        if number == 0:
            build_index(embed, index, config, seed=0)
            continue
        append(index, embed, config)
    search = Retriever.open(index)

    def numbers(where: str) -> list[int]:
        [results] = search.search(vectors[:1], 9, conditions=search.conditions(where))
        return sorted(int(one.caption.split()[1]) for one in results.neighbours)

    assert numbers("width >= 1") == [3, 4, 5]
    assert numbers("height > 7") == [4, 5]
    assert numbers("number(score) >= 0.5") == [1, 3, 4]
    assert numbers("score is None or contains(score, 'none')") == [2, 5, 6, 7, 8]
    with pytest.raises(ConfigError, match=r"score is text; number\(NAME\) reads a text as a number"):
        search.conditions("score >= 0.5")
    assert numbers("height is None and split == 'train'") == [0, 1, 2, 6, 7, 8]
    [results] = search.search(vectors[:1], 9)
    results = {int(one.caption.split()[1]): one for one in results.neighbours}
    assert [search.picture(results[row]) for row in (0, 5)] == [b"first", b"second"]
    located: list[int] = []
    locate = search.index._locate
    monkeypatch.setattr(search.index, "_locate", lambda ids: (located.append(len(ids)), locate(ids))[1])
    widths = search.columns(np.array([results[row].id for row in (8, 0, 4, 1)]), ["width"])
    assert (widths.column("width").to_pylist(), located) == ([None, 0, 1, 0], [4, 4])  # of all rows, not one by one
    with pytest.raises(DataError, match="these embeddings name no download"):
        search.picture(results[8])


def _files(name: str, row: bytes) -> list[tuple[str, bytes]]:
    return [("jpg", name.encode()), ("json", row)]


def test_an_index_whose_rows_are_all_deleted_gives_none(data: tuple[Artifact, Artifact]) -> None:
    from pipeline.retrieve.index import NeighbourIndex

    class Empty(NeighbourIndex):
        num_rows = 0  # type: ignore[assignment]

    [results] = Retriever(Empty([], 0)).search(_vectors(data)[:1], 3)
    assert results.shortage(3) == "only 0 of 3: all 0 rows of the index were looked at"


def test_a_search_without_conditions_makes_no_tables(
    search: Retriever, data: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A table of ten rows from ten batches took most of a search.
    queries = _vectors(data)[:2]
    before = search.search(
        queries, 10, conditions=Conditions(max_candidates=10, where=search.conditions("width > 0").where)
    )
    monkeypatch.setattr(rows.Rows, "columns", None)
    plain = search.search(queries, 10)
    assert [[near.uid for near in one.neighbours] for one in plain] == [
        [near.uid for near in one.neighbours] for one in before
    ]
    assert {(one.num_candidates, one.end) for one in plain} == {(10, "enough")}
    [more] = search.search(queries[:1], _NUM_ROWS + 1)
    assert (len(more.neighbours), more.end, more.num_candidates) == (_NUM_ROWS, "index", _NUM_ROWS)

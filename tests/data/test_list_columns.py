"""The columns of a list: how they are found, and in which types their cells may be stored."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import list_columns
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.reading import MAX_CELL, name_examples
from pipeline.data.sources import Source
from pipeline.errors import DataError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.workspace.store import Artifact
from tests.data.listing import read_rows


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("cc3m.tsv", "a caption\thttp://a/1.jpg", ("http://a/1.jpg", "a caption")),
        ("cc12m.tsv", "http://a/1.jpg\ta caption", ("http://a/1.jpg", "a caption")),
        ("list.csv", 'https://a/1.jpg,"a caption, quoted"', ("https://a/1.jpg", "a caption, quoted")),
    ],
)
def test_a_list_without_a_header_is_seen_by_its_first_url(
    name: str, first: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(f"{first}\n{first}\n")
    pairs, _ = read_rows(tmp_path / name)
    assert pairs == [expected, expected]
    assert set(list_columns(str(tmp_path / name))) == {"url", "caption"}


@pytest.mark.parametrize(
    "names",
    [
        ("URL", "TEXT"),  # LAION-400M, LAION-5B
        ("url", "text"),  # DataComp, COYO
        ("image_url", "caption"),
        ("Url", "Caption"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_are_found_by_the_names_of_public_lists(names: tuple[str, str], kind: str, tmp_path: Path) -> None:
    row = {"SAMPLE_ID": "1", names[0]: "http://a/1", names[1]: "one", "similarity": "0.3"}
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) if kind == "csv" else json.dumps(row))
    assert read_rows(path)[0] == [("http://a/1", "one")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_named_twice_is_refused_only_if_it_is_needed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        path.write_text('{"url": "http://a/1", "caption": "x", "caption": "y"}')
        assert read_rows(path)[0] == [("http://a/1", "y")]  # as every JSON reader does
        return
    cells = [["http://a/1"], ["x"], ["y"]]
    for names in (["url", "caption", "caption"], ["url", "caption", "other"]):
        if kind == "csv":
            path.write_text(f"{','.join(names)}\nhttp://a/1,x,y\n")
        else:
            pq.write_table(pa.Table.from_arrays([pa.array(cell) for cell in cells], names=names), path)
        if "other" in names:
            assert read_rows(path)[0] == [("http://a/1", "x")]
        else:
            with pytest.raises(DataError, match=rf"list.{kind}: has column caption 2 times"):
                read_rows(path)


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[list[str]] = []
    read = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["columns"])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    row = {"url": "http://a/1", "caption": "x", "embedding": [0.1] * 8, "nsfw": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "list.parquet")
    read_rows(tmp_path / "list.parquet")
    read_rows(tmp_path / "list.parquet", ListColumns(extra=("nsfw",)))
    assert names == [["url", "caption"], ["url", "caption", "nsfw"]]


_BAD_PARQUET: dict[str, pa.Array] = {
    "invalid UTF-8": pa.array([b"fine", b"caf\xe9"], pa.binary()),
    "a huge caption": pa.array(["fine", "x" * (MAX_CELL + 1)]),
    "text that is no UTF-8": pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"fine", b"caf\xe9"], pa.binary()).buffers()
    ),
}


@pytest.mark.parametrize("name", _BAD_PARQUET)
def test_a_strange_cell_of_parquet_is_counted_with_its_row(name: str, tmp_path: Path) -> None:
    table = pa.table({"url": ["http://a/1", "http://a/2"], "caption": _BAD_PARQUET[name]})
    pq.write_table(table, tmp_path / "list.parquet")
    pairs, reading = read_rows(tmp_path / "list.parquet")
    assert pairs == [("http://a/1", "fine")]
    assert reading.counts["malformed"] == 1
    assert name_examples([reading])[0].startswith(f"{tmp_path}/list.parquet:2: ")


def _not_utf8(*cells: bytes) -> pa.Array:
    """A column of texts whose bytes nobody has looked at."""
    return pa.Array.from_buffers(pa.string(), len(cells), pa.array(cells, pa.binary()).buffers())


_EXTRA_COLUMNS: dict[str, pa.Array] = {
    "bytes": pa.array([b"UNLIKELY", b"caf\xe9", b"NSFW"], pa.binary()),
    "many bytes": pa.array([b"UNLIKELY", b"caf\xe9", b"NSFW"], pa.large_binary()),
    "bytes of one size": pa.array([b"UNLIKELY", b"caf\xe9    ", b"    NSFW"], pa.binary(8)),
    "texts": _not_utf8(b"UNLIKELY", b"caf\xe9", b"NSFW"),
    "a dictionary": pa.array([b"UNLIKELY", b"caf\xe9", b"NSFW"], pa.binary()).dictionary_encode(),
    "lists": pa.ListArray.from_arrays([0, 1, 3, 4], _not_utf8(b"UNLIKELY", b"a", b"caf\xe9", b"NSFW")),
}


@pytest.mark.parametrize("name", _EXTRA_COLUMNS)
def test_a_cell_that_is_no_utf8_in_any_column_of_parquet_costs_its_row_alone(name: str, tmp_path: Path) -> None:
    urls = [f"http://a/{number}" for number in range(3)]
    table = pa.table({"url": urls, "caption": list("abc"), "nsfw": _EXTRA_COLUMNS[name]})
    pq.write_table(table, tmp_path / "list.parquet")
    output = Artifact(str(tmp_path / "pairs"))
    source = Source(PairsConfig(source="list", path=str(tmp_path / "list.parquet")), extra_columns=("nsfw",))
    summary = write_pairs(source, output)
    assert summary.counts == {"in": 3, "ok": 2, "malformed": 1}
    assert summary.metrics["malformed_rows"] == [f"{tmp_path}/list.parquet:2: column nsfw is not UTF-8"]
    rows = Pairs(output).read(0, 2, ["url", "nsfw"]).to_pylist()
    texts = ['["UNLIKELY"]', '["NSFW"]'] if name == "lists" else ["UNLIKELY", "NSFW"]
    assert [(row["url"], row["nsfw"].strip()) for row in rows] == [(urls[0], texts[0]), (urls[2], texts[1])]


@pytest.mark.parametrize(
    ("column", "captions"),
    [
        (pa.nulls(2), [None, None]),
        (pa.array([float("nan")] * 2), [None, None]),  # a pandas column without any text
        (pa.array([1, 2]), ["1", "2"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
        (pa.array(["x", None], pa.string_view()), ["x", None]),
    ],
)
def test_captions_of_parquet_may_be_stored_in_many_types(column: pa.Array, captions: list[Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/1", "http://a/2"], "caption": column}), tmp_path / "list.parquet")
    assert [caption for _, caption in read_rows(tmp_path / "list.parquet")[0]] == captions


@pytest.mark.parametrize("column", [pa.array([["a", "b"]]), pa.array([0.5]), pa.array([True]), pa.array([{"a": "b"}])])
def test_a_parquet_column_of_no_texts_is_refused_by_name(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": column}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"list\.parquet: column caption is .*, not text"):
        read_rows(tmp_path / "list.parquet")

"""Lists of queries: every format gives the same numbered rows, a row group for each part."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.retrieve import query_list
from pipeline.retrieve.queries import read_embedding, to_direction
from pipeline.retrieve.query_list import num_parts, write_queries

_TEXTS = ["a red circle", 'with "quotes", a comma', "caf\u00e9"]


def _read(source: Path, tmp_path: Path) -> pa.Table:
    target = tmp_path / "queries.parquet"
    assert write_queries(source, target) == pq.read_metadata(target).num_rows
    table = pq.read_table(target)
    assert table.column("problem").null_count == len(table)
    return table.drop_columns(["problem"])


@pytest.mark.parametrize("name", ["q.txt", "q.txt.gz", "q.csv", "q.tsv", "q.jsonl", "q.ndjson.gz", "q.parquet"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    quoted = "".join('"{}",x\n'.format(text.replace('"', '""')) for text in _TEXTS)
    content = {
        "txt": "\ufeff" + "\r\n".join(_TEXTS) + "\r\n",
        "csv": "Query,other\n" + quoted,
        "tsv": "other\tprompt\n" + "".join(f"x\t{text}\n" for text in _TEXTS),
        "jsonl": "\n".join(json.dumps({"text": text, "other": [1]}) for text in _TEXTS),
        "ndjson": "\n".join(json.dumps({"caption": text}) for text in _TEXTS),
    }
    if name == "q.parquet":
        pq.write_table(pa.table({"text": _TEXTS, "z": [[1]] * 3}), path)
    else:
        data = content[name.split(".")[1]].encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert _read(path, tmp_path).to_pydict() == {"query": [0, 1, 2], "text": _TEXTS}


def test_vectors_are_queries(tmp_path: Path) -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "q.npy", vectors)
    pq.write_table(pa.table({"vector": vectors.tolist(), "uid": ["a", None, "b"]}), tmp_path / "q.parquet")
    for name in ("q.npy", "q.parquet"):
        table = _read(tmp_path / name, tmp_path)
        assert table.column("embedding").to_pylist() == vectors.tolist()
    assert table.column("uid").to_pylist() == ["a", None, "b"]


def test_integers_that_float64_rounds_are_vectors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"vector": [[1, 2], [2**53 + 1, 0]]}), tmp_path / "q.parquet")
    assert _read(tmp_path / "q.parquet", tmp_path).column("embedding").to_pylist() == [[1, 2], [2**53, 0]]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "<f16"])
@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_a_vector_of_any_length_is_the_direction_that_a_single_search_reads(
    suffix: str, dtype: str, tmp_path: Path
) -> None:
    lengths = {2: [1e-3, 1e3], 4: [1e-9, 1e5, 1e30], 8: [1e-150, 1e100], 16: [1e-150, 1e100]}[np.dtype(dtype).itemsize]
    directions = np.random.default_rng(0).normal(size=(len(lengths), 6))
    vectors = (directions * np.array(lengths)[:, None]).astype(dtype)
    path, lists = tmp_path / f"q{suffix}", vectors.astype(np.float64).tolist()
    if suffix == ".npy":
        np.save(path, vectors)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"embedding": one}) for one in lists))
    else:
        pq.write_table(pa.table({"embedding": lists}), path)
    for value, vector in zip(_read(path, tmp_path).column("embedding").to_pylist(), vectors, strict=True):
        alone = tmp_path / "one.npy"
        np.save(alone, vector)
        assert to_direction(value, 6).tolist() == read_embedding(str(alone), 6).tolist()


@pytest.mark.parametrize("name", ["q.txt", "q.parquet", "q.jsonl"])
def test_parts_have_equal_sizes_whatever_the_blocks_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_list, "PART_ROWS", 7)
    texts = [f"text {number}" for number in range(24)]
    if name == "q.parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=5)
    else:
        lines = texts if name == "q.txt" else [json.dumps({"text": text}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines))
    table, target = _read(tmp_path / name, tmp_path), tmp_path / "queries.parquet"
    assert table.to_pydict() == {"query": list(range(24)), "text": texts}
    assert num_parts(target) == 4
    assert [pq.read_metadata(target).row_group(part).num_rows for part in range(4)] == [7, 7, 7, 3]


def test_empty_lines_are_no_texts_and_keep_their_number(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a\n\n  \nb\n")
    assert _read(tmp_path / "q.txt", tmp_path).column("text").to_pylist() == ["a", None, None, "b"]


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        (
            "q.jsonl",
            [
                '{"text": "first"}',
                '{"text": 5}',
                "[1]",
                '{"text": ',
                '{"text": ' + "[" * 200_000,
                '{"text": "\\ud83d"}',
                '{"embedding": [1, "a"]}',
                '{"embedding": [1' + "0" * 400 + "]}",
                '{"text": "last", "embedding": [1, 2.5]}',
            ],
            {
                1: "line 2: text: not a text",
                2: "line 3: no record",
                3: "line 4: not JSON",
                4: "line 5: not JSON",
                5: "line 6: text: .*surrogate",
                6: "line 7: embedding: not a list of numbers",
                7: "line 8: embedding: .*too large",
            },
        ),
        (
            "q.csv",
            ["id,text", "1,first", "2", "3,a,b", '4,"open', "5,last"],
            {1: "3: 1 c", 2: "4: 3 c", 3: "5: a quote"},
        ),
        ("q.tsv", ["id\ttext", "1\tfirst", "2", "5\tlast"], {1: "line 3: 1 cells, not 2"}),
    ],
)
def test_a_row_that_is_no_query_keeps_its_place_and_stops_nothing(
    name: str, content: list[str], problems: dict[int, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("\n".join(content))
    target = tmp_path / "queries.parquet"
    num_rows = write_queries(tmp_path / name, target)
    table = pq.read_table(target)
    assert table.column("query").to_pylist() == [*range(num_rows)]
    texts = table.column("text").to_pylist()
    assert (texts[0], texts[-1], set(texts[1:-1])) == ("first", "last", {None})
    problems_of_rows = {row: problem for row, problem in enumerate(table.column("problem").to_pylist()) if problem}
    assert problems_of_rows.keys() == problems.keys()
    assert all(re.search(words, problems_of_rows[row]) for row, words in problems.items()), problems_of_rows


def test_texts_of_any_arrow_type_are_texts_and_the_first_of_two_columns_counts(tmp_path: Path) -> None:
    texts = pa.array(_TEXTS)
    for column in (texts.dictionary_encode(), texts.cast(pa.large_string()), texts.cast(pa.string_view())):
        pq.write_table(pa.table([column, pa.array(["x"] * 3)], names=["text", "text"]), tmp_path / "q.parquet")
        assert _read(tmp_path / "q.parquet", tmp_path).column("text").to_pylist() == _TEXTS


@pytest.mark.parametrize("cells", [[[[1.0]]], [[{"a": 1}]], [["1"]], [1.0]])
def test_a_column_of_other_things_than_lists_of_numbers_is_refused(cells: list[object], tmp_path: Path) -> None:
    pq.write_table(pa.table({"vector": cells}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"q\.parquet: column vector is .*, not lists of numbers"):
        write_queries(tmp_path / "q.parquet", tmp_path / "queries.parquet")


def test_several_arrays_in_one_file_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "q.npy").open("wb") as stream:
        np.savez(stream, a=np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"q\.npy: several arrays \(\.npz\)"):
        write_queries(tmp_path / "q.npy", tmp_path / "queries.parquet")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("q.txt", "line 2: not UTF-8 (invalid start byte at byte 1 of the line)"),
        ("q.csv", "line 3: not UTF-8 (invalid start byte at byte 1 of the line)"),
        ("q.parquet", "caption: not UTF-8 (invalid start byte at byte 1)"),
    ],
)
def test_a_row_that_is_no_text_fails_alone(name: str, problem: str, tmp_path: Path) -> None:
    cells = [b"cat", b"d\xff\xfe", b"caf\xc3\xa9", b""]
    if name == "q.parquet":
        column = pa.array(cells, pa.binary()).cast(pa.string(), safe=False)
        pq.write_table(pa.table({"caption": column, "uid": ["a", "b", None, "d"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"\n".join([b"text"] * (name == "q.csv") + cells[:3]) + b"\n")
    target = tmp_path / "queries.parquet"
    num_rows = write_queries(tmp_path / name, target)
    table = pq.read_table(target)
    assert table.column("text").to_pylist() == ["cat", None, "caf\u00e9", None][:num_rows]
    assert table.column("problem").to_pylist() == [None, problem, None, None][:num_rows]


def test_what_only_later_rows_have_fails_them_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_list, "PART_ROWS", 2)
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c", "uid": "u"}, {"text": "d", "uid": None}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert write_queries(tmp_path / "q.jsonl", tmp_path / "queries.parquet") == 4
    problems = pq.read_table(tmp_path / "queries.parquet").column("problem").to_pylist()
    assert problems == [None, None, "it has uid, unlike the first 2 rows", None]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("q.csv", "id,name\n1,a\n", "no column text, image, uid, embedding .*it has id, name"),
        ("q.csv", "text,vector\na,b\n", "column vector is text, not lists of numbers"),
        ("q.jsonl", '[1]\n{"text": \n', "line 1: no record, which begins with {"),
        ("q.jsonl", '{"text": 3}\n', "line 1: text: not a text"),
        ("q.jsonl", '{"embedding": "a"}\n', "line 1: embedding: not a list of numbers"),
        ("q.jsonl", '{"id": "a"}\n', "no column text, image"),
        ("q.csv", "text\n", "holds no queries"),
        ("q.txt", "", "holds no queries"),
        ("q.csv", "\ufeff".encode("utf-16").decode("latin-1"), "UTF-16; convert it to UTF-8"),
        ("q.parquet", "junk", "cannot be read"),
        ("q.npy", "junk", "cannot be read"),
        ("q.doc", "a", "not a list of queries; it may be .txt, .csv"),
        ("none", None, "not a list of queries"),
        ("none.txt", None, "no such file"),
    ],
)
def test_a_wrong_list_is_refused_by_name(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=rf"{name}.*: .*{words}"):
        write_queries(tmp_path / name, tmp_path / "queries.parquet")

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.drawn import drawn_batches, write_evaluation
from pipeline.data.lists import BATCH_ROWS, list_columns
from pipeline.data.make_pairs import PairsSummary, write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.rows import make_uid, split_of
from pipeline.data.sources import Source, count_pairs
from pipeline.errors import DataError
from pipeline.recipe.pairs_sections import DrawnConfig, PairsConfig
from pipeline.shapes.url_list import FAULTS
from pipeline.workspace.store import Artifact
from tests.data.conftest import make_picture

_ROWS: list[dict[str, Any]] = [
    {"url": "http://a/1.jpg", "caption": "one, \"quoted\"\nand broken", "score": 0.5},
    {"url": "http://a/2.jpg", "caption": None, "score": 1.5},
    {"url": "http://a/1.jpg", "caption": "one, \"quoted\"\nand broken", "score": 9.0},
    {"url": "", "caption": "no url", "score": 0.0},
    {"url": " http://a/3.jpg ", "caption": "drei \u00e4pfel", "score": None},
]  # fmt: skip


def _write_delimited(path: Path) -> None:
    """As a spreadsheet writes it: with a byte order mark; in tsv nothing is quoted, so a line end becomes a space."""
    text = io.StringIO()
    rows = [["url", "caption", "score"], *([row[name] for name in ("url", "caption", "score")] for row in _ROWS)]
    if path.suffix == ".csv":
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    else:
        cells = [["" if cell is None else str(cell).replace("\n", " ") for cell in row] for row in rows]
        text.write("\r\n".join("\t".join(row) for row in cells))
    path.write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")


_WRITERS: dict[str, Callable[[Path], Any]] = {
    "csv": _write_delimited,
    "tsv": _write_delimited,
    "json": lambda path: path.write_text(json.dumps(_ROWS)),
    "jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in _ROWS)),
    "ndjson": lambda path: path.write_text("\n".join(json.dumps(row) for row in _ROWS)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(_ROWS), path, row_group_size=2),
}


def _run(config: PairsConfig, folder: Path, *extra_columns: str) -> tuple[pa.Table, PairsSummary]:
    output = Artifact(str(folder / "output"))
    summary = write_pairs(Source(config, extra_columns=extra_columns), output)
    pairs = Pairs(output)
    table = pairs.read(0, pairs.num_rows, pairs.columns)
    for name in output.names():
        output.remove(name)
    return table, summary


_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", ["", *_COMPRESS])
@pytest.mark.parametrize("kind", _WRITERS)
def test_pairs_reads_the_same_rows_from_every_format(kind: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"list.{kind}"
    _WRITERS[kind](path)
    if compression:
        if kind == "parquet":
            pytest.skip("Parquet compresses its columns itself")
        data = _COMPRESS[compression](path.read_bytes())
        path = path.with_name(f"{path.name}.{compression}")
        path.write_bytes(data)
    assert list_columns(str(path)) == ["url", "caption", "score"]
    table, summary = _run(PairsConfig(source="list", path=str(path), validation_prob=0.5), tmp_path, "score")
    quoted = _ROWS[0]["caption"].replace("\n", " ") if kind == "tsv" else _ROWS[0]["caption"]
    urls, captions = ["http://a/1.jpg", "http://a/2.jpg", "http://a/3.jpg"], [quoted, "", "drei \u00e4pfel"]
    assert table.column("url").to_pylist() == urls
    assert table.column("caption").to_pylist() == captions
    assert table.column("uid").to_pylist() == [make_uid(*pair) for pair in zip(urls, captions, strict=True)]
    assert summary.counts == {"in": 5, "ok": 3, "duplicate": 1, "missing_url": 1}
    assert summary.metrics["empty_captions"] == 1
    assert summary.metrics["train"] + summary.metrics["validation"] == 3
    scores = table.column("score")
    assert [None if value in {None, ""} else float(value) for value in scores.to_pylist()] == [0.5, 1.5, None]


def test_pairs_reads_a_plain_list_of_urls(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("\ufeffhttp://a/1.jpg\n\nhttp://a/2.jpg\r\n")
    table, summary = _run(PairsConfig(source="list", path=str(tmp_path / "urls.txt")), tmp_path)
    assert table.select(["url", "caption"]).to_pylist() == [
        {"url": "http://a/1.jpg", "caption": ""},
        {"url": "http://a/2.jpg", "caption": ""},
    ]
    assert summary.counts == {"in": 2, "ok": 2}
    assert summary.metrics["empty_captions"] == 2


def test_pairs_takes_named_columns_and_keeps_a_lists_own_uid(tmp_path: Path) -> None:
    rows = pa.table(
        {"uid": ["x", "y"], "URL": ["http://a/1", "http://a/2"], "TEXT": ["one", "two"], "punsafe": [0.1, 0.2]}
    )
    pq.write_table(rows, tmp_path / "laion.parquet")
    config = PairsConfig(source="list", path=str(tmp_path / "laion.parquet"), url_column="URL", caption_column="TEXT")
    table, _ = _run(config, tmp_path, "source_uid", "punsafe")
    assert table.column_names == ["uid", "url", "caption", "split", "source_uid", "punsafe"]
    assert table.column("source_uid").to_pylist() == ["x", "y"]
    assert table.schema.field("punsafe").type == pa.float64()
    table, _ = _run(PairsConfig(source="list", path=str(tmp_path / "laion.parquet")), tmp_path)
    assert table.column_names == ["uid", "url", "caption", "split"]


def test_pairs_streams_a_folder_of_parts_and_stops_at_max_pairs(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in range(3):
        urls = [f"http://a/{part}/{i}" for i in range(BATCH_ROWS + 5)]
        pq.write_table(pa.table({"url": urls, "caption": urls}), parts / f"{part}.parquet")
    table, summary = _run(PairsConfig(source="list", path=str(parts), max_pairs=BATCH_ROWS + 7), tmp_path)
    assert table.num_rows == summary.counts["in"] == BATCH_ROWS + 7
    assert table.column("url")[-1].as_py() == "http://a/1/1"


def test_pairs_counts_lines_that_cannot_be_parsed(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption\nhttp://a/1,one\nhttp://a/2,two,three\nhttp://a/4,four\n")
    (tmp_path / "list.jsonl").write_text('{"url": "http://a/1", "caption": "one"}\n{"url": \n[1]\n')
    _, summary = _run(PairsConfig(source="list", path=str(tmp_path / "list.csv")), tmp_path)
    assert summary.counts == {"in": 3, "ok": 2, "malformed": 1}
    _, summary = _run(PairsConfig(source="list", path=str(tmp_path / "list.jsonl")), tmp_path)
    assert summary.counts == {"in": 3, "ok": 1, "malformed": 2}
    assert summary.metrics["malformed_rows"][1] == f"{tmp_path}/list.jsonl:3: no record, which begins with {{"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"link,text\nhttp://a/1,one\n", r"a\.csv: no column adress; it has link, text"),
        ("a.parquet", b"PAR1 but no Parquet", r"a\.parquet: damaged, or not what its name says"),
        ("a.csv.gz", b"not gzip", r"a\.csv\.gz: damaged"),
        ("a.json", b'{"url": 3}', r"a\.json: must hold a list of records"),
        ("a.xlsx", b"", r"a\.xlsx: not a list that unclip reads \(parquet, csv"),
        ("a.csv", b"url,caption\n,one\n", r"no usable row among 1: .*'missing_url': 1"),
        ("a.csv", b"", r"a\.csv: .*"),
    ],
)
def test_pairs_says_what_is_wrong_with_a_list(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    url_column = "adress" if "adress" in message else ""
    with pytest.raises(DataError, match=message):
        _run(PairsConfig(source="list", path=str(tmp_path / name), url_column=url_column), tmp_path)


def test_pairs_finds_the_captions_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(["a.jpg", "b.PNG", "c.webp", "sub/red_car-on the_road 01.jpeg", ".hidden.jpg"]):
        (folder / name).write_bytes(make_picture(index))
    (folder / "a.txt").write_text("from txt\n")
    (folder / "b.caption").write_text("from caption")
    (folder / "c.json").write_text(json.dumps({"caption": "from json"}))
    table, summary = _run(PairsConfig(source="folder", path=str(folder)), tmp_path)
    assert table.column("caption").to_pylist() == ["from txt", "from caption", "from json", "red car on the road"]
    assert table.column("caption_source").to_pylist() == ["sidecar", "sidecar", "sidecar", "name"]
    assert table.column("url")[0].as_py() == (folder / "a.jpg").resolve().as_uri()
    assert summary.counts == {"in": 4, "ok": 4}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_pairs_reads_a_folders_metadata_file(name: str, tmp_path: Path) -> None:
    for index, picture in enumerate(["a.jpg", "b.jpg"]):
        (tmp_path / picture).write_bytes(make_picture(index))
    rows = [{"file_name": "a.jpg", "text": "from metadata"}]
    if name.endswith("csv"):
        (tmp_path / name).write_text("file_name,text\na.jpg,from metadata\n")
    else:
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    table, _ = _run(PairsConfig(source="folder", path=str(tmp_path)), tmp_path)
    assert table.column("caption").to_pylist() == ["from metadata", "b"]
    assert table.column("caption_source").to_pylist() == ["metadata", "name"]


def test_pairs_of_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures"):
        _run(PairsConfig(source="folder", path=str(tmp_path)), tmp_path)


def test_drawn_source_holds_every_fault_and_repeats_itself(tmp_path: Path) -> None:
    config = PairsConfig(drawn=DrawnConfig(num_pairs=40, num_faulty=9, port=1234))
    tables: list[pa.Table] = []
    for name in ("one", "two"):
        summary = write_pairs(Source(config, seed=5), Artifact(str(tmp_path / name)))
        assert summary.counts == {"in": 49, "ok": 49}
        tables.append(pq.read_table(tmp_path / name / "00000.parquet"))
    assert (tmp_path / "one/00000.parquet").read_bytes() == (tmp_path / "two/00000.parquet").read_bytes()
    urls = tables[0].column("url").to_pylist()
    assert all(any(f"/faulty/{kind}/" in url for url in urls) for kind in FAULTS)
    assert sum(url.startswith("http://127.0.0.1:1234/5/128/") for url in urls) == 40


def test_evaluation_prompts_are_not_among_the_training_captions(tmp_path: Path) -> None:
    count = write_evaluation(tmp_path / "evaluation.parquet", 0)
    prompts = pq.read_table(tmp_path / "evaluation.parquet")
    assert prompts.num_rows == count >= 240
    assert len(set(prompts.column("prompt").to_pylist())) == count
    captions = {
        text for table in drawn_batches(DrawnConfig(num_pairs=3000), 0) for text in table.column("caption").to_pylist()
    }
    assert not captions & set(prompts.column("prompt").to_pylist())
    assert set(json.loads(prompts.column("scene")[0].as_py())) == {"objects", "background", "relation"}


@pytest.mark.parametrize(
    "name", ["pairs.csv", "pairs.tsv.gz", "pairs.jsonl", "pairs.json", "pairs.txt", "pairs.parquet"]
)
def test_count_pairs_counts_a_small_list(tmp_path: Path, name: str) -> None:
    rows = [{"url": f"http://h/{i}", "caption": "a picture"} for i in range(37)]
    lines = {"csv": "url,caption", "tsv": "url\tcaption"}
    kind = name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif kind == "json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        separator = {"csv": ",", "tsv": "\t"}.get(kind)
        header = [lines[kind]] if separator else []
        body = [separator.join(row.values()) if separator else json.dumps(row) for row in rows]
        body = [row["url"] for row in rows] if kind == "txt" else body
        data = ("\n".join([*header, *body]) + "\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    config = PairsConfig(source="list", path=str(tmp_path / name))
    assert count_pairs(config) == 37
    assert count_pairs(replace(config, max_pairs=5)) == 5


def test_count_pairs_estimates_a_list_that_is_longer_than_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.lists._SAMPLE_BYTES", 1000)
    path = tmp_path / "pairs.csv"
    path.write_text("url,caption\n" + "".join(f"http://h/{i:06d},a picture\n" for i in range(5000)))
    assert count_pairs(PairsConfig(source="list", path=str(path))) == pytest.approx(5000, rel=0.05)


def test_count_pairs_counts_drawn_pictures_and_those_of_a_folder(tmp_path: Path) -> None:
    assert count_pairs(PairsConfig(drawn=DrawnConfig(num_pairs=30, num_faulty=2))) == 32
    for name in ("a.png", "b.jpg", "c.txt"):
        (tmp_path / name).touch()
    assert count_pairs(PairsConfig(source="folder", path=str(tmp_path))) == 2


def test_a_uid_is_that_of_every_release_and_no_row_is_held_out_if_none_is_requested() -> None:
    assert make_uid("u", "c") == "f83e30bab19727a0baa8f3310891dcd0"
    assert len({make_uid("u", "c"), make_uid("u", "d"), make_uid("v", "c")}) == 3
    assert {split_of(f"http://a/{number}.jpg", 0.0) for number in range(4000)} == {"train"}

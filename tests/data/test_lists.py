"""Lists as people have them: every row is read as Python's own reader reads it, or counted with its file and line."""

import csv
import glob
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import BATCH_ROWS, Span, list_columns, list_files, list_spans, read_span
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.reading import MAX_CELL, Reading, name_examples
from pipeline.data.sources import Source
from pipeline.errors import DataError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.workspace.files import find_files
from pipeline.workspace.store import Artifact

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=20)
_CELL = _TEXT | st.sampled_from(
    ['"', '""', 'a "b" c', "x,y", "one\ntwo", "one\r\ntwo", " ", "", "\ufeff", "\x00", "\u2028"]
)
_LINE = _TEXT.map(lambda text: "".join(letter for letter in text if letter not in "\t\r\n"))


def _rows(path: Path, columns: ListColumns | None = None, num_bytes: int | None = None) -> tuple[list[Any], Reading]:
    """(url, caption) of every row that was read, and what was left out."""
    reading = Reading()
    spans = list_spans(str(path), num_bytes) if num_bytes else list_spans(str(path))
    tables = [table for span in spans for table in read_span(span, columns or ListColumns(), reading)]
    return [(row["url"], row["caption"]) for table in tables for row in table.to_pylist()], reading


@given(
    rows=st.lists(st.tuples(_CELL, _CELL, _CELL), max_size=12),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60, deadline=None)
def test_csv_is_read_as_by_pythons_own_reader(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], quoting: Any, end: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "list.csv"
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator=end).writerows([("n", "url", "caption"), *rows])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    with path.open(encoding="utf-8", newline="") as stream:
        expected = [tuple(row[1:]) for row in list(csv.reader(stream))[1:] if row]
    pairs, reading = _rows(path)
    assert pairs == expected
    assert not reading.counts["malformed"]


_BROKEN = st.sampled_from(['a,"b', 'a,"b" c', "a,b,c", "a", '"a', 'a,"b,c'])


@given(lines=st.lists(_LINE.filter(lambda text: '"' not in text) | _BROKEN, max_size=12))
@settings(max_examples=80, deadline=None)
def test_no_line_of_a_broken_csv_takes_another_with_it(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "list.csv"
    lines = [line for line in lines if not any(letter in line for letter in "\r\n\x1c\x1d\x1e\x85\u2028\u2029\x0b\x0c")]
    good = [f"http://a/{number},caption {number}" for number in range(len(lines) + 1)]
    mixed = [good[0]] + [line for pair in zip(lines, good[1:], strict=True) for line in pair]
    path.write_text("\n".join(["url,caption", *mixed]) + "\n", encoding="utf-8")
    pairs, reading = _rows(path)
    expected = [tuple(line.split(",")) for line in good]
    assert [row for row in pairs if row in expected] == expected
    others = [line for line in lines if line]
    assert len(pairs) + reading.counts["malformed"] == len(good) + len(others)


@given(rows=st.lists(st.tuples(_LINE, _LINE), max_size=12), end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=40, deadline=None)
def test_tsv_is_read_as_by_pythons_own_reader_without_quotes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str
) -> None:
    path = tmp_path_factory.mktemp("tsv") / "list.tsv"
    path.write_text(end.join("\t".join(row) for row in [("url", "caption"), *rows]), encoding="utf-8", newline="")
    with path.open(encoding="utf-8", newline="\n") as stream:
        lines = [line.rstrip("\r\n") for line in stream]
    expected = [tuple(next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))) for line in lines[1:] if line]
    pairs, reading = _rows(path)
    assert pairs == expected
    assert not reading.counts["malformed"]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    num_bytes=st.integers(1, 400),
    has_end=st.booleans(),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kind", ["tsv", "jsonl", "txt"])
def test_spans_of_a_file_hold_every_line_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, kind: str, lengths: list[int], num_bytes: int, has_end: bool
) -> None:
    path = tmp_path_factory.mktemp("spans") / f"list.{kind}"
    urls = [f"http://a/{number}/" + "x" * length for number, length in enumerate(lengths)]
    lines = {
        "tsv": ["url\tcaption", *(f"{url}\tc" for url in urls)],
        "jsonl": [json.dumps({"url": url, "caption": "c"}) for url in urls],
        "txt": urls,
    }[kind]
    path.write_text("\n".join(lines) + ("\n" if has_end else ""))
    pairs, reading = _rows(path, num_bytes=num_bytes)
    assert [url for url, _ in pairs] == urls
    assert not reading.counts["malformed"]
    assert sum(count for _, count in reading.lines) == len(lines)


def test_malformed_rows_are_named_by_the_line_of_the_file_whatever_the_spans(tmp_path: Path) -> None:
    lines = [f"http://a/{number}\tcaption" for number in range(100)]
    lines[40], lines[77] = "one cell", "a\tb\tc"
    (tmp_path / "list.tsv").write_text("\n".join(["url\tcaption", *lines]))
    for num_bytes in (None, 100, 700):
        readings: list[Reading] = []
        spans = (
            list_spans(str(tmp_path / "list.tsv"), num_bytes) if num_bytes else list_spans(str(tmp_path / "list.tsv"))
        )
        for span in spans:
            readings.append(Reading())
            list(read_span(span, ListColumns(), readings[-1]))
        assert name_examples(readings) == [
            f"{tmp_path}/list.tsv:42: 1 cells, not 2",
            f"{tmp_path}/list.tsv:79: 3 cells, not 2",
        ]


def test_malformed_rows_are_named_without_passwords() -> None:
    files = {
        "https://me:secret@data/a.csv": "https://me:***@data/a.csv:3",
        "https://bucket/a.csv?X-Amz-Signature=secret": "https://bucket/a.csv?***:3",
        "/data/b:c@d?e=f.csv": "/data/b:c@d?e=f.csv:3",
    }
    for file, shown in files.items():
        reading = Reading()
        reading.begin(file)
        reading.malformed(3, "no cell user:name@host")
        assert name_examples([reading]) == [f"{shown}: no cell user:name@host"]


def test_only_the_first_ten_malformed_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text("\n".join(['{"url": "u"}', *("{" for _ in range(30))]))
    _, reading = _rows(tmp_path / "list.jsonl", ListColumns(caption="-"))
    assert reading.counts["malformed"] == 30
    assert [name.split(":")[1] for name in name_examples([reading])] == [str(line) for line in range(2, 12)]


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
    pairs, _ = _rows(tmp_path / name)
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
    assert _rows(path)[0] == [("http://a/1", "one")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_named_twice_is_refused_only_if_it_is_needed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        path.write_text('{"url": "http://a/1", "caption": "x", "caption": "y"}')
        assert _rows(path)[0] == [("http://a/1", "y")]  # as every JSON reader does
        return
    cells = [["http://a/1"], ["x"], ["y"]]
    for names in (["url", "caption", "caption"], ["url", "caption", "other"]):
        if kind == "csv":
            path.write_text(f"{','.join(names)}\nhttp://a/1,x,y\n")
        else:
            pq.write_table(pa.Table.from_arrays([pa.array(cell) for cell in cells], names=names), path)
        if "other" in names:
            assert _rows(path)[0] == [("http://a/1", "x")]
        else:
            with pytest.raises(DataError, match=rf"list.{kind}: has column caption 2 times"):
                _rows(path)


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[list[str]] = []
    read = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["columns"])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    row = {"url": "http://a/1", "caption": "x", "embedding": [0.1] * 8, "nsfw": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "list.parquet")
    _rows(tmp_path / "list.parquet")
    _rows(tmp_path / "list.parquet", ListColumns(extra=("nsfw",)))
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
    pairs, reading = _rows(tmp_path / "list.parquet")
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
    assert [caption for _, caption in _rows(tmp_path / "list.parquet")[0]] == captions


@pytest.mark.parametrize("column", [pa.array([["a", "b"]]), pa.array([0.5]), pa.array([True]), pa.array([{"a": "b"}])])
def test_a_parquet_column_of_no_texts_is_refused_by_name(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": column}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"list\.parquet: column caption is .*, not text"):
        _rows(tmp_path / "list.parquet")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_bytes_that_are_no_utf8_are_counted_and_the_list_goes_on(kind: str, tmp_path: Path) -> None:
    header = {"csv": b"url,caption\n", "tsv": b"url\tcaption\n"}.get(kind, b"")
    line = {
        "csv": b"http://a/%d,caf\xc3\xa9\n",
        "tsv": b"http://a/%d\tcaf\xc3\xa9\n",
        "jsonl": b'{"url": "http://a/%d", "caption": "caf\xc3\xa9"}\n',
        "txt": b"http://a/%d/\xc3\xa9\n",
    }[kind]
    lines = [line % number for number in range(3)]
    lines[1] = lines[1].replace(b"\xc3\xa9", b"\xe9")
    (tmp_path / f"list.{kind}").write_bytes(header + b"".join(lines))
    pairs, reading = _rows(tmp_path / f"list.{kind}")
    assert len(pairs) == 2
    assert reading.counts["malformed"] == 1
    number = 3 if header else 2
    assert name_examples([reading])[0].startswith(f"{tmp_path}/list.{kind}:{number}: not UTF-8")


def test_an_oversized_cell_or_line_is_counted_and_the_list_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.delimited._LONGEST_LINE", 400_000)
    monkeypatch.setattr("pipeline.data.delimited._BLOCK_BYTES", 50_000)
    rows = [
        "http://a/1\tone",
        f"http://a/2\t{'x' * (MAX_CELL + 1)}",
        f"http://a/3\t{'y' * 900_000}",
        "http://a/4\tfour",
    ]
    (tmp_path / "list.tsv").write_text("\n".join(["url\tcaption", *rows]))
    pairs, reading = _rows(tmp_path / "list.tsv")
    assert pairs == [("http://a/1", "one"), ("http://a/4", "four")]
    assert [name.partition(":")[2].split(":")[0] for name in name_examples([reading])] == ["3", "4"]


@pytest.mark.parametrize("num_bytes", [None, 700])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("length", [1001, 1100, 1490, 3000])
@pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl"])
def test_a_last_line_that_is_too_long_is_counted(
    kind: str, length: int, end: str, num_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.delimited._LONGEST_LINE", 1000)
    monkeypatch.setattr("pipeline.data.delimited._BLOCK_BYTES", 300)
    head, lines = {
        "txt": ("", "http://a/{}\n"),
        "tsv": ("url\tcaption\n", "http://a/{}\tc\n"),
        "csv": ("url,caption\n", "http://a/{},c\n"),
        "jsonl": ("", '{{"url": "http://a/{}", "caption": "c"}}\n'),
    }[kind]
    path = tmp_path / f"list.{kind}"
    path.write_text(head + "".join(lines.format(number) for number in range(2)) + "x" * length + end)
    pairs, reading = _rows(path, num_bytes=num_bytes)
    assert [url for url, _ in pairs] == ["http://a/0", "http://a/1"]
    assert reading.counts["malformed"] == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_half_of_an_emoji_is_counted_and_the_list_goes_on(kind: str, tmp_path: Path) -> None:
    rows = [{"url": "http://a/1", "caption": "cut \ud83d"}, {"url": "http://a/2", "caption": "fine"}]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        lines = ["url,caption", *(",".join(row.values()) for row in rows)]
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    pairs, reading = _rows(path)
    assert pairs == [("http://a/2", "fine")]
    assert reading.counts["malformed"] == 1


def test_two_kinds_of_strange_cells_may_stand_side_by_side(tmp_path: Path) -> None:
    captions = ["fine", "x" * (MAX_CELL + 1), "cut \ud83d"]
    rows = [{"url": f"http://a/{number}", "caption": caption} for number, caption in enumerate(captions)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, reading = _rows(tmp_path / "list.jsonl")
    assert pairs == [("http://a/0", "fine")]
    assert reading.counts["malformed"] == 2


def test_an_unbalanced_quote_far_from_its_end_costs_one_row(tmp_path: Path) -> None:
    lines = [f"http://a/{number},caption {number}" for number in range(200_000)]
    lines[5] = 'http://a/5,"an open quote'
    (tmp_path / "list.csv").write_text("\n".join(["url,caption", *lines]))
    pairs, reading = _rows(tmp_path / "list.csv")
    assert len(pairs) == len(lines) - 1
    assert name_examples([reading]) == [f"{tmp_path}/list.csv:7: a quote is opened and not closed"]


def test_parts_lie_at_any_depth_and_hidden_files_are_no_parts(tmp_path: Path) -> None:
    for name in ("b/2.csv", "a/x/1.csv", ".cache/3.csv", "a/.4.csv", "notes.md", "_SUCCESS"):
        path = tmp_path / "parts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"url,caption\nhttp://a/{name},c\n")
    assert [Path(file.uri).name for file in list_files(str(tmp_path / "parts"))] == ["1.csv", "2.csv"]
    assert [Path(file.uri).name for file in list_files(str(tmp_path / "parts/**/2.csv"))] == ["2.csv"]
    (tmp_path / "parts/readme.txt").write_text("http://not/a/list")
    with pytest.raises(DataError, match=r"several formats \(2 csv, 1 txt\); choose one, such as .*/\*\*/\*\.csv"):
        list_files(str(tmp_path / "parts"))


@pytest.mark.parametrize(
    "pattern", ["*/*.csv", "**/*.csv", "**/x/*.csv", "**", "a/**", "[ab]/**/1.csv", "**/x/**/?.csv"]
)
def test_a_pattern_matches_what_pythons_own_does(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.csv", "a/x/1.csv", "a/x/y/1.csv", "1.csv", "a/.4.csv", "a/[x]/1.csv", ".c/1.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for place in ("", f"{tmp_path}/"):
        expected = sorted(name for name in glob.glob(f"{place}{pattern}", recursive=True) if Path(name).is_file())  # noqa: PTH207
        assert [file.uri for file in find_files(f"{place}{pattern}")] == expected
        assert expected


def test_a_part_that_is_a_link_to_nothing_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("url,caption\nhttp://a/1,c\n")
    (tmp_path / "2.csv").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "*.csv", tmp_path / "2.csv"):
        with pytest.raises(DataError, match=r"1 of its files are links that lead to no file, such as .*/2\.csv"):
            list_files(str(path))
    (tmp_path / "2.csv").rename(tmp_path / "README")
    assert len(list_files(str(tmp_path))) == 1


def test_row_groups_of_a_large_parquet_file_are_spans(tmp_path: Path) -> None:
    urls = [f"http://a/{number}" for number in range(1000)]
    pq.write_table(pa.table({"url": urls, "caption": urls}), tmp_path / "list.parquet", row_group_size=100)
    spans = list_spans(str(tmp_path / "list.parquet"), 4000)
    assert len(spans) > 2
    assert [span.stop for span in spans][:-1] == [span.start for span in spans][1:]
    reading = Reading()
    pairs = [
        url for span in spans for table in read_span(span, ListColumns(), reading) for url in table["url"].to_pylist()
    ]
    assert pairs == urls


@pytest.mark.parametrize("suffix", ["bz2", "xz", "ZIP"])
def test_a_part_in_a_compression_that_is_not_read_is_named(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("url,caption\nhttp://a/1,one\n")
    (tmp_path / "1.csv.md5").write_text("0")
    (tmp_path / f"notes.{suffix}").write_bytes(b"")
    assert [file.uri for file in list_files(str(tmp_path))] == [f"{tmp_path}/1.csv"]
    (tmp_path / f"7.csv.{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=rf"1 of its files have a compression .* such as .*/7\.csv\.{suffix}: .*\.gz"):
        list_files(str(tmp_path))
    assert len(list_files(f"{tmp_path}/*.csv")) == 1


def test_a_csv_and_a_compressed_file_are_not_cut(tmp_path: Path) -> None:
    text = "url,caption\n" + "".join(f"http://a/{number},c\n" for number in range(100))
    (tmp_path / "list.csv").write_text(text)
    (tmp_path / "list.tsv.gz").write_bytes(gzip.compress(text.replace(",", "\t").encode()))
    for name in ("list.csv", "list.tsv.gz"):
        assert len(list_spans(str(tmp_path / name), 100)) == 1
        assert len(_rows(tmp_path / name, num_bytes=100)[0]) == 100


def test_a_long_list_comes_in_batches(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"http://a/{number}\n" for number in range(BATCH_ROWS + 5)))
    tables = list(read_span(Span(str(tmp_path / "list.txt")), ListColumns(), Reading()))
    assert [table.num_rows for table in tables] == [BATCH_ROWS, 5]


def test_utf16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("url,caption\nhttp://a/1,x\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"list\.csv: UTF-16; convert it to UTF-8"):
        _rows(tmp_path / "list.csv")

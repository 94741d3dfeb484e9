"""Lists as people have them: every row is read as Python's own reader reads it, or counted with its file and line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import BATCH_ROWS, Span, list_spans, read_span
from pipeline.data.reading import MAX_CELL, Reading, name_examples
from pipeline.errors import DataError
from tests.data.listing import TEXT, read_rows

_CELL = TEXT | st.sampled_from(
    ['"', '""', 'a "b" c', "x,y", "one\ntwo", "one\r\ntwo", " ", "", "\ufeff", "\x00", "\u2028"]
)
_LINE = TEXT.map(lambda text: "".join(letter for letter in text if letter not in "\t\r\n"))


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
    pairs, reading = read_rows(path)
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
    pairs, reading = read_rows(path)
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
    pairs, reading = read_rows(path)
    assert pairs == expected
    assert not reading.counts["malformed"]


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
    _, reading = read_rows(tmp_path / "list.jsonl", ListColumns(caption="-"))
    assert reading.counts["malformed"] == 30
    assert [name.split(":")[1] for name in name_examples([reading])] == [str(line) for line in range(2, 12)]


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
    pairs, reading = read_rows(tmp_path / f"list.{kind}")
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
    pairs, reading = read_rows(tmp_path / "list.tsv")
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
    pairs, reading = read_rows(path, num_bytes=num_bytes)
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
    pairs, reading = read_rows(path)
    assert pairs == [("http://a/2", "fine")]
    assert reading.counts["malformed"] == 1


def test_two_kinds_of_strange_cells_may_stand_side_by_side(tmp_path: Path) -> None:
    captions = ["fine", "x" * (MAX_CELL + 1), "cut \ud83d"]
    rows = [{"url": f"http://a/{number}", "caption": caption} for number, caption in enumerate(captions)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, reading = read_rows(tmp_path / "list.jsonl")
    assert pairs == [("http://a/0", "fine")]
    assert reading.counts["malformed"] == 2


def test_an_unbalanced_quote_far_from_its_end_costs_one_row(tmp_path: Path) -> None:
    lines = [f"http://a/{number},caption {number}" for number in range(200_000)]
    lines[5] = 'http://a/5,"an open quote'
    (tmp_path / "list.csv").write_text("\n".join(["url,caption", *lines]))
    pairs, reading = read_rows(tmp_path / "list.csv")
    assert len(pairs) == len(lines) - 1
    assert name_examples([reading]) == [f"{tmp_path}/list.csv:7: a quote is opened and not closed"]


def test_a_long_list_comes_in_batches(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"http://a/{number}\n" for number in range(BATCH_ROWS + 5)))
    tables = list(read_span(Span(str(tmp_path / "list.txt")), ListColumns(), Reading()))
    assert [table.num_rows for table in tables] == [BATCH_ROWS, 5]


def test_utf16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("url,caption\nhttp://a/1,x\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"list\.csv: UTF-16; convert it to UTF-8"):
        read_rows(tmp_path / "list.csv")

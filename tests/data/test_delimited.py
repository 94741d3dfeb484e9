"""Cells and lines that are no common ones: too long for a list, or ended as on old Macs."""

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.caption_files import read_annotations
from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import list_columns, list_spans, read_span
from pipeline.data.reading import MAX_CELL, Reading, name_examples
from pipeline.errors import DataError
from pipeline.retrieve.query_list import write_queries


def _rows(path: Path) -> tuple[list[Any], Reading]:
    """(url, caption) of every row that was read, and what was left out."""
    reading = Reading()
    tables = [table for span in list_spans(str(path)) for table in read_span(span, ListColumns(), reading)]
    return [(row["url"], row["caption"]) for table in tables for row in table.to_pylist()], reading


def _write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


_LONG = "\n".join(['see http://x, and "y"'] * 8000)
"""As two cells, each of its lines would be a row."""


def test_a_long_cell_of_many_lines_is_one_malformed_row(tmp_path: Path) -> None:
    assert len(_LONG) > MAX_CELL
    _write(tmp_path / "list.csv", [["url", "caption"], ["a", "one"], ["b", _LONG], ["c", "three"]])
    pairs, reading = _rows(tmp_path / "list.csv")
    assert pairs == [("a", "one"), ("c", "three")]
    assert reading.counts == {"in": 1, "malformed": 1}
    assert name_examples([reading]) == [
        f"{tmp_path}/list.csv:3: a URL or caption of {len(_LONG)} characters; the limit is {MAX_CELL}"
    ]


def test_a_long_cell_of_one_line_in_quotes_is_one_malformed_row(tmp_path: Path) -> None:
    _write(tmp_path / "list.csv", [["url", "caption"], ["a", "x, " * MAX_CELL], ["b", "two"]])
    pairs, reading = _rows(tmp_path / "list.csv")
    assert pairs == [("b", "two")]
    assert reading.counts["malformed"] == 1


def test_a_long_cell_of_a_column_that_is_not_read_costs_no_row(tmp_path: Path) -> None:
    _write(tmp_path / "list.csv", [["url", "html", "caption"], ["a", _LONG, "one"], ["b", "", "two"]])
    pairs, reading = _rows(tmp_path / "list.csv")
    assert pairs == [("a", "one"), ("b", "two")]
    assert not reading.counts["malformed"]


def test_a_quote_that_is_opened_and_not_closed_costs_its_line_however_long_the_next_ones_are(tmp_path: Path) -> None:
    lines = ["url,caption", 'a,"open', *(f"{row},{'x' * 50_000}" for row in range(40))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    pairs, reading = _rows(tmp_path / "list.csv")
    assert [url for url, _ in pairs] == [str(row) for row in range(40)]
    assert name_examples([reading]) == [f"{tmp_path}/list.csv:2: a quote is opened and not closed"]


def test_a_long_cell_of_annotations_is_one_of_them(tmp_path: Path) -> None:
    _write(tmp_path / "captions.txt", [["image", "caption"], ["1.jpg", _LONG], ["2.jpg", "two"]])
    reading = Reading()
    metadata = read_annotations(str(tmp_path / "captions.txt"), reading)
    assert metadata.captions == {"2.jpg": ["two"]}
    assert reading.notes["malformed_metadata"] == 1


_OLD_MAC = {
    "list.txt": b"http://a/1\rhttp://a/2\r",
    "list.csv": b"url,caption\rhttp://a/1,one\rhttp://a/2,two\r",
    "list.tsv": b"url\tcaption\rhttp://a/1\tone\r",
    "list.jsonl": b'{"url": "http://a/1"}\r{"url": "http://a/2"}\r',
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", _OLD_MAC)
def test_line_ends_of_old_macs_are_refused_with_what_to_do(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(gzip.compress(_OLD_MAC[name]) if suffix else _OLD_MAC[name])
    with pytest.raises(DataError, match=rf"^{path}: line ends of old Macs \(CR alone\); convert it, .*tr '\\r' '\\n'"):
        _rows(path)
    if name.endswith(("csv", "tsv")):
        with pytest.raises(DataError, match=rf"^{path}: line ends of old Macs"):
            list_columns(str(path))


def test_a_list_of_queries_with_line_ends_of_old_macs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"a red cat\ra blue dog\r")
    with pytest.raises(DataError, match=rf"^{tmp_path}/q\.txt: line ends of old Macs"):
        write_queries(tmp_path / "q.txt", tmp_path / "queries.parquet")


def test_a_line_end_of_an_old_mac_among_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"url,caption\r\nhttp://a/1,one\rhttp://a/2,two\nhttp://a/3,three\r\n")
    pairs, reading = _rows(tmp_path / "list.csv")
    assert pairs == [("http://a/3", "three")]
    assert name_examples([reading]) == [f"{tmp_path}/list.csv:2: a line end of old Macs (CR alone) outside of quotes"]


@pytest.mark.parametrize("content", [b"http://a/1\r", b"http://a/1\r\nhttp://a/2\r", b"http://a/1\r\n"])
def test_other_line_ends_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    pairs, _ = _rows(tmp_path / "list.txt")
    assert [url for url, _ in pairs] == content.decode().split()

"""The files of a list, and the spans in which they are read."""

import glob
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.list_columns import ListColumns
from pipeline.data.lists import list_files, list_spans, read_span
from pipeline.data.reading import Reading
from pipeline.errors import DataError
from pipeline.workspace.files import find_files
from tests.data.listing import read_rows


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
    pairs, reading = read_rows(path, num_bytes=num_bytes)
    assert [url for url, _ in pairs] == urls
    assert not reading.counts["malformed"]
    assert sum(count for _, count in reading.lines) == len(lines)


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
        assert len(read_rows(tmp_path / name, num_bytes=100)[0]) == 100

"""The records of JSON files: every one is read as Python's own reader reads it, or counted with its number."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.reading import name_examples
from pipeline.errors import DataError
from tests.data.listing import TEXT, read_rows

_VALUE = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.lists(TEXT, max_size=2)


@given(rows=st.lists(st.fixed_dictionaries({"url": TEXT, "caption": _VALUE}), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_is_read_as_by_pythons_own_reader_and_captions_are_texts_or_numbers(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("json") / f"list.{kind}"
    path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows, indent=1))
    pairs, reading = read_rows(path)

    def is_caption(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
        return value is None or isinstance(value, str) or is_number

    good = [row for row in rows if is_caption(row["caption"])]
    assert pairs == [(row["url"], None if row["caption"] is None else str(row["caption"])) for row in good]
    assert reading.counts["malformed"] == len(rows) - len(good)


def test_a_json_list_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    records = [{"url": f"http://a/{number}", "caption": "a [1]", "n": [{"x": [1]}]} for number in range(2)]
    text = json.dumps(records)
    for end in range(1, len(text)):
        (tmp_path / "list.json").write_text(text[:end])
        with pytest.raises(DataError, match="record"):
            read_rows(tmp_path / "list.json")


@given(
    captions=st.lists(TEXT | st.sampled_from(["}, {", "]", '"}, {"', "\\", "[{"]), max_size=5),
    block=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_a_record_of_a_json_list_may_lie_across_blocks_anywhere(
    tmp_path_factory: pytest.TempPathFactory, captions: list[str], block: int
) -> None:
    rows = [{"url": f"http://a/{number}", "caption": caption} for number, caption in enumerate(captions)]
    path = tmp_path_factory.mktemp("json") / "list.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
        assert read_rows(path)[0] == [tuple(row.values()) for row in rows]


@given(lists=st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=5), block=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("between", ["\n", "", " ,\r\n"])
def test_lists_that_follow_each_other_in_a_file_are_read(
    tmp_path_factory: pytest.TempPathFactory, between: str, lists: list[list[int]], block: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "list.json"
    records = [[{"url": f"http://a/{number}", "caption": "c"} for number in one] for one in lists]
    path.write_text(between.join(map(json.dumps, records)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
        pairs, reading = read_rows(path)
    assert [url for url, _ in pairs] == [f"http://a/{number}" for one in lists for number in one]
    assert not reading.counts["malformed"]


def test_a_json_list_in_utf16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"url": "http://a/1", "caption": "c"}]', encoding="utf-16")
    with pytest.raises(DataError, match=r"list\.json: UTF-16; convert it"):
        read_rows(tmp_path / "list.json")


def test_lines_of_records_may_be_compressed_under_the_name_of_json(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"url": f"http://a/{number}", "caption": "c"}) + "\n" for number in range(3)).encode()
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "list.json.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    for name in ("list.json.gz", "list.json.zst"):
        assert len(read_rows(tmp_path / name)[0]) == 3, name


_COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "coco_url": "http://c/a.jpg"},
        {"id": 2, "file_name": "b.jpg", "coco_url": "http://c/b.jpg"},
    ],
    "annotations": [
        {"id": 9, "image_id": 2, "caption": "b one"},
        {"id": 8, "image_id": 1, "caption": "a one"},
        {"id": 7, "image_id": 2, "caption": "b two"},
    ],
}


def test_cocos_annotations_are_a_list_with_a_row_for_each_caption(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps(_COCO))
    pairs, _ = read_rows(tmp_path / "captions.json")
    assert pairs == [("http://c/b.jpg", "b one"), ("http://c/a.jpg", "a one"), ("http://c/b.jpg", "b two")]


_KARPATHY = {"images": [{"url": "http://k/a.jpg", "sentences": [{"raw": "a one"}, {"raw": "a two"}]}]}
_DATA = {"data": [{"url": "http://d/1", "caption": "one"}, {"url": "http://d/2", "caption": "two"}]}


@pytest.mark.parametrize(
    ("shape", "table", "entry", "place", "line", "reason"),
    [
        (_COCO, "annotations", None, 1, 2, "entry 2 of annotations: no record, which begins with {"),
        (_COCO, "images", "c.jpg", 0, 4, "entry 1 of images: no record, which begins with {"),
        (_KARPATHY, "images", [1], 0, 1, "entry 1 of images: no record, which begins with {"),
        (_KARPATHY, "images", {"url": "http://k/b.jpg"}, 1, 3, "entry 2 of images: no sentences"),
        (_DATA, "data", 7, 2, 3, "entry 3 of data: no record, which begins with {"),
        (_DATA | {"version": 1}, "data", 7, 0, 1, "entry 1 of data: no record, which begins with {"),
    ],
)
def test_an_entry_that_is_no_record_costs_itself_alone_in_every_shape(
    shape: dict[str, Any], table: str, entry: Any, place: int, line: int, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(shape))
    expected, _ = read_rows(path)
    entries = [*shape[table]]
    entries.insert(place, entry)
    path.write_text(json.dumps(shape | {table: entries}))
    pairs, reading = read_rows(path)
    assert pairs == expected
    assert reading.counts["malformed"] == 1
    assert name_examples([reading]) == [f"{path}:{line}: {reason}"]


def test_a_column_of_the_name_data_is_a_column(tmp_path: Path) -> None:
    columns = {"url": ["http://a/1", "http://a/2"], "caption": ["one", "two"], "data": [{"n": 1}, None]}
    (tmp_path / "list.json").write_text(json.dumps(columns))
    assert read_rows(tmp_path / "list.json")[0] == [("http://a/1", "one"), ("http://a/2", "two")]


def test_records_under_the_name_data_are_taken_for_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make rows of them would take as much memory again."""
    monkeypatch.setattr("pipeline.data.json_lists._rows_of_columns", pytest.fail)
    for name, shape in (("alone", _DATA), ("beside", _DATA | {"n": [1, 2]}), ("fault", {"data": [*_DATA["data"], 7]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(shape))
        assert read_rows(tmp_path / f"{name}.json")[0] == [("http://d/1", "one"), ("http://d/2", "two")]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_of_every_shape_is_read(indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", 7)  # every record lies across blocks
    rows = [{"url": f"http://a/{number}", "caption": "x" * number} for number in range(20)]
    shapes = {
        "records": rows,
        "data": {"data": rows},
        "columns": {name: [row[name] for row in rows] for name in rows[0]},
        "pandas": {name: {str(place): row[name] for place, row in enumerate(rows)} for name in rows[0]},
    }
    expected = [(row["url"], row["caption"]) for row in rows]
    for name, shape in shapes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(shape, indent=indent))
        assert read_rows(tmp_path / f"{name}.json")[0] == expected, name
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(tmp_path / "lines.json")[0] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"url": "u", "caption": "c"}, {"url"', r"record 2"),
        ('[{"url": "u", "caption": "c"}', r"the list does not end"),
        ('[{"url": "u"}, {"url": "v"}]\n{"url": "w"}', r"behind record 2 and the end of its list is '.\"url"),
        ('{"url": 3}', r"must hold a list of records"),
        ("", r"damaged"),
    ],
)
def test_damaged_json_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError, match=rf"list\.json: .*{message}"):
        read_rows(tmp_path / "list.json")

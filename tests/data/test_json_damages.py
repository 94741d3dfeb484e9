"""Damaged records of JSON lists: each costs itself alone, and is counted."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.json_lists import json_records
from pipeline.data.reading import Reading, name_examples
from pipeline.errors import DataError
from tests.data.listing import TEXT, read_rows

_STRANGE_RECORDS = {
    "not UTF-8": b'{"url": "http://a/2", "caption": "caf\xe9"}',
    "not UTF-8, or": b'{"url": "http://a/2", "caption": "cut \\ud83d"}',
    "nested too deeply": b'{"a": "]\\"", "caption": ' + b'[{"b}": ' * 2_000 + b"1" + b"}]" * 2_000 + b"}",
    "nested too": b"[" * 2_000 + b"]" * 2_000,
    "Exceeds the limit": b'{"url": "http://a/2", "caption": 1' + b"0" * 5000 + b"}",
    "Exceeds the limit (4300": b"1" + b"0" * 5000,
    "no record": b"[1, 2]",
    "no record, which": b"7",
    "not JSON (Invalid control character at: character ": b'{"url": "http://a/2", "caption": "a\ttab"}',
    "not JSON (Invalid control": b'{"url": "http://a/2", "caption": "a\nline", "boxes": [{"x": 1}, {"x": 2}]}',
    "not JSON (Invalid \\escape: character ": b'{"url": "http://a/2", "caption": "C:\\x"}',
    "not JSON (Expecting ',' delimiter: character ": b'{"url": "http://a/2" "caption": "b"}',
    "not JSON (Expecting ',' delimiter": b'{"url": "http://a/2", "caption": "a "big" cat"}',
    "not JSON (Expecting ',' ": b'{"url": "http://a/2", "caption": "a 5" screen"}',
    "not JSON (Expecting ',": b'{"url": "http://a/2", "caption": "no end}',
    "not JSON (Expecting value: character 1 of the record)": b"}",
    "not JSON (Expecting value: character 1": b"None",
    "not JSON (Expecting property name": b"{'url': 'http://a/2'}",
    "not JSON (": b'{"url": "http://a/2", "caption": "b""',
}


@pytest.mark.parametrize("reason", _STRANGE_RECORDS)
@pytest.mark.parametrize("block", [1 << 20, 1000])
def test_a_strange_record_of_a_json_list_costs_itself_alone(
    reason: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
    good = b'{"url": "http://a/%d", "caption": "caf\xc3\xa9"}'
    (tmp_path / "list.json").write_bytes(b"[" + b", ".join([good % 1, _STRANGE_RECORDS[reason], good % 3]) + b"]")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [("http://a/1", "caf\u00e9"), ("http://a/3", "caf\u00e9")]
    assert reading.counts["malformed"] == 1
    assert name_examples([reading])[0].startswith(f"{tmp_path}/list.json:2: {reason}")


@pytest.mark.parametrize("end", ["]", " ]\n"])
@pytest.mark.parametrize(
    "record",
    [
        '{"url": "http://a/9", "caption": "x""}',
        '{"url": "http://a/9", "caption": "x}',
        '{"url": "http://a/9", "caption": "x"',
        '{"url": "http://a/9", "caption": x"}',
        '{"url": "http://a/9", "n": [{"x": 1}], "caption": "a "big" cat}',
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 50])
def test_a_damaged_record_at_the_end_of_a_json_list_costs_itself_alone(
    record: str, end: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
    good = [json.dumps({"url": f"http://a/{number}", "caption": "c"}) for number in range(5)]
    (tmp_path / "list.json").write_text(f"[{', '.join([*good, record])}{end}")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [(f"http://a/{number}", "c") for number in range(5)]
    assert name_examples([reading])[0].startswith(f"{tmp_path}/list.json:6: not JSON (")


@pytest.mark.parametrize("block", [1 << 20, 50])
def test_a_record_without_its_last_brace_ends_where_the_next_one_begins(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
    records = [json.dumps({"url": f"http://a/{number}", "caption": "c", "n": [{"x": 1}]}) for number in range(4)]
    records[1] = records[1][:-1]
    (tmp_path / "list.json").write_text(f"[{', '.join(records)}]")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [(f"http://a/{number}", "c") for number in (0, 2, 3)]
    assert reading.counts["malformed"] == 1


_BRACKET_FAULTS = [
    '{"url": "http://a/2", "caption": "c",["w": 3}',
    '{"url": "http://a/2", "caption":{"c", "w": 3}',
    '{"url": ["http://a/2", "caption": "c"}',
    '{"url": "http://a/2", "caption": "c"[, "w": 3}',
    '{"url": "http://a/2", "caption": "c", "w": 3:',
    '{"url": "http://a/2", "caption": "c"{',
    '{"url": "http://a/2", "caption": "c"',
    '{"url": "http://a/2", "n": [{"x": 1}, {"y": [2]}, "caption": "c"}',
    '{"url": "http://a/2", "n": {"x": [1}, "caption": "{\\"url\\": [", "w": 3}',
]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("record", _BRACKET_FAULTS)
@pytest.mark.parametrize("block", [1 << 20, 50, 17])
def test_a_bracket_too_many_or_too_few_costs_its_record_alone(
    record: str, place: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
    texts = [json.dumps({"url": f"http://a/{number}", "caption": "c", "n": [{"x": 1}]}) for number in range(3)]
    texts.insert(place, record)
    (tmp_path / "list.json").write_text(f"[{', '.join(texts)}]")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [(f"http://a/{number}", "c") for number in range(3)]
    assert reading.counts["malformed"] == 1


_QUOTE_FAULTS = [
    '{"url": "http://a/9", "caption": "a 5" nail", "faces": [{"x": 1}, {"y": 2}, {"x": 3}]}',
    '{"url": "http://a/9", "caption": "c, "faces": [{"x": 1}, {"y": 2}, {"x": 3}]}',
    '{"url": "http://a/9", "caption": "a 5" nail", "thumbs": [{"url": "t"}, {"url": "s", "n": [1]}, {"url": "r"}]}',
    '{"url": "http://a/9", "caption": "c, "thumbs": [{"url": "t"}, {"url": "s"}, {"url": "r"}], "caption": "c"}',
    '{"url": "http://a/9", "caption": "c", "thumbs: [{"url": "t"}, {"url": "s"}, {"url": "r"}]}',
    '{"url": "http://a/9", "caption": "c", "thumbs": [{"url": "t"}, {"url": s"}, {"url": "r"}], "w": 3}',
    '{"url": "http://a/9", "tags": ["p", "q], "thumbs": [{"url": "t"}, {"url": "s"}, {"url": "r"}]}',
]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("record", _QUOTE_FAULTS)
@pytest.mark.parametrize("block", [1 << 20, 50, 17])
def test_a_quote_too_many_or_too_few_costs_its_record_alone(
    record: str, place: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
    lists = {"faces": [{"x": 1}, {"x": 2}], "thumbs": [{"url": "t"}, {"url": "s"}]}
    texts = [json.dumps({"url": f"http://a/{number}", "caption": "c"} | lists) for number in range(3)]
    texts.insert(place, record)
    (tmp_path / "list.json").write_text(f"[{', '.join(texts)}]")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [(f"http://a/{number}", "c") for number in range(3)]
    reasons = [one.reason for one in reading.examples]
    assert reasons[0].startswith("not JSON (")
    assert set(reasons[1:]) <= {"may be a record in one that is not JSON"}


_BRACKETS_IN_TEXTS = [
    '{"url": "http://a/9", "caption": "a 5" nail [x", "n": 3}',
    '{"url": "http://a/9", "caption": red [sealed", "n": 3}',
    '{"url": "http://a/9", "caption": "a 5" nail [x]", "n": 3}',
    '{"url": "http://a/9", "caption": "a 5" nail {x", "n": 3}',
    '{"url": "http://a/9", "caption": "a 5" nail ]x", "n": 3}',
    '{"url": "http://a/9", "caption": "12" vinyl [LP, 1978", "tags": ["a", "b"]}',
    '{"url": "http://a/9", "caption": "tag [x, "tags": ["a", "b"]}',
    '{"url": "http://a/9", "tags": ["a", "b [x], "faces": [{"x": 1}, {"x": 2}]}',
    '{"url": "http://a/9", "caption[: "c", "tags": ["a", "b"]}',
    '{"url": "http://a/9", "caption": [a nail", "tags": ["a", "b"]}',
    '{"url": "http://a/9", "caption": [12 inch (LP)", "n": 1}',
    '{"url": "http://a/9", "caption": [5" nail", "n": 1}',
    '{"url": "http://a/9", "caption": ["red" nail", "n": 1}',
    '{"url": "http://a/9", "caption": [1] of a set", "n": 1}',
    '{"url": "http://a/9", "caption": [true story", "tags": ["a", "b"]}',
    '{"url": "http://a/9", "caption": "c", "tags": ["a", "b"]}"',
]


@pytest.mark.parametrize("record", _BRACKETS_IN_TEXTS)
@pytest.mark.parametrize("captions", ["c", "end ] of", "tag [x"])
@pytest.mark.parametrize("block", [1 << 20, 50])
def test_a_bracket_that_is_a_letter_opens_no_list(
    record: str, captions: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
    texts = [json.dumps({"url": f"http://a/{number}", "caption": captions, "tags": ["a"]}) for number in range(4)]
    texts.insert(2, record)
    (tmp_path / "list.json").write_text(f"[{', '.join(texts)}]")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert [url for url, _ in pairs if url != "http://a/9"] == [f"http://a/{number}" for number in range(4)]
    assert reading.counts["malformed"] in {1, 2}


def test_records_are_told_apart_by_first_names_with_escapes_too(tmp_path: Path) -> None:
    texts = [json.dumps({"gr\u00f6\u00dfe": 1, "url": f"http://a/{number}", "caption": "c"}) for number in range(4)]
    texts[1] = texts[1].replace('"c"', '"a 5" nail"')
    (tmp_path / "list.json").write_text(f"[{', '.join(texts)}]")
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [(f"http://a/{number}", "c") for number in (0, 2, 3)]
    assert reading.counts["malformed"] == 1


def test_one_character_that_is_wrong_seldom_costs_a_list_of_nested_records() -> None:
    lists = {"tags": ["p", "q"], "faces": [{"x": 1}, {"x": 2}]}
    texts = [json.dumps({"url": f"http://a/{number}", "caption": "a [1]"} | lists) for number in range(4)]
    damages = [
        texts[2][:place] + mark + texts[2][place + replaces :]
        for place in range(len(texts[2]))
        for mark in ["", *'"\\}{[],:x']
        for replaces in (0, 1)
    ]
    num_refused = 0
    for damaged in damages:
        stream = io.BytesIO(f"[{', '.join([*texts[:2], damaged, texts[3]])}]".encode())
        reading = Reading(lines=[("list.json", 0)])
        try:
            urls = [record.get("url") for _, record in json_records(stream, reading)]
        except DataError:
            num_refused += 1
        else:
            num_lost = sum(f"http://a/{number}" not in urls for number in (0, 1, 3))
            assert num_lost < max(1, reading.counts["malformed"]), damaged
    assert num_refused < 0.05 * len(damages)


def test_what_may_be_a_record_in_a_damaged_one_is_counted_too(tmp_path: Path) -> None:
    others = ['{"n": [{"x": 1}}, {"y": 2}], "url": "http://a/1"}', '{"url": "http://a/2", "caption": "c"}']
    (tmp_path / "list.json").write_text(f'[{{"url": "http://a/0", "caption": "c"}}, {", ".join(others)}]')
    pairs, reading = read_rows(tmp_path / "list.json")
    assert [url for url, _ in pairs] == ["http://a/0", "http://a/2"]
    assert "list.json:2: may be a record in one that is not JSON" in name_examples([reading])[1]


def test_a_quote_too_many_at_the_end_of_a_list_costs_none_of_the_next_one(tmp_path: Path) -> None:
    lists = ['{"url": "http://a/0", "caption": "c""}', '{"url": "http://a/1", "caption": "c"}']
    (tmp_path / "list.json").write_text("\n".join(f"[{one}]" for one in lists))
    pairs, reading = read_rows(tmp_path / "list.json")
    assert pairs == [("http://a/1", "c")]
    assert reading.counts["malformed"] == 1


_RECORDS = st.lists(
    st.fixed_dictionaries(
        {"url": st.uuids().map(str)},
        optional={
            "caption": TEXT | st.sampled_from(['a "b" c', "[1]", "set, {", "x\\", "tag [x", "end ] of"]),
            "n": st.just([{"x": 1}, {"y": [2]}, {}]),
            "thumbs": st.just([{"url": "t"}, {"url": "s", "caption": "c"}, {"url": "r"}]),
        },
    ),
    min_size=1,
    max_size=5,
)


@given(lists=st.lists(_RECORDS, min_size=1, max_size=2), block=st.sampled_from([1 << 20, 50, 17]), data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_good_record_is_lost_in_silence(
    tmp_path_factory: pytest.TempPathFactory, lists: list[list[dict[str, Any]]], block: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("json") / "list.json"
    texts = [[json.dumps(record) for record in one] for one in lists]
    damaged = data.draw(st.sampled_from([(number, n) for number, one in enumerate(texts) for n in range(len(one))]))
    text = texts[damaged[0]][damaged[1]]
    place, mark = data.draw(st.integers(0, len(text))), data.draw(st.sampled_from(["", *'"\\}{[],:x']))
    texts[damaged[0]][damaged[1]] = text[:place] + mark + text[place + data.draw(st.integers(0, 1)) :]
    path.write_text("\n".join(f"[{', '.join(one)}]" for one in texts))
    others = [
        record["url"] for number, one in enumerate(lists) for n, record in enumerate(one) if (number, n) != damaged
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DataError):
        patch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
        pairs, reading = read_rows(path)
        urls = [url for url, _ in pairs]
        assert [url for url in urls if url in others] == [url for url in others if url in urls]
        assert len(others) - len(set(urls) & set(others)) <= max(0, reading.counts["malformed"] - 1)


def test_a_record_inside_a_damaged_one_is_no_row(tmp_path: Path) -> None:
    damaged = '{"url": "http://a/1", "caption": "c", "thumb" {"url": "http://t/1", "caption": "c"}}'
    (tmp_path / "list.json").write_text(f'[{damaged}, {{"url": "http://a/2", "caption": "c"}}]')
    assert read_rows(tmp_path / "list.json")[0] == [("http://a/2", "c")]


_FIRST_QUOTE = len('{"url": "http://a/0", "caption": ')


@given(
    damaged=st.integers(0, 3),
    place=st.integers(0, 70) | st.just(_FIRST_QUOTE),
    mark=st.sampled_from('"\\}{[],:\t'),
    replaces=st.booleans(),
    caption=st.sampled_from(
        ['a [1] "b"', "tag [x", "end ] of", "[", 'a "b" ][ c, {', "12 inch (LP)", "1] of two", "true story"]
    ),
    others=st.sampled_from([{}, {"n": [{"x": 1}, {}]}]),
    block=st.sampled_from([1 << 20, 50]),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_record_takes_no_other_with_it_unless_the_list_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    damaged: int,
    place: int,
    mark: str,
    replaces: bool,
    caption: str,
    others: dict[str, Any],
    block: int,
) -> None:
    path = tmp_path_factory.mktemp("json") / "list.json"
    texts = [json.dumps({"url": f"http://a/{number}", "caption": caption} | others) for number in range(4)]
    text = texts[damaged]
    texts[damaged] = text[:place] + mark + text[place + replaces :]
    path.write_text(f"[{', '.join(texts)}]")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DataError):
        patch.setattr("pipeline.data.json_lists._BLOCK_BYTES", block)
        pairs, reading = read_rows(path)
        good = [f"http://a/{number}" for number in range(4) if number != damaged]
        urls = [url for url, _ in pairs if url in good]
        if replaces and mark == '"' and text[place : place + 1] == "]":
            # The list stays open, and what follows may be in it: it is counted, one by one.
            assert len(good) - len(urls) < max(1, reading.counts["malformed"])
        else:
            assert urls == good

"""Pairs are recognised in evaluations, ablations and searches by their names, and by words only where there are none."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.forget.shown import Pairs
from pipeline.retrieve.batch import NEIGHBOUR
from pipeline.workspace.store import Artifact

_PAIR, _OTHER = ({"uid": uid, "url": f"http://a/{uid}", "caption": "image not available"} for uid in ("one", "two"))
_PAIRS = Pairs(frozenset({"one", "http://a/one"}), frozenset({"image not available"}))


def _table(artifact: Artifact, columns: dict[str, Any]) -> None:
    with artifact.write("00000.parquet") as path:
        pq.write_table(pa.table(columns), path)


def _neighbours(row: dict[str, str]) -> pa.Array:
    return pa.array([[], [{name: row.get(name) for name in NEIGHBOUR.names}]], pa.list_(NEIGHBOUR))


@pytest.mark.parametrize(
    "columns",
    [
        {"uid": ["zero", "one"], "caption": ["a", "b"]},
        {"url": [None, "http://a/one"]},
        {"caption": ["a", "image not available"]},
        {"prompt": ["a", "image not available"], "z_image": [[1.0], None]},
        {"text": ["image not available"], "uid": ["two"]},
        {"image": ["http://a/one"]},
        {"text": ["a", "b"], "neighbours": _neighbours(_PAIR)},
    ],
)
def test_a_table_shows_a_pair_by_its_names_or_by_a_prompt(columns: dict[str, Any], tmp_path: Path) -> None:
    _table(artifact := Artifact(str(tmp_path)), columns)
    assert _PAIRS.are_in(artifact)


@pytest.mark.parametrize(
    "columns",
    [
        {"uid": ["two"], "caption": ["image not available"]},
        {"url": ["http://a/two"], "caption": ["image not available"]},
        {"text": ["a", "b"], "neighbours": _neighbours(_OTHER)},
        {"image": ["image not available"], "query": [1], "check": ["one"]},
    ],
)
def test_a_table_of_another_pair_with_the_same_caption_shows_none(columns: dict[str, Any], tmp_path: Path) -> None:
    _table(artifact := Artifact(str(tmp_path)), columns)
    assert not _PAIRS.are_in(artifact)


@pytest.mark.parametrize("name", ["pictures.json", "samples.jsonl"])
@pytest.mark.parametrize(
    ("value", "shows"),
    [
        ({"prompt": "image not available"}, True),
        ({"shown": [{"pictures": [{"label": ".9", **_PAIR}]}]}, True),
        ({"nearest": {"uid": "one", "similarity": 1.0}}, True),
        ({"caption": "image not available"}, True),
        ({"shown": [{"pictures": [{"label": ".9", **_OTHER}]}]}, False),
        ({"prompt": "a", "nearest": {"uid": "two"}, "title": "image not available"}, False),
        ({"prompt": None, "text": ["one"], "image": 1}, False),
    ],
)
def test_json_shows_a_pair_by_its_names_or_by_a_prompt(value: Any, shows: bool, name: str, tmp_path: Path) -> None:
    Artifact(str(tmp_path)).write_bytes(name, f"{json.dumps(value)}\n".encode())
    assert _PAIRS.are_in(Artifact(str(tmp_path))) is shows


@pytest.mark.parametrize(
    "caption", ["index", "download", "success", "search.json", "image", "prompt", "in", "evaluate"]
)
def test_a_caption_that_is_the_name_of_a_field_shows_nothing(caption: str, tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    manifest = {"step": "evaluate", "inputs": {"index": "ab", "download": "cd"}, "files": {"search.json": {}}}
    artifact.write_json("manifest.json", manifest | {"counts": {"in": 1}, "metrics": {"success": 1}})
    artifact.write_json("metrics.json", {"image": {"prompt": {"index": 1}}, "prompts": "download"})
    assert not Pairs(frozenset({"u"}), frozenset({caption})).are_in(artifact)


def test_a_large_file_is_searched_for_many_names_at_once(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    artifact.write_json("pictures.json", [{"uid": f"{number:032x}", "caption": "c"} for number in range(20_000)])
    assert not Pairs(frozenset(f"name {number}" for number in range(100_000)), frozenset("c")).are_in(artifact)


def test_what_cannot_be_read_is_no_answer(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    artifact.write_bytes("samples.jsonl", b'{"prompt": "a"}\n{"prompt"')
    with pytest.raises(DataError, match=r"samples\.jsonl: damaged"):
        _PAIRS.are_in(artifact)

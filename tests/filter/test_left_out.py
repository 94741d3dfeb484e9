"""What the parts of a search found, put together: every row that is left out names one that stays."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.filter.gathered import Bundle
from pipeline.filter.hashes import PictureHash
from pipeline.filter.labels import duplicates_of_shard, duplicates_table, sorted_duplicates, write_duplicates
from pipeline.filter.left_out import find_left_out, findings_of_bundle, starts_of
from pipeline.runtime.filter import run_filter
from pipeline.workspace.store import Artifact
from tests.filter.planted import (
    Planted,
    commit,
    encode,
    labels_of,
    make_context,
    pair,
    scene_picture,
    tiny_recipe,
    without_ray,
)

_SIZES = (3, 0, 4, 1, 5)
_SHARDS = tuple(f"{number:05d}" for number in range(len(_SIZES)))
_ROWS = [(number, row) for number, size in enumerate(_SIZES) for row in range(size)]

Findings = dict[int, int]
"""For rows that one part found again, their first rows."""


def _write(folder: Path, parts: list[Findings]) -> tuple[Artifact, list[str]]:
    output, names = Artifact(str(folder)), [f"part-{number}" for number in range(len(parts))]
    numbers, places = zip(*_ROWS, strict=True)
    rows = pa.table({"number": numbers, "row": places, "uid": [f"uid {row}" for row in range(len(_ROWS))]})
    for name, findings in zip(names, parts, strict=True):
        again, first = np.array(list(findings), np.int64), np.array(list(findings.values()), np.int64)
        with output.write(f"{name}.parquet") as path:
            write_duplicates(sorted_duplicates([duplicates_table(rows, again, first, name)]), path)
    return output, names


def _expected(parts: list[Findings]) -> dict[int, tuple[str, int]]:
    """Reason and first row of each row that is left out, decided one row after the other."""
    out: dict[int, tuple[str, int]] = {}
    for row in range(len(_ROWS)):
        reasons = [(f"part-{n}", part[row]) for n, part in enumerate(parts) if row in part and part[row] not in out]
        if reasons:
            out[row] = reasons[0]
    return out


_FINDINGS = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda rows: rows[0] > rows[1])).map(dict),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(_FINDINGS)
def test_a_row_is_left_out_if_one_that_stays_was_found_for_it(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Findings]
) -> None:
    folder, starts = tmp_path_factory.mktemp("parts"), starts_of(_SIZES)
    output, names = _write(folder, parts)
    is_out, expected = find_left_out(output, names, starts), _expected(parts)
    assert {row for row, out in enumerate(is_out.tolist()) if out} == expected.keys()
    results: dict[int, tuple[str, int]] = {}
    for bundle in (Bundle("a", 0, 2), Bundle("b", 2, 5)):
        findings = folder / f"{bundle.name}.parquet"
        write_duplicates(findings_of_bundle(output, names, bundle, _SHARDS, starts, is_out), findings)
        for number in range(bundle.first, bundle.stop):
            for one in duplicates_of_shard(findings, number):
                first = int(one["same_as"].split()[1])
                assert one["same_as_shard"] == _SHARDS[_ROWS[first][0]]
                results[int(starts[number]) + one["row"]] = (one["reason"], first)
    assert results == expected


def test_a_row_near_one_that_is_itself_left_out_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is three bits from A, and C two bits from B: too far from A, with which it has no piece in common."""
    without_ray(monkeypatch)
    planted, bits = Planted({}, {}), {"A": (), "B": (0, 13, 26), "C": (0, 13, 26, 39, 52), "D": (0, 13, 26, 39, 52, 53)}
    hashes: dict[bytes, PictureHash] = {}
    for number, (name, places) in enumerate(bits.items()):
        picture = encode(scene_picture(number))
        hashes[picture] = PictureHash(sum(1 << place for place in places), (1 << 64) - 1 - number, bytes(192))
        planted.add(name, {"B": "near_duplicate", "D": "near_duplicate"}.get(name, ""), pair("", name, picture))
    monkeypatch.setattr("pipeline.filter.rules.hash_picture", lambda data, **_where: hashes[data])
    recipe = tiny_recipe(tmp_path, filter={"duplicates": "near", "max_hash_distance": 4})
    context = make_context(tmp_path, "filter", recipe)
    planted.write(context.inputs["download"])
    labels = labels_of(commit(context, run_filter(context)))
    uids = {name: planted.uid(name) for name in bits}
    assert {name: labels[uid]["reason"] for name, uid in uids.items()} == planted.reasons
    assert {name: labels[uids[name]]["same_as"] for name in "BD"} == {"B": uids["A"], "D": uids["C"]}

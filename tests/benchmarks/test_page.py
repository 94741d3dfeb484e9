"""What the page of benchmarks says beside its numbers."""

import ast
import json
from typing import Any

import pytest

from benchmarks.ablations import table_of
from benchmarks.page import FOLDER, MODULES, measured_with, rows_of


def test_a_measurement_names_its_device_where_the_results_do() -> None:
    document: dict[str, Any] = {"versions": {"torch": "2.11.0"}, "machine": {"threads": 16}, "settings": {}}
    assert measured_with(document) == "Measured with torch 2.11.0, 16 thread(s)"
    document["settings"] = {"device": "NVIDIA H200"}
    assert measured_with(document) == "Measured with torch 2.11.0, 16 thread(s), on NVIDIA H200"


def test_a_measurement_names_its_day_and_the_settings_that_its_command_took() -> None:
    settings = {
        "share": 0.5,
        "steps": [5, 10],
        "set": [],
        "compiled": False,
        "rates": {"ours": [1.0]},
        "ledger_s": [0.5],
        "threads": 1,
    }
    document = {"versions": {"torch": "2.11.0"}, "machine": {"threads": 1}, "settings": settings, "created_s": 86400}
    assert measured_with(document) == "Measured on 1970-01-02 with torch 2.11.0, 1 thread(s) (share 0.5; steps 5, 10)"


def test_a_row_of_the_ablation_has_the_time_of_its_trainings() -> None:
    checks = {"one object": {"colour": {"generated": {"rate": 0.5}}}}
    runs = [{"recipe": "demo", "seed": seed, "train_s": 100.0 + 20 * seed, "pixel_check": checks} for seed in (0, 1)]
    (row,) = table_of(runs)
    assert (row["train_s"], row["one object: colour"], row["two objects: binding"]) == (110, "50.0 +- 0.0", None)
    assert table_of(runs[:1])[0]["one object: colour"] == "50.0"  # one seed says nothing of the spread


@pytest.mark.parametrize("name", MODULES)
def test_every_number_with_a_floor_says_whether_it_holds(name: str) -> None:
    path = FOLDER / "results" / f"{name}.json"
    if not path.exists():
        return
    rows = rows_of(name, json.loads(path.read_text()))
    limits = ("floor", "at_most", "below", "floor_s", "floor_ms", "floor_mb")
    for row in rows:
        if any(row.get(limit) is not None for limit in limits):
            assert row["holds"] in {"yes", "no", "undecided", True, False}, row
    text = ast.get_docstring(ast.parse((FOLDER / f"{MODULES[name]}.py").read_text())) or ""
    if "floor" in text.lower() or "required" in text.lower():
        assert [row for row in rows if row.get("holds") not in {None, ""}], name


@pytest.mark.parametrize(
    ("ratio", "low", "high", "holds"),
    [(1.6, 1.5, 1.7, "yes"), (1.4, 1.2, 1.48, "no"), (1.6, 1.4, 1.7, "undecided"), (1.4, 1.2, 1.5, "undecided")],
)
def test_an_interval_that_decides_nothing_says_so(ratio: float, low: float, high: float, holds: str) -> None:
    row = {"ratio": ratio, "low": low, "high": high, "floor": 1.5}
    assert [one["holds"] for one in rows_of("any", {"rows": [row, row | {"floor": None}]})] == [holds, ""]


def test_a_row_with_two_floors_has_the_worse_verdict() -> None:
    row = {"wall_ms": 60.0, "wall_ms_90": 90.0, "floor_ms": 200, "memory_mb": 101.0, "floor_mb": 100}
    assert [one["holds"] for one in rows_of("any", {"rows": [row]})] == ["no"]

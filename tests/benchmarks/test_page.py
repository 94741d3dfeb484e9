"""What the page of benchmarks says beside its numbers."""

import ast
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.ablations import merged, steps_within, table_of
from benchmarks.forecast import compare
from benchmarks.page import FOLDER, MODULES, main, measured_with, rows_of


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


_SETTINGS = {"share": 1.0, "seconds": None, "prompts": 240, "device": "cpu", "demo_key": "d0", "recipe_key": "r0"}


def _ablation(recipe: str, seed: int = 0, rate: float = 0.5, **settings: Any) -> dict[str, Any]:
    checks = {"one object": {"colour": {"generated": {"rate": rate}}}}
    run = {"recipe": recipe, "seed": seed, "steps": 1000 + seed, "train_s": 100.0 + 20 * seed, "pixel_check": checks}
    return run | _SETTINGS | settings


def test_a_row_of_the_ablation_has_the_time_of_its_trainings() -> None:
    runs = [_ablation("demo", seed) for seed in (0, 2)]
    (row,) = table_of(runs)
    assert (row["steps"], row["train_s"], row["one object: colour"], row["two objects: binding"]) == (
        1001,
        120,
        "50.0 +- 0.0",
        None,
    )
    assert table_of(runs[:1])[0]["one object: colour"] == "50.0"  # one seed says nothing of the spread


def test_a_new_run_of_an_ablation_takes_the_place_of_its_own_row_alone() -> None:
    earlier: dict[str, Any] = {
        "settings": {"runs": [_ablation("plain"), _ablation("adapter"), _ablation("demo")]},
        "rows": [],
    }
    rows, runs = merged(earlier, [_ablation("plain", rate=0.7), _ablation("plain", 1, rate=0.9)])
    assert [(row["recipe"], row["seeds"], row["one object: colour"]) for row in rows] == [
        ("demo", 1, "50.0"),
        ("adapter", 1, "50.0"),
        ("plain", 2, "80.0 +- 10.0"),
    ]
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("name", "other"), [("share", 0.5), ("device", "NVIDIA H200"), ("demo_key", "d1"), ("recipe_key", "r1")]
)
def test_rows_of_an_ablation_that_were_measured_otherwise_stand_apart_and_say_how(name: str, other: Any) -> None:
    rows, _ = merged(
        {"settings": {"runs": [_ablation("plain", rate=0.7)]}, "rows": []}, [_ablation("plain", **{name: other})]
    )
    assert [(row["one object: colour"], row[name]) for row in rows] == [("70.0", _SETTINGS[name]), ("50.0", other)]


def test_rows_of_an_ablation_from_before_runs_were_kept_stay_with_their_settings() -> None:
    old: dict[str, Any] = {
        "settings": {"share": 0.5, "device": "cpu", "seeds": 1},
        "rows": [{"recipe": "demo", "seeds": 1}],
    }
    rows, runs = merged(old, [_ablation("demo")])
    assert [(row["recipe"], row["share"], row["demo_key"], row["steps"]) for row in rows] == [
        ("demo", 1.0, "d0", 1000),
        ("demo", 0.5, None, None),
    ]
    again, _ = merged({"settings": {"runs": runs}, "rows": rows}, [_ablation("adapter")])
    assert [(row["recipe"], row["share"]) for row in again] == [("demo", 1.0), ("adapter", 1.0), ("demo", 0.5)]


def test_the_runs_of_an_ablation_are_no_setting_in_words() -> None:
    document = {"versions": {}, "machine": {"threads": 1}, "settings": {"runs": [_ablation("demo")]}}
    assert "recipe" not in measured_with(document)


def test_what_was_not_measured_is_named_on_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.page.MODULES", {"loop_of_tomorrow": "loop", "reader": "reader"})
    main()
    _, loop, reader = capsys.readouterr().out.split("\n## ")
    assert loop.rstrip().endswith("`loop_of_tomorrow`: not measured yet.")
    assert "Measured on" in reader
    assert "not measured yet" not in reader


def test_a_forecast_is_compared_with_each_step_and_the_run() -> None:
    steps: list[dict[str, Any]] = [
        {"step": "pairs", "state": "done"},
        {"step": "clip", "start_s": 5.0, "end_s": 15.0},
        {"step": "decoder", "start_s": 15.0, "end_s": 105.0},
    ]
    rows = compare({"steps": steps, "run_s": 105.0}, {"clip": 20.0, "decoder": 120.0, "run": 150.0, "pairs": 1.0})
    assert [(row["step"], row["off"], row["at_most"]) for row in rows] == [
        ("clip", 0.5, None),  # a short step
        ("decoder", 0.25, 0.25),
        ("run", 0.3, 0.25),
    ]
    assert [row["holds"] for row in rows_of("forecast", {"rows": rows})] == ["", "yes", "no"]


def test_a_decoder_gets_the_steps_that_its_processor_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    spent_s = [0.0]

    class Training:
        """A step takes half a second; the first three, more."""

        def __init__(self, _job: object) -> None:
            self.step = 0

        def take_step(self) -> None:
            spent_s[0] += 0.5 if self.step >= 3 else 5.0
            self.step += 1

    monkeypatch.setattr("benchmarks.ablations.RehearsedTraining", Training)
    monkeypatch.setattr("time.process_time", lambda: spent_s[0])
    job: Any = SimpleNamespace(device=torch.device("cpu"))
    assert steps_within(100.0, job) == 200


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

"""What the page of benchmarks says beside its numbers."""

from typing import Any

from benchmarks.ablations import table_of
from benchmarks.page import measured_with


def test_a_measurement_names_its_device_where_the_results_do() -> None:
    document: dict[str, Any] = {"versions": {"torch": "2.11.0"}, "machine": {"threads": 16}, "settings": {}}
    assert measured_with(document) == "Measured with torch 2.11.0, 16 thread(s)"
    document["settings"] = {"device": "NVIDIA H200"}
    assert measured_with(document) == "Measured with torch 2.11.0, 16 thread(s), on NVIDIA H200"


def test_a_row_of_the_ablation_has_the_time_of_its_trainings() -> None:
    checks = {"one object": {"colour": {"generated": {"rate": 0.5}}}}
    runs = [{"recipe": "demo", "seed": seed, "train_s": 100.0 + 20 * seed, "pixel_check": checks} for seed in (0, 1)]
    (row,) = table_of(runs)
    assert (row["train_s"], row["one object: colour"], row["two objects: binding"]) == (110, "50.0 +- 0.0", None)

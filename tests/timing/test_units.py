"""The arithmetic from measured pieces to the time of a step has known answers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.shapes.scene import evaluation_scenes
from pipeline.timing.pictures import most_prompts
from pipeline.timing.units import (
    EvaluationUnits,
    RowUnits,
    TrainingUnits,
    Units,
    makespan,
    step_times,
    training_seconds,
)
from tests.tiny.recipe import tiny_tables, training

_EVALUATE = {
    "num_prompts": 20,
    "num_trained_prompts": 10,
    "num_shown": 4,
    "num_images_per_shown": 3,
    "batch_size": 16,
}


def _recipe(folder: Path, **changes: Any) -> Recipe:
    tables = tiny_tables(
        folder,
        pairs={"validation_prob": 0.25} | changes.get("pairs", {}),
        decoder=training(100, batch_size=8, save_every_steps=30),
        evaluate=_EVALUATE | changes.get("evaluate", {}),
    )
    return parse_recipe(tables)


@pytest.mark.parametrize(
    ("unit", "seconds"),
    [
        (TrainingUnits(step_s=0.5), 50),
        (TrainingUnits(step_s=0.0, start_s=2, end_s=3), 5),
        (TrainingUnits(step_s=0.0, save_s=1.0), 3),  # after steps 30, 60 and 90; the end is not a save
        (TrainingUnits(step_s=0.0, row_s=0.1), 30),  # 300 rows are read once and kept
        (TrainingUnits(step_s=0.0, row_s=0.1, most_cached_rows=299), 80),  # 100 batches of 8 are read
        (TrainingUnits(step_s=0.0, caption_s=0.1), 30),
        (TrainingUnits(step_s=0.0, caption_s=0.1, most_encoded_rows=10), 80),
    ],
)
def test_seconds_of_a_training(tmp_path: Path, unit: TrainingUnits, seconds: float) -> None:
    assert training_seconds(_recipe(tmp_path).decoder, unit, 300) == pytest.approx(seconds)


def test_a_training_by_a_changing_number_of_workers_takes_the_time_of_the_fewest(tmp_path: Path) -> None:
    unit = TrainingUnits(step_s=0.5, row_s=0.1, most_cached_rows=0)
    decoder = _recipe(tmp_path).decoder
    elastic = replace(decoder, resources=replace(decoder.resources, num_workers=(1, 4)))
    assert training_seconds(elastic, unit, 300) == training_seconds(decoder, unit, 300)


def test_a_training_that_sees_few_samples_reads_only_these(tmp_path: Path) -> None:
    unit = TrainingUnits(step_s=0.0, row_s=0.1)
    assert training_seconds(_recipe(tmp_path).decoder, unit, 100_000) == pytest.approx(80)


def test_step_times_count_the_rows_that_each_step_gets(tmp_path: Path) -> None:
    rows = {name: RowUnits(row_s=1.0, fixed_s=2.0) for name in ("pairs", "download", "embed")}
    rows["download"] = replace(rows["download"], unshared_row_s=0.25)
    units = Units(process_s=5.0, num_rows=1000, success=0.5, rows=rows)
    times = step_times(_recipe(tmp_path), units)
    assert {name: (value.fixed_s, value.shared_s) for name, value in times.items()} == {
        "pairs": (7.0, 1000.0),
        "download": (257.0, 1000.0),
        "embed": (7.0, 500.0),
    }


_EVALUATION = EvaluationUnits(start_s=1.0, sample_s=2.0, row_s=0.5, reconstruction_s=3.0, num_reconstructions=6)


def test_evaluation_time_is_that_of_its_parts_on_its_workers(tmp_path: Path) -> None:
    times = step_times(_recipe(tmp_path), Units(process_s=5.0, num_rows=100, evaluation=_EVALUATION))
    # 20 prompts and 4 x 2 further pictures in parts of 14; 10 trained prompts; 20 of 25 validation rows in parts of 10,
    # 6 reconstructed.
    assert times["evaluate"].fixed_s == 6.0
    assert times["evaluate"].shared_s == 2 * makespan([28, 28, 20, 5 + 18, 5], 2) == 2 * (28 + 20 + 5)


@pytest.mark.parametrize(
    ("pairs", "evaluate", "num_samples", "num_rows"),
    [
        ({}, {"num_prompts": 400}, 280 + 8 + 10, 250),  # there are 280 drawn scenes
        ({}, {"num_prompts": 20, "num_trained_prompts": 0}, 20 + 8, 20),
        ({}, {"num_prompts": 20, "num_trained_prompts": 30}, 20 + 8 + 20, 20),  # a prompt has one twin
        ({"source": "list"}, {}, 20 + 8, 20),  # only drawn prompts have twins
        ({"source": "list", "validation_prob": 0.01}, {}, 10 + 8, 10),
        ({"source": "list", "validation_prob": 0.0}, {}, 20 + 8, 20),  # training rows stand in
        ({}, {"prompts_path": "prompts.txt"}, 3 + 3 * 2, 20),
        ({"source": "list"}, {"prompts_path": "prompts.txt"}, 3 + 3 * 2, 20),
    ],
)
def test_evaluation_time_counts_the_pictures_and_rows_that_there_are(
    pairs: dict[str, Any], evaluate: dict[str, Any], num_samples: int, num_rows: int, tmp_path: Path
) -> None:
    recipe = _recipe(
        tmp_path, pairs={"path": "pairs.csv"} | pairs, evaluate=evaluate | {"resources": {"num_workers": 1}}
    )
    most = {"most_prompts": 3} if "prompts_path" in evaluate else {"most_prompts": 280} if not pairs else {}
    unit = replace(_EVALUATION, reconstruction_s=0.0, **most)
    times = step_times(recipe, Units(process_s=0.0, num_rows=1000, evaluation=unit))
    assert times["evaluate"].shared_s == pytest.approx(num_samples * 2.0 + num_rows * 0.5)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 12), (2, 8), (3, 5), (9, 5)])
def test_makespan_gives_each_part_to_the_first_free_worker(workers: int, seconds: float) -> None:
    assert makespan([3, 4, 5], workers) == seconds


def test_prompts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a fox\n\n  \na \xffox\n")
    assert most_prompts(_recipe(tmp_path, evaluate={"prompts_path": str(path)})) == 2
    assert most_prompts(_recipe(tmp_path)) == len(evaluation_scenes(280, 0))
    assert most_prompts(_recipe(tmp_path, pairs={"source": "list", "path": "pairs.csv"})) == math.inf


@pytest.mark.parametrize(
    ("num_imported", "rows"),
    [
        (None, {"pairs": 1000, "download": 1000, "filter": 800, "embed": 400, "index": 200, "decoder": 200}),
        (50, {"pairs": 1000, "embed": 50, "index": 25, "prior": 25, "filter": 800, "upsampler_1": 200}),
    ],
)
def test_steps_get_the_rows_that_come_stay_or_are_imported(num_imported: int | None, rows: dict[str, int]) -> None:
    kept = {"filter": 0.5, "filter_embeddings": 0.5}
    units = Units(process_s=0.0, num_rows=1000, success=0.8, pass_shares=kept, num_imported=num_imported)
    assert {name: units.rows_of(name) for name in rows} == rows


def test_imported_embeddings_have_a_validation_share_of_their_own(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, evaluate={"resources": {"num_workers": 1}})
    recipe = replace(recipe, embed=replace(recipe.embed, import_from="folder", import_validation_prob=0.01))
    units = Units(process_s=0.0, num_rows=0, num_imported=1000, evaluation=replace(_EVALUATION, reconstruction_s=0.0))
    # 28 samples, 10 of trained combinations, and 10 of 1000 rows.
    assert step_times(recipe, units)["evaluate"].shared_s == pytest.approx(38 * 2.0 + 10 * 0.5)

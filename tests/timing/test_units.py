"""The arithmetic from measured pieces to the time of a step has known answers."""

from pathlib import Path

import pytest

from pipeline.recipe.recipe import Recipe, parse_recipe
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


def _recipe(folder: Path) -> Recipe:
    return parse_recipe(
        tiny_tables(
            folder,
            pairs={"validation_prob": 0.25},
            decoder=training(100, batch_size=8, save_every_steps=30),
            evaluate={"num_prompts": 20, "num_shown": 4, "num_images_per_shown": 3, "batch_size": 16},
        )
    )


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


def test_a_training_that_sees_few_samples_reads_only_these(tmp_path: Path) -> None:
    unit = TrainingUnits(step_s=0.0, row_s=0.1)
    assert training_seconds(_recipe(tmp_path).decoder, unit, 100_000) == pytest.approx(80)


def test_step_times_count_the_rows_that_each_step_gets(tmp_path: Path) -> None:
    rows = {name: RowUnits(row_s=1.0, fixed_s=2.0) for name in ("pairs", "download", "embed")}
    units = Units(process_s=5.0, num_rows=1000, success=0.5, rows=rows)
    times = step_times(_recipe(tmp_path), units)
    assert {name: (value.fixed_s, value.shared_s) for name, value in times.items()} == {
        "pairs": (7.0, 1000.0),
        "download": (7.0, 1000.0),
        "embed": (7.0, 500.0),
    }


def test_evaluation_time_is_that_of_its_parts_on_its_workers(tmp_path: Path) -> None:
    unit = EvaluationUnits(start_s=1.0, sample_s=2.0, row_s=0.5, reconstruction_s=3.0, num_reconstructions=6)
    times = step_times(_recipe(tmp_path), Units(process_s=5.0, num_rows=100, evaluation=unit))
    # 20 prompts and 4 x 2 further pictures in parts of 14; 20 of 25 validation rows in parts of 10, 6 reconstructed.
    assert times["evaluate"].fixed_s == 6.0
    assert times["evaluate"].shared_s == 2 * makespan([28, 28, 5 + 18, 5], 2) == 2 * (28 + 23)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 12), (2, 8), (3, 5), (9, 5)])
def test_makespan_gives_each_part_to_the_first_free_worker(workers: int, seconds: float) -> None:
    assert makespan([3, 4, 5], workers) == seconds

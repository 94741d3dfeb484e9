"""A recipe is fitted into a number of minutes: the largest size that has enough steps, then as many steps as fit."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.init.fit import FREE_SHARE, Fit, fit, most_within
from pipeline.init.recipe import write_recipe
from pipeline.init.sizes import CPU_SIZES, Size, cpu_tables
from pipeline.recipe.estimate import status_remaining
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.recipe.status import plan_status
from pipeline.timing.units import TrainingUnits, Units
from pipeline.workspace.store import Workspace
from tests.tiny.command import ROOT
from tests.tiny.companions import start_no_companion
from tests.tiny.recipe import tiny_tables

_SIZES = (Size((32, 64), 500), Size((16, 64), 100))


@pytest.mark.parametrize(("limit_s", "steps"), [(10, 5), (29.9, 14), (30, 15), (1e9, 100)])
def test_most_within_takes_the_last_number_that_fits(limit_s: float, steps: int) -> None:
    assert most_within(lambda count: 2.0 * count, limit_s, 5, 100) == steps


@pytest.mark.parametrize(
    ("minutes", "sides_px", "steps"),
    [
        (140, (32, 64), 630),  # 10 s a step, and a quarter of the time stays free
        (120, (32, 64), 540),
        (110, (16, 64), 1000),  # fewer than 500 steps would fit: the smaller size takes its most, at 2 s a step
        (10, (16, 64), 225),
    ],
)
def test_fit_prefers_the_larger_size_while_it_has_enough_steps(
    tmp_path: Path, minutes: float, sides_px: tuple[int, ...], steps: int
) -> None:
    chosen = _fit(tmp_path, minutes)
    assert (chosen.size.sides_px, chosen.steps) == (sides_px, steps)
    assert chosen.seconds <= 60 * minutes * (1 - FREE_SHARE)
    assert set(chosen.times) == {"decoder"}


def test_too_few_minutes_are_refused_with_the_least_that_makes_sense(tmp_path: Path) -> None:
    least = r"--minutes 3: too few; .*\(16 -> 64 px, 100 steps\) takes about 3 min .*25% of the time .*--minutes 5$"
    with pytest.raises(ConfigError, match=least):
        _fit(tmp_path, 3)
    assert _fit(tmp_path, 5).steps >= 100


@pytest.mark.parametrize(("num_cpus", "num_workers"), [(1, 1), (2, 2), (3, 3), (16, 4)])
def test_the_decoder_is_measured_and_written_with_a_worker_for_each_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cpus: int, num_workers: int
) -> None:
    monkeypatch.setattr("pipeline.init.recipe.num_cpus", lambda: num_cpus)
    measured: list[int] = []

    def measure(recipe: Recipe, *_: object) -> Units:
        measured.append(recipe.decoder.resources.fewest_workers)
        return Units(process_s=0.0, num_rows=10, trainings={"decoder": TrainingUnits(step_s=0.1)})

    monkeypatch.setattr("pipeline.timing.measure.measure", measure)
    listed, out = tmp_path / "pictures", tmp_path / "mine.toml"
    listed.mkdir()
    Image.new("RGB", (16, 16)).save(listed / "0.png")
    monkeypatch.chdir(tmp_path)  # the recipe names its workspace from here
    write_recipe(str(listed), str(out), gpu=False, minutes=600.0)
    assert measured == [num_workers]
    assert load_recipe(out).decoder.resources.workers == (num_workers, num_workers)


@pytest.mark.timeout(900)
def test_init_with_minutes_writes_a_recipe_that_takes_no_longer_and_keeps_its_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_no_companion(monkeypatch)
    monkeypatch.chdir(tmp_path)  # the recipe names its workspace from here
    monkeypatch.setattr("pipeline.init.recipe.CPU_SIZES", (Size((16, 32), 200, num_prompts=4),))
    listed, out = tmp_path / "pictures", tmp_path / "mine.toml"
    listed.mkdir()
    for number in range(20):
        Image.new("RGB", (16, 16)).save(listed / f"{number}.png")
    measured: list[str] = []
    summary = write_recipe(str(listed), str(out), gpu=False, minutes=600.0, watch=measured.append)
    assert summary.startswith("20 pictures in a folder; sized for ")
    assert "600 minutes: " in summary
    assert {"clip", "decoder", "evaluate"} <= set(measured)
    recipe = load_recipe(out)
    rest = status_remaining(recipe, plan_status(Workspace(recipe.workspace), make_plan(recipe)))
    assert not rest.untimed
    assert 0 < rest.seconds <= 36_000 * (1 - FREE_SHARE)
    assert recipe.clip.train.num_steps > _recipe_of_pairs(listed, tmp_path / "other.toml").clip.train.num_steps


def test_every_size_makes_a_recipe_that_fits_together() -> None:
    for size in CPU_SIZES:
        recipe = parse_recipe({"workspace": "w"} | cpu_tables(1000, 0.1, size, size.least_steps, 2))
        sides = (recipe.decoder.model.image_px, *(model.image_px for model in recipe.upsamplers().values()))
        assert sides == size.sides_px
        assert recipe.download.image_px == size.sides_px[-1]
        assert recipe.evaluate.num_prompts == size.num_prompts


def test_a_small_decoder_is_that_of_the_demo_but_for_its_side() -> None:
    demo = load_recipe(ROOT / "configs/demo.toml").decoder.model
    for size in CPU_SIZES:
        recipe = parse_recipe({"workspace": "w"} | cpu_tables(1000, 0.1, size, size.least_steps, 2))
        side = size.sides_px[0]
        levels = tuple(level * side // demo.image_px for level in demo.unet.attention_resolutions)
        unet = dataclasses.replace(demo.unet, attention_resolutions=levels)
        assert recipe.decoder.model == dataclasses.replace(demo, image_px=side, sketch_px=side // 2, unet=unet)


def _recipe_of_pairs(listed: Path, out: Path) -> Recipe:
    write_recipe(str(listed), str(out), gpu=False)
    return load_recipe(out)


def _fit(folder: Path, minutes: float) -> Fit:
    """A recipe whose decoder takes 10 s a step at 32 px and 2 s at 16 px."""

    def make(size: Size, steps: int) -> Recipe:
        model = {"image_px": size.sides_px[0] // 4}
        tables = tiny_tables(
            folder, decoder={"model": model, "train": {"num_steps": steps}}, upsampler_1=None, upsampler_2=None
        )
        return parse_recipe(tables)

    def measure(recipe: Recipe) -> Units:
        step_s = 10.0 if recipe.decoder.model.image_px == 8 else 2.0
        return Units(process_s=0.0, num_rows=10, trainings={"decoder": TrainingUnits(step_s=step_s)})

    return fit(make, _SIZES, 1000, minutes, measure)

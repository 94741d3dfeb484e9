"""A recipe with every kind of network is measured; what cannot be measured here is refused."""

import csv
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.networks.table import NETWORKS, kind_of
from pipeline.recipe.estimate import load_times
from pipeline.recipe.plan import make_plan, plan_status
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.timing.measure import measure
from pipeline.timing.rehearsal import Rehearsal
from pipeline.timing.run_time import measure_run
from pipeline.workspace.store import Workspace
from tests.tiny.recipe import TRAINED, UNET, merge, tiny_tables, training

_KINDS = {
    "prior_2": {"model": {"kind": "autoregressive", "width": 16, "depth": 1, "num_heads": 2, "num_components": 4}},
    "noisy_clip": {"model": {"image_px": 8, "tower": {**UNET, "attention_resolutions": []}}},
    "evaluate": {"num_prompts": 6, "num_shown": 2, "batch_size": 4},
}


def _recipe(folder: Path, **changes: object) -> Recipe:
    names = [*TRAINED, *(name for name in ("prior_2", "noisy_clip") if name in changes)]
    short = dict.fromkeys(names, training(50, batch_size=4, save_every_steps=10))
    return parse_recipe(merge(tiny_tables(folder, **changes), short))


def test_every_step_and_every_kind_of_network_is_measured_and_kept_for_the_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, **_KINDS)
    assert {kind_of(section.model) for section in recipe.trained().values()} == set(NETWORKS)
    steps = make_plan(recipe)
    run, measured = measure_run(recipe, plan_status(Workspace(recipe.workspace), steps), lambda _what: None)
    assert set(run.spans) == {step.name for step in steps}
    assert run.untimed == ()
    assert all(span.end_s > span.start_s >= 0 for span in run.spans.values())
    assert run.seconds == run.spans["evaluate"].end_s
    assert max(run.spans[name].end_s for name in recipe.trained()) <= run.spans["evaluate"].start_s
    times, machine = load_times(recipe, steps)
    assert set(times) == set(run.spans)
    assert machine == measured


def test_a_gpu_recipe_on_a_machine_without_gpu_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    recipe = _recipe(tmp_path, decoder={"resources": {"accelerator": "cuda"}})
    with pytest.raises(ConfigError, match=r"decoder: accelerator is \"cuda\".*no GPU here.*on the machine that will"):
        measure(recipe, {})


def test_workers_that_this_machine_cannot_hold_are_refused(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, clip={"resources": {"cpus_per_worker": 4096.0}})
    with pytest.raises(ConfigError, match=r"clip: the workers need more CPUs than the \d+ of this machine"):
        measure(recipe, {})


def test_a_list_whose_pictures_do_not_come_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *((f"file:///no/{i}.png", "a") for i in range(20))])
    recipe = _recipe(tmp_path / "workspace", pairs={"source": "list", "path": str(path)})
    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {})
    rehearsal.pairs()
    with pytest.raises(DataError, match=r"0 of 20 rows came through, too few to measure"):
        rehearsal.download()


def test_an_unknown_pretrained_clip_is_refused(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, clip={"source": "pretrained", "name": "hf-hub:some/where"})
    with pytest.raises(ConfigError, match=r"clip.name: .*unclip run RECIPE --until clip"):
        Rehearsal(recipe, tmp_path / "rehearsal", {}).training("clip")

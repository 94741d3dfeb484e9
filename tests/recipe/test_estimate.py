"""The time to go of a run: from measured times, from earlier runs, and from the rates of the running steps."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.recipe.estimate import StepTime, load_times, remaining, save_times, status_remaining
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.schedule import Machine
from pipeline.recipe.status import plan_status
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import Progress, ProgressState
from pipeline.workspace.store import Workspace
from tests.tiny.recipe import tiny_tables

_TIMES = {
    "pairs": 1.0, "download": 2.0, "clip": 10.0, "embed": 3.0, "decoder": 60.0, "index": 1.0, "prior": 20.0,
    "upsampler_1": 30.0, "upsampler_2": 5.0, "evaluate": 8.0,
}  # fmt: skip
_TWO = Machine(cpus=2)


def _recipe(folder: Path, **changes: object) -> Recipe:
    return parse_recipe(tiny_tables(folder, **changes))


def _times(factor: float = 1.0) -> dict[str, StepTime]:
    return {name: StepTime(factor * seconds) for name, seconds in _TIMES.items()}


def _reading(done: int, rate: float, *, unit: str = "steps", wall_s: float = 0.0) -> ProgressState:
    return ProgressState(done, 100, unit, rate, (100 - done) / rate if rate else 0.0, "", wall_s, 0.0)


def _left(recipe: Recipe, names: Iterable[str], readings: Mapping[str, ProgressState], **options: object) -> float:
    steps = [step for step in make_plan(recipe) if step.name in names]
    rest = remaining(recipe, steps, readings, _times(), replace(_TWO, **options))  # type: ignore[arg-type]
    assert not rest.untimed
    return rest.seconds


def test_a_run_that_begins_takes_what_its_plan_takes(tmp_path: Path) -> None:
    # pairs, download, clip, embed, decoder, evaluate follow one another; the others fit beside them.
    assert _left(_recipe(tmp_path), _TIMES, {}) == 1 + 2 + 10 + 3 + 60 + 8


def test_the_rate_of_a_running_step_replaces_its_estimate(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    assert _left(recipe, ["decoder"], {"decoder": _reading(50, 0.5)}) == pytest.approx(100)
    assert _left(recipe, ["decoder"], {"decoder": _reading(5, 0.5)}) == pytest.approx((190 + 57) / 2)  # half trusted
    assert _left(recipe, ["decoder"], {"decoder": _reading(0, 0.0, wall_s=15)}) == pytest.approx(45)  # none yet


def test_a_step_whose_units_are_all_done_holds_up_nothing_that_waits(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    done = {"decoder": _reading(100, 2.0, wall_s=50)}  # its last validation runs
    assert _left(recipe, ["decoder"], done) == 0
    assert _left(recipe, ["decoder", "evaluate"], done) == pytest.approx(8)
    of_about_100 = {"pairs": _reading(100, 50.0, unit="rows", wall_s=0.4)}
    assert _left(recipe, ["pairs"], of_about_100) == pytest.approx(0.6)


def test_a_step_whose_units_are_all_done_is_named_beside_the_time(tmp_path: Path) -> None:
    recipe, done = _recipe(tmp_path), {"decoder": _reading(100, 2.0, wall_s=50)}
    steps = [step for step in make_plan(recipe) if step.name in {"decoder", "evaluate"}]
    rest = remaining(recipe, steps, done, _times(), _TWO)
    assert rest.text == "at least 8 s to go"
    assert rest.explain("R") == "at least 8 s to go besides the end of decoder"
    assert remaining(recipe, steps[:1], done, _times(), _TWO).explain("R") == "the end of decoder to go"
    rest = remaining(recipe, steps, done, {}, _TWO)
    assert (rest.untimed, rest.explain("R")) == (
        ("evaluate",),
        "unknown time to go; `unclip plan R --time` measures it",
    )


@pytest.mark.parametrize("others", [(), ("prior",)])
def test_status_names_a_step_that_ends_however_long_ago_its_units_were_done(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    recipe, workspace = _recipe(tmp_path), Workspace(str(tmp_path))
    save_times(recipe, _times(), 1.0)
    for name, done in {"decoder": 100, **dict.fromkeys(others, 50)}.items():
        Progress(artifact_of(workspace, _step(recipe, name))).update(done, 100, "steps", force=True)
    artifact = artifact_of(workspace, _step(recipe, "decoder"))
    artifact.write_json("live/progress.json", artifact.read_json("live/progress.json") | {"updated": 0.0})
    rest = status_remaining(recipe, plan_status(workspace, make_plan(recipe)))
    assert (rest.ending, rest.untimed) == (("decoder",), ())
    assert {*rest.spans} == {*_TIMES} - {"decoder"}


def test_what_waits_is_as_slow_as_what_runs(tmp_path: Path) -> None:
    # The decoder runs at half its estimated speed, so the evaluation is taken to need twice its time.
    readings = {"decoder": _reading(50, 50 / 60)}
    assert _left(_recipe(tmp_path), ["decoder", "evaluate"], readings) == pytest.approx(60 + 2 * 8)


def test_rates_beside_each_other_become_faster_when_one_ends(tmp_path: Path) -> None:
    readings = {"decoder": _reading(50, 50 / 60), "prior": _reading(50, 50 / 15)}
    steps = [step for step in make_plan(_recipe(tmp_path)) if step.name in readings]
    rest = remaining(_recipe(tmp_path), steps, readings, {}, Machine(cpus=2, crowding=1.5))
    assert rest.spans["prior"].end_s == pytest.approx(15)
    assert rest.spans["decoder"].end_s == pytest.approx(15 + 45 / 1.5)


def test_steps_of_unknown_time_make_the_estimate_a_least_time(tmp_path: Path) -> None:
    steps = [step for step in make_plan(_recipe(tmp_path)) if step.name in {"decoder", "evaluate"}]
    rest = remaining(_recipe(tmp_path), steps, {}, {"decoder": StepTime(60.0)}, _TWO)
    assert (rest.seconds, rest.untimed, rest.text) == (60, ("evaluate",), "at least 60 s to go")
    assert remaining(_recipe(tmp_path), steps, {}, {}, _TWO).text == "unknown time to go"


def test_measured_times_are_kept_for_the_same_settings_and_any_seed(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    save_times(recipe, _times(), 1.25)
    for same in (recipe, replace(recipe, seed=7)):
        times, machine = load_times(same, make_plan(same))
        assert times == _times()
        assert machine.crowding == 1.25
    other = _recipe(tmp_path, decoder={"train": {"num_steps": 7}})
    times, _ = load_times(other, make_plan(other))
    assert set(_TIMES) - set(times) == {"decoder", "evaluate"}  # evaluate reads the decoder


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": 3}'])
def test_damaged_times_stop_no_run(tmp_path: Path, text: str) -> None:
    recipe = _recipe(tmp_path)
    save_times(recipe, _times(), 1.25)
    (tmp_path / "recipes/tiny/times.json").write_text(text)
    times, machine = load_times(recipe, make_plan(recipe))
    assert (times, machine.crowding) == ({}, 1.0)


def test_a_step_that_was_not_measured_takes_the_time_of_its_last_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    _finish(recipe, {"decoder": 1, "embed": 2})
    again = replace(recipe, seed=1)
    times, _ = load_times(again, make_plan(again))
    assert times == {"decoder": StepTime(40.0), "embed": StepTime(0.0, 80.0)}
    _finish(again, {"decoder": 1}, wall_s=30.0)
    for either in (recipe, again, replace(recipe, seed=2)):
        times, _ = load_times(either, make_plan(either))
        assert times["decoder"] == StepTime(30.0)  # the newest


def test_recorded_times_are_found_without_the_manifests_of_other_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a download of 100,000 shards has 40 MB."""
    recipe, reads, manifests = _recipe(tmp_path), list[str](), Workspace.manifests
    _finish(recipe, {"pairs": 1, "download": 1, "embed": 2, "decoder": 1})
    again = replace(recipe, seed=1)

    def read(workspace: Workspace, step: str) -> tuple[list[Manifest], list[str]]:
        reads.append(step)
        return manifests(workspace, step)

    monkeypatch.setattr(Workspace, "manifests", read)
    for name, expected in (("decoder", StepTime(40.0)), ("embed", StepTime(0.0, 80.0))):  # embed has no seed of its own
        assert load_times(again, [_step(again, name)])[0] == {name: expected}
    assert set(reads) == {"pairs", "embed", "decoder"}


def test_the_time_of_a_trial_run_is_not_that_of_the_full_run(tmp_path: Path) -> None:
    for name, num_rows in (("trial", 10), ("full", 10_000)):
        rows = (f"http://127.0.0.1/{row}.png,a\n" for row in range(num_rows))
        (tmp_path / f"{name}.csv").write_text("url,caption\n" + "".join(rows))
    trial = _recipe(tmp_path / "w", pairs={"source": "list", "path": str(tmp_path / "trial.csv")})
    _finish(trial, {"pairs": 1, "download": 1, "decoder": 1})
    times, _ = load_times(trial, make_plan(trial))
    assert set(times) == {"pairs", "download", "decoder"}
    full = replace(trial, pairs=replace(trial.pairs, path=str(tmp_path / "full.csv")))
    capped = replace(trial, pairs=replace(trial.pairs, max_pairs=5))
    for other in (full, capped):
        assert load_times(other, make_plan(other))[0] == {}


def test_the_time_of_an_evaluation_is_that_of_its_own_networks(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    _finish(recipe, {"evaluate": 1})
    wider = _recipe(tmp_path, decoder={"model": {"unet": {"channels": 16}}})
    assert "evaluate" in load_times(recipe, make_plan(recipe))[0]
    assert "evaluate" not in load_times(wider, make_plan(wider))[0]


def test_the_time_of_a_training_is_that_of_as_many_workers(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, decoder={"resources": {"num_workers": 2}})
    _finish(recipe, {"decoder": 2})
    assert load_times(recipe, make_plan(recipe))[0] == {"decoder": StepTime(40.0)}
    alone = _recipe(tmp_path)
    assert load_times(alone, make_plan(alone))[0] == {}


def test_a_training_by_a_changing_number_of_workers_is_planned_as_one_by_the_fewest(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, decoder={"resources": {"num_workers": [1, 4]}})
    _finish(recipe, {"decoder": 2.5})
    assert load_times(recipe, make_plan(recipe))[0] == {"decoder": StepTime(100.0)}
    wider = _recipe(tmp_path, decoder={"resources": {"num_workers": [4, 5]}})
    assert load_times(wider, make_plan(wider))[0] == {}


def test_a_long_validation_by_one_process_leaves_a_training_its_time(tmp_path: Path) -> None:
    """Of 8 workers for 20 minutes, and then 2 minutes."""
    recipe = _recipe(tmp_path, decoder={"resources": {"num_workers": 8}})
    _finish(recipe, {"decoder": (8 * 1200 + 120) / 1320}, wall_s=1320.0)
    times, _ = load_times(recipe, make_plan(recipe))
    assert times["decoder"].fixed_s == pytest.approx(1200 + 120 / 8)


def test_status_counts_an_interrupted_step_from_where_it_stopped(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    save_times(recipe, _times(), 1.0)
    artifact = artifact_of(Workspace(recipe.workspace), _step(recipe, "pairs"))
    Progress(artifact).update(50, 100, "rows", force=True)
    artifact.write_json(
        "live/progress.json", artifact.read_json("live/progress.json") | {"updated": 0.0}
    )  # of another day
    statuses = plan_status(Workspace(recipe.workspace), make_plan(recipe))
    assert status_remaining(recipe, statuses).seconds == pytest.approx(sum((0.5, 2, 10, 3, 60, 8)))


def _step(recipe: Recipe, name: str) -> Step:
    return next(step for step in make_plan(recipe) if step.name == name)


def _finish(recipe: Recipe, workers: Mapping[str, float], wall_s: float = 40.0) -> None:
    """Commit empty artifacts of some steps, which took ``wall_s`` on so many workers in the mean."""
    for name, count in workers.items():
        step = _step(recipe, name)
        output = artifact_of(Workspace(recipe.workspace), step)
        manifest = manifest_of(step, output, wall_s=wall_s)
        output.commit(replace(manifest, node_s=count * manifest.wall_s, num_workers=math.ceil(count)))

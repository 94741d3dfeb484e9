"""A recipe with every kind of network is measured; what cannot be measured here is refused."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.data.npy_folder import export_embeddings
from pipeline.data.vectors import to_unit
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.networks.table import NETWORKS, kind_of
from pipeline.recipe.estimate import StepTime, load_times, save_times
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.schedule import this_machine
from pipeline.recipe.status import plan_status
from pipeline.recipe.steps import STEP_ROWS
from pipeline.timing.companion import training_together
from pipeline.timing.measure import _crowding, measure
from pipeline.timing.rehearsal import Rehearsal
from pipeline.timing.run_time import measure_run
from pipeline.timing.trainings import RehearsedTraining
from pipeline.timing.units import TrainingUnits, Units, step_times
from pipeline.train.assemble import TrainJob
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.companions import start_no_companion
from tests.tiny.recipe import TRAINED, UNET, merge, tiny_tables, training
from tests.tiny.shards import make_embeddings

_KINDS = {
    "prior_2": {"model": {"kind": "autoregressive", "width": 16, "depth": 1, "num_heads": 2, "num_components": 4}},
    "noisy_clip": {"model": {"image_px": 8, "tower": {**UNET, "attention_resolutions": []}}},
    "first_decoder": {},
    "evaluate": {"num_prompts": 6, "num_shown": 2, "batch_size": 4},
}
_FILTERS = {
    "filter": {"min_caption_words": 2, "duplicates": "near"},
    "filter_embeddings": {"clip_score_share": 0.5},
}


def _recipe(folder: Path, **changes: object) -> Recipe:
    names = [*TRAINED, *(name for name in ("prior_2", "noisy_clip") if name in changes)]
    short = dict.fromkeys(names, training(50, batch_size=4, save_every_steps=10))
    return parse_recipe(merge(tiny_tables(folder, **changes), short))


def test_every_step_and_every_kind_of_network_is_measured_and_kept_for_the_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, **_KINDS, **_FILTERS)
    assert {kind_of(section.model) for section in recipe.trained().values()} == set(NETWORKS)
    steps = make_plan(recipe)
    assert {step.name for step in steps} == set(STEP_ROWS)
    run, measured = measure_run(recipe, plan_status(Workspace(recipe.workspace), steps), lambda _what: None)
    assert set(run.spans) == {step.name for step in steps}
    assert run.untimed == ()
    assert all(span.end_s > span.start_s >= 0 for span in run.spans.values())
    assert run.seconds == run.spans["evaluate"].end_s
    assert max(run.spans[name].end_s for name in recipe.trained()) <= run.spans["evaluate"].start_s
    times, machine = load_times(recipe, steps)
    assert set(times) == set(run.spans)
    assert machine == measured


def test_a_part_of_a_recipe_is_measured_alone_and_leaves_the_other_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_no_companion(monkeypatch)
    recipe = _recipe(tmp_path, decoder={"resources": {"accelerator": "cuda", "cpus_per_worker": 4096.0}})
    workspace = Workspace(recipe.workspace)
    save_times(recipe, {"prior": StepTime(7.0), "download": StepTime(9999.0)}, 1.5)
    watched: list[str] = []
    run, machine = measure_run(recipe, plan_status(workspace, make_plan(recipe, until="download")), watched.append)
    assert set(run.spans) == {"pairs", "download"}
    assert watched == ["start of a process", "pairs", "download", "workers side by side"]
    times, machine = load_times(recipe, make_plan(recipe))
    assert set(times) == {"pairs", "download", "prior"}
    assert times["download"] != StepTime(9999.0)
    assert machine.crowding == 1.5  # no training was measured


def test_data_steps_that_only_a_rehearsal_takes_need_their_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    recipe = _recipe(tmp_path, embed={"resources": {"accelerator": "cuda"}})
    finished = {name: Artifact(str(tmp_path / name)) for name in ("pairs", "download", "clip", "embed")}
    with pytest.raises(ConfigError, match=r"^embed: accelerator is \"cuda\""):
        measure(recipe, finished, only=["prior"])


def _two_workers(folder: Path) -> TrainJob:
    """The rehearsed training of an upsampler on two workers."""
    recipe = _recipe(folder / "w", upsampler_1={"resources": {"num_workers": 2}})
    rehearsal = Rehearsal(recipe, folder / "rehearsal", {})
    rehearsal.pairs()
    rehearsal.download()
    return rehearsal.job("upsampler_1")


def _train_and_lose_the_other(job: TrainJob, alone: TrainJob, norms: list[float]) -> None:
    """A step together and the same alone, whose norms are added to ``norms``; then steps together without the other."""
    with training_together(job, 2) as first:
        trainings: list[RehearsedTraining] = []
        for one in (first, alone):
            trainings.append(RehearsedTraining(one))
            trainings[-1].take_step()
            norms.append(float(trainings[-1].state.grad_norm))
        for child in psutil.Process().children():
            if "pipeline.timing.companion" in child.cmdline():
                child.kill()
        for _ in range(3):
            trainings[0].take_step()


def test_workers_that_train_together_exchange_their_gradients_and_a_lost_one_is_one_message(tmp_path: Path) -> None:
    job, one_worker = _two_workers(tmp_path), _recipe(tmp_path / "w").upsampler_1
    alone, norms = replace(job, recipe=replace(job.recipe, upsampler_1=one_worker)), list[float]()
    with pytest.raises(StepError, match=r"ended before it had taken its steps; is memory short\?"):
        _train_and_lose_the_other(job, alone, norms)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # of the whole batch


def test_a_worker_that_is_lost_before_all_have_met_is_missed_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the time that a step may take."""
    monkeypatch.setattr("pipeline.timing.companion._MEETING_S", 0.5)
    monkeypatch.setattr("pipeline.timing.companion._expect", lambda child, _word: child.kill())
    job = _two_workers(tmp_path)
    with pytest.raises(StepError, match="ended before it"), training_together(job, 2):
        pass


def test_the_step_of_several_workers_is_that_of_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_no_companion(monkeypatch)
    monkeypatch.setattr("pipeline.timing.measure._crowding", lambda *_: 1.5)
    monkeypatch.setattr(RehearsedTraining, "step_s", lambda training: float(training.job.world_size))
    recipe = _recipe(tmp_path, upsampler_1={"resources": {"num_workers": 2}})
    watched: list[str] = []
    units = measure(recipe, {}, watched.append, only=["upsampler_1", "upsampler_2"])
    assert watched[-1] == "workers of upsampler_1 together"
    assert units.trainings["upsampler_2"].step_s == 1.0
    assert units.trainings["upsampler_1"].step_s == 2.0 / this_machine(units.crowding).slowdown(2)


def test_semantic_duplicates_are_not_timed(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, filter_embeddings={"max_similarity": 0.9})
    assert Rehearsal(recipe, tmp_path / "rehearsal", {}).rows("filter_embeddings") is None


def test_imported_embeddings_are_measured_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_no_companion(monkeypatch)
    folder, embed = tmp_path / "embeddings", Artifact(str(tmp_path / "embed"))
    vectors = to_unit(np.random.default_rng(0).standard_normal((320, 16)).astype(np.float16))
    make_embeddings(embed, vectors, vectors, 300)
    export_embeddings(embed, folder)
    sections: dict[str, Any] = {"embed": {"import_from": str(folder)}, "filter_embeddings": {"min_clip_score": 0.5}}
    recipe = _recipe(tmp_path / "w", **sections, pairs={"source": "list", "path": "/no/where"})
    # The decoder would read pictures of these rows, of which the rehearsal has none; so it is not timed.
    steps = {"embed", "filter_embeddings", "index"}
    units = measure(recipe, {}, only=[*steps, "decoder", "evaluate"])
    assert units.evaluation is None
    assert (set(units.rows), units.trainings, units.num_rows, units.num_imported) == (steps, {}, 0, 320)
    assert units.rows["embed"].row_s > 0
    times = step_times(recipe, units)
    assert times["index"].shared_s == pytest.approx(320 * units.rows["index"].row_s)


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


def test_a_step_of_a_changing_number_of_workers_is_that_of_one_of_the_fewest(tmp_path: Path) -> None:
    vit = {"vision": "vit", "vision_width": 32, "vision_depth": 1, "vision_heads": 2, "patch_px": 8}
    recipe = _recipe(tmp_path, clip={"model": vit, "resources": {"num_workers": [1, 2]}})
    rehearsal = Rehearsal(recipe, tmp_path / "rehearsal", {})
    rehearsal.pairs()
    rehearsal.download()
    assert len(RehearsedTraining(rehearsal.job("clip"))._share) == recipe.clip.train.batch_size


def test_an_unknown_pretrained_clip_is_refused(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, clip={"source": "pretrained", "name": "hf-hub:some/where"})
    with pytest.raises(ConfigError, match=r"clip.name: .*unclip run RECIPE --until clip"):
        Rehearsal(recipe, tmp_path / "rehearsal", {}).training("clip")


def test_a_pretrained_clip_takes_no_steps_that_others_could_slow_down() -> None:
    recipe = parse_recipe({"clip": {"source": "pretrained", "name": "ViT-B-32", "tag": "openai"}})
    units = Units(process_s=1.0, num_rows=10, trainings={"clip": TrainingUnits(step_s=0.0, start_s=2.0)})
    rehearsal: Any = None  # nothing is rehearsed
    assert _crowding(recipe, rehearsal, units) == 1.0

"""A training is rescued: settings change from a step on, a finished one goes on, a bad step is explained."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.layers.dropout import SampleDropout
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError, ResumeError, StepError
from pipeline.networks.contrast import ContrastiveObjective, Pairs
from pipeline.recipe.plan import artifact_of, earlier_trainings, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.status import plan_status
from pipeline.recipe.train_sections import TrainPhase
from pipeline.train.accumulation import Place
from pipeline.train.assemble import EarlierTraining, TrainJob
from pipeline.train.diagnosis import Culprits, describe, find_culprits
from pipeline.train.job import run_job
from pipeline.train.resume import checkpoint_name, checkpoint_steps
from pipeline.workspace.manifest import Manifest, content_of
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import INPUTS, MANIFEST, Artifact, Workspace
from tests.tiny.training import no_watch, tiny_inputs, training_recipe

STEP = "upsampler_1"


def _recipe(folder: Path, *phases: TrainPhase, **changes: Any) -> Recipe:
    """The tiny recipe with phases of the upsampler, and other changes of its training or its resources."""
    recipe = dataclasses.replace(training_recipe(), workspace=str(folder / "workspace"))
    section = recipe.trained()[STEP]
    of_train = {name: value for name, value in changes.items() if hasattr(section.train, name)}
    train = dataclasses.replace(section.train, phases=phases, **of_train)
    of_resources = {name: value for name, value in changes.items() if name not in of_train}
    resources = dataclasses.replace(section.resources, **of_resources)
    return dataclasses.replace(recipe, **{STEP: dataclasses.replace(section, train=train, resources=resources)})


def _job(recipe: Recipe, inputs: dict[str, Artifact]) -> TrainJob:
    """As the runner makes it of the step."""
    step = next(step for step in make_plan(recipe) if step.name == STEP)
    workspace = Workspace(recipe.workspace)
    earlier = [
        EarlierTraining(workspace.artifact(STEP, key), key, last_step) for key, last_step in earlier_trainings(step)
    ]
    output = artifact_of(workspace, step)
    return TrainJob(STEP, recipe, inputs, output, step.key, torch.device("cpu"), earlier=tuple(earlier))


def _weights(job: TrainJob) -> dict[str, Tensor]:
    return load_file(job.output.path("model.safetensors"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def _rates(job: TrainJob) -> list[float]:
    rows = [json.loads(line) for line in job.output.path(METRICS).read_text().splitlines()]
    return [row["lr"] for row in rows if "loss" in row]


def test_a_phase_continues_the_training_that_ran_before_it(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    phase = TrainPhase(from_step=3, learning_rate=5e-4, grad_clip_norm=0.1)
    before = _job(_recipe(tmp_path), inputs)
    run_job(before, no_watch)
    curve = before.output.path(METRICS).read_bytes()
    after = _job(_recipe(tmp_path, phase), inputs)
    assert after.digest != before.digest
    steps: list[int] = []

    def note(done: int, total: int, message: str) -> None:
        steps.append(done)

    [status] = [
        one for one in plan_status(Workspace(after.recipe.workspace), make_plan(after.recipe)) if one.step.name == STEP
    ]
    assert status.reasons[-1] == f"continues {STEP}/{before.digest} from step 2"
    metrics = run_job(after, note)
    assert steps[0] == 2  # the newest checkpoint that is not later than the phase
    assert metrics["continued"] == {"key": before.digest, "step": 2, "input_contents": {}}
    assert _rates(after) == [1e-3] * 3 + [5e-4] * 3
    assert checkpoint_steps(before.output) == [2, 4]  # what ran before is kept
    assert before.output.path(METRICS).read_bytes() == curve
    whole = _job(_recipe(tmp_path / "whole", phase), inputs)
    run_job(whole, no_watch)
    ours, theirs = _weights(after), _weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(ours[name], weight) for name, weight in _weights(before).items())


def test_a_finished_training_is_lengthened_from_the_state_that_it_kept(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    phase = TrainPhase(from_step=6, num_steps=8)
    before = _job(_recipe(tmp_path, keep_state=True), inputs)
    run_job(before, no_watch)
    for step in checkpoint_steps(before.output):
        before.output.remove(checkpoint_name(step))  # as a commit does
    former = {"key": "former", "step": 3, "input_contents": {"clip": "0"}}
    manifest = dataclasses.replace(_manifest(), metrics={"continued": former}, input_contents={"clip": "1"})
    before.output.write_json(MANIFEST, manifest.to_dict())
    longer = _job(_recipe(tmp_path, phase), inputs)
    origin = {"key": before.digest, "step": 6, "input_contents": {"clip": "1"}, "continued": former}
    assert run_job(longer, no_watch)["continued"] == origin
    whole = _job(_recipe(tmp_path / "whole", phase), inputs)
    assert run_job(whole, no_watch)["num_steps"] == 8
    ours, theirs = _weights(longer), _weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    before.output.remove("state/00000006.safetensors")
    refused = _job(_recipe(tmp_path, dataclasses.replace(phase, num_steps=9)), inputs)
    with pytest.raises(ResumeError, match=r"kept no state of its optimizer \(resources\.keep_state\)"):
        run_job(refused, no_watch)
    asked = _job(_recipe(tmp_path / "whole", keep_best="val_beauty"), inputs)
    with pytest.raises(ConfigError, match="keep_best = 'val_beauty'"):
        run_job(asked, no_watch)
    assert not checkpoint_steps(asked.output)  # it is refused before the first save


def _manifest(content: str = "") -> Manifest:
    files = {"weights": {"sha256": content}}
    return Manifest(step="", key="", step_version=1, section={}, inputs={}, files=files)


def test_a_training_of_inputs_that_were_made_anew_since_is_not_continued(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    recipe = _recipe(tmp_path)
    before, messages = _job(recipe, inputs), list[str]()
    run_job(before, no_watch)
    clip = Artifact(str(tmp_path / "clip"))
    shutil.copytree(inputs["clip"].uri, clip.uri)
    old, new = _manifest("old"), _manifest("new")
    before.output.write_json(INPUTS, {"clip": content_of(old)})
    after = _job(_recipe(tmp_path, TrainPhase(from_step=3, learning_rate=5e-4)), inputs | {"clip": clip})
    after.output.write_json("live/origin.json", {"key": before.digest, "step": 2})  # a start that was killed early
    clip.write_json(MANIFEST, new.to_dict())
    before.output.write_json(MANIFEST, dataclasses.replace(old, input_contents={"clip": content_of(old)}).to_dict())
    for is_finished in (True, False):
        if not is_finished:
            before.output.remove(MANIFEST)
        after.output.remove_all([name for name in after.output.names() if name != "live/origin.json"])
        messages.clear()
        metrics = run_job(after, lambda done, _total, message: messages.append(f"{done} {message}"))
        assert messages[0].startswith(f"0 training; begun at step 0: {before.output.uri} is not continued")
        assert "was trained on another clip" in messages[0]
        assert "continued" not in metrics

    rows_left = dataclasses.replace(new, former_contents=(content_of(old),))  # since rows were forgotten
    clip.write_json(MANIFEST, rows_left.to_dict())
    after.output.clear()
    assert run_job(after, no_watch)["continued"]["input_contents"] == {"clip": content_of(old)}


def test_a_phase_before_the_first_checkpoint_is_refused_by_its_step(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    before = _job(_recipe(tmp_path), inputs)
    run_job(before, no_watch)
    before.output.remove(checkpoint_name(2))
    with pytest.raises(ResumeError, match=r"its first checkpoint is of step 4, later than the phase .* at step 3"):
        run_job(_job(_recipe(tmp_path, TrainPhase(from_step=3, learning_rate=5e-4)), inputs), no_watch)


def _cut_short(job: TrainJob, name: str) -> None:
    path = job.output.path(name)
    path.write_bytes(path.read_bytes()[:-1])


def test_phases_before_damaged_checkpoints_are_refused_with_what_can_be_done(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    before = _job(_recipe(tmp_path), inputs)
    run_job(before, no_watch)
    early, late, last = (
        _job(_recipe(tmp_path, TrainPhase(from_step=step, learning_rate=5e-4)), inputs) for step in (3, 4, 5)
    )
    _cut_short(before, checkpoint_name(2))
    advice = "bring one back from a copy, or let the phase begin at step 4"
    with pytest.raises(ResumeError, match=rf"no checkpoint up to step 3 is whole: \S*00000002\S*: .*; {advice}"):
        run_job(early, no_watch)
    assert run_job(late, no_watch)["continued"]["step"] == 4

    _cut_short(before, checkpoint_name(4))
    folder = Path(before.output.uri) / "live" / "checkpoints"
    advice = rf"bring one back from a copy, or move {folder}/ away to start again"
    with pytest.raises(ResumeError, match=rf"no checkpoint up to step 5 is whole: .*00000004.*00000002.*; {advice}"):
        run_job(last, no_watch)
    folder.rename(tmp_path / "away")
    assert "continued" not in run_job(last, no_watch)


def test_a_damaged_state_of_a_finished_training_is_refused_with_what_can_be_done(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    before = _job(_recipe(tmp_path, keep_state=True), inputs)
    run_job(before, no_watch)
    before.output.commit(_manifest())
    _cut_short(before, "state/00000006.safetensors")
    longer = _job(_recipe(tmp_path, TrainPhase(from_step=6, num_steps=8)), inputs)
    advice = "bring one back from a copy, or start from its weights instead: init_from, without phases"
    with pytest.raises(ResumeError, match=rf"no checkpoint up to step 6 is whole: \S*state/00000006\S*: .*; {advice}"):
        run_job(longer, no_watch)


def test_phases_are_part_of_the_key_one_by_one(tmp_path: Path) -> None:
    phases = (TrainPhase(from_step=2, learning_rate=1e-4), TrainPhase(from_step=4, num_steps=9))
    keys = {
        count: next(step for step in make_plan(_recipe(tmp_path, *phases[:count])) if step.name == STEP)
        for count in range(3)
    }
    assert earlier_trainings(keys[2]) == [(keys[1].key, 4), (keys[0].key, 2)]
    assert earlier_trainings(keys[0]) == []
    assert "phases" not in keys[0].section["train"]


class _Fragile(nn.Module):
    """A loss that is not finite for samples whose uid begins with "bad"."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 3), SampleDropout(0.5), nn.Linear(3, 1))

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        x = torch.tensor([[torch.inf if uid.startswith("bad") else 1.0, 1.0] for uid in batch.uids])
        return self.network(x + random.normal("noise", (2,))).square().mean()


class _FragileContrast(ContrastiveObjective):
    """The same in a loss that compares samples."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 2)

    def encode(self, batch: Batch, random: SampleRandom) -> Pairs:
        del random
        x = torch.tensor([[torch.nan if uid.startswith("bad") else 1.0] for uid in batch.uids])
        return Pairs(self.network(x), torch.ones(len(batch), 2), torch.tensor(1.0))


@pytest.mark.parametrize("objective", [_Fragile(), _FragileContrast()])
def test_samples_and_parameters_that_are_not_finite_are_found(objective: nn.Module) -> None:
    uids = tuple(f"{'bad' if place in {3, 9} else 'good'}{place}" for place in range(11))
    batch, random = Batch(uids, ("",) * 11), SampleRandom.of_samples(1, range(11))
    place = Place(torch.device("cpu"), "float32")
    culprits = find_culprits(objective.train(), batch, random, place, [slice(0, 4), slice(4, 11)])
    assert culprits.uids == ["bad3", "bad9"]
    assert any(name.endswith("weight") for name in culprits.parameters)
    assert all(parameter.grad is None for parameter in objective.parameters())
    good = find_culprits(objective, batch.rows(slice(4, 9)), random.rows(slice(4, 9)), place, [slice(0, 5)])
    assert good == Culprits()


def test_culprits_are_described_shortly() -> None:
    assert describe(Culprits()) == "; each of its samples alone is finite"
    names = [f"network.layer{number}" for number in range(5)]
    expected = "; not finite alone: samples a, b, in the gradients of layer0, layer1, layer2 and 2 more"
    assert describe(Culprits(["a", "b"], names)) == expected


def test_a_bad_step_is_explained_and_a_larger_budget_goes_on(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.networks import upsampler

    healthy = upsampler.UpsamplerObjective.forward
    seen: list[str] = []

    def poisoned(self: upsampler.UpsamplerObjective, batch: Batch, random: SampleRandom) -> Tensor:
        if self.training and not seen and len(batch) == 4:
            poisoned.calls += 1  # pyright: ignore[reportFunctionMemberAccess]
            if poisoned.calls == 3:  # pyright: ignore[reportFunctionMemberAccess]
                seen.append(batch.uids[2])
        loss = healthy(self, batch, random)
        return loss * torch.nan if self.training and seen and seen[0] in batch.uids else loss

    poisoned.calls = 0  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(upsampler.UpsamplerObjective, "forward", poisoned)
    with pytest.raises(StepError, match="step 3: loss or gradient is not finite") as raised:
        run_job(_job(_recipe(tmp_path), inputs), no_watch)
    assert f"not finite alone: sample {seen[0]}" in str(raised.value)
    messages: list[str] = []

    def note(done: int, total: int, message: str) -> None:
        messages.append(f"{done} {message}")

    again = _job(_recipe(tmp_path, max_bad_steps=6), inputs)
    metrics = run_job(again, note)
    assert messages[0].startswith("2 ")  # the same key: from its checkpoint
    assert metrics["num_skipped_steps"] >= 1
    assert "steps not finite and skipped" in messages[-1]
    lines = again.output.path(METRICS).read_text().splitlines()
    rows = [row for row in (json.loads(line, parse_constant=pytest.fail) for line in lines) if "lr" in row]
    skipped = [row for row in rows if "loss" not in row]  # every step has a line
    assert len(rows) == 6
    assert len(skipped) == metrics["num_skipped_steps"]
    assert not [row for row in skipped if "grad_norm" in row]
    assert any("no step with a finite loss since the last line" in message for message in messages)

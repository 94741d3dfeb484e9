"""The plan says from where a training starts, and what it does not continue."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.status import plan_status
from pipeline.recipe.train_sections import TrainPhase
from pipeline.workspace.manifest import content_of
from pipeline.workspace.store import INPUTS, Artifact, Workspace

_INPUTS = ("pairs", "download", "clip", "embed")


class _Place:
    """A workspace with a decoder under way, and the plan of the same with a phase from step 300."""

    def __init__(self, folder: Path) -> None:
        self.workspace, recipe = Workspace(str(folder)), load_recipe(None)
        self.plan = {step.name: step for step in make_plan(recipe)}
        train = replace(recipe.decoder.train, phases=(TrainPhase(from_step=300, learning_rate=5e-5),))
        self.steps = make_plan(replace(recipe, decoder=replace(recipe.decoder, train=train)))
        self.before = artifact_of(self.workspace, self.plan["decoder"])
        self.where = f"decoder/{self.before.key}"

    @property
    def after(self) -> Artifact:
        return artifact_of(self.workspace, next(step for step in self.steps if step.name == "decoder"))

    def commit(self, name: str, data: bytes = b"") -> None:
        output = artifact_of(self.workspace, self.plan[name])
        output.write_bytes("00000.bin", data)
        output.commit(manifest_of(self.plan[name], output))

    def contents(self) -> dict[str, str]:
        manifests = {name: artifact_of(self.workspace, self.plan[name]).manifest() for name in _INPUTS}
        return {name: content_of(one) for name, one in manifests.items() if one and name != "pairs"}

    def reasons(self, steps: list[Step]) -> tuple[str, ...]:
        return next(one.reasons for one in plan_status(self.workspace, steps) if one.step.name == "decoder")[1:]


@pytest.fixture
def place(tmp_path: Path) -> _Place:
    place = _Place(tmp_path)
    for name in _INPUTS:
        place.commit(name)
    place.before.write_json(INPUTS, place.contents())
    place.before.write_bytes("live/checkpoints/00000200.safetensors", b"")
    place.before.write_bytes("live/checkpoints/00000400.safetensors", b"")
    return place


def test_a_training_says_from_which_step_of_another_it_continues(place: _Place) -> None:
    assert place.reasons(place.steps) == (f"continues {place.where} from step 200",)
    artifact_of(place.workspace, place.plan["clip"]).clear()
    condition = "unless clip or embed comes out different"
    artifact_of(place.workspace, place.plan["embed"]).clear()
    assert place.reasons(place.steps) == (f"continues {place.where} from step 200, {condition}",)
    place.after.write_bytes("live/checkpoints/00000250.safetensors", b"")
    assert place.reasons(place.steps) == ()  # what it has is its own


def test_a_training_of_other_inputs_is_not_continued_and_its_own_work_is_not_used(place: _Place) -> None:
    place.commit("clip", b"anew")
    assert place.reasons(place.steps) == (
        f"{place.where} is not continued: it was trained on another clip, made anew since",
        "begins at step 0: there is no training that its phases can continue",
    )
    words = "what it has done is not used: clip was made anew, with other content"
    assert place.reasons([*place.plan.values()]) == (words,)
    place.after.write_json(INPUTS, place.contents() | {"clip": "of before"})
    place.after.write_bytes("live/checkpoints/00000250.safetensors", b"")
    place.before.write_json(INPUTS, place.contents())
    assert place.reasons(place.steps) == (words, f"continues {place.where} from step 200")


def test_a_training_that_cannot_continue_is_said(place: _Place) -> None:
    place.before.remove("live/checkpoints/00000200.safetensors")
    words = "its first checkpoint is of step 400, later than the phase that begins at step 300"
    assert place.reasons(place.steps) == (f"cannot continue {place.where}: {words}",)
    place.before.commit(replace(manifest_of(place.plan["decoder"], place.before), input_contents=place.contents()))
    words = "it is finished and kept no state of its optimizer (resources.keep_state)"
    assert place.reasons(place.steps)[-1] == f"cannot continue {place.where}: {words}"
    place.before.write_bytes("state/00000300.safetensors", b"")
    assert place.reasons(place.steps)[-1] == f"continues {place.where} from step 300"
    place.before.write_bytes("manifest.json", b"damaged")
    assert f"{place.before.uri}/manifest.json: not valid JSON" in place.reasons(place.steps)[-1]


def test_phases_without_a_training_before_them_begin_at_step_0(place: _Place) -> None:
    place.before.clear()
    assert place.reasons(place.steps) == ()  # the first one in this workspace
    place.workspace.artifact("decoder", "of other inputs").write_bytes("live/checkpoints/00000200.safetensors", b"")
    assert place.reasons(place.steps) == ("begins at step 0: there is no training that its phases can continue",)


def test_a_training_goes_on_from_the_state_that_it_has_kept_itself(place: _Place) -> None:
    place.after.write_bytes("state/00000250.safetensors", b"")
    assert place.reasons(place.steps) == ()


def test_the_files_of_a_step_without_phases_are_listed_once(place: _Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data step has some for each of a hundred thousand shards."""
    names, listings = Artifact.names, list[str]()

    def note_names(artifact: Artifact) -> list[str]:
        listings.append(artifact.uri)
        return names(artifact)

    monkeypatch.setattr(Artifact, "names", note_names)
    assert place.reasons([*place.plan.values()]) == ()
    assert listings.count(place.before.uri) == 1
    assert len(listings) == len(set(listings))


def test_a_damaged_note_of_the_inputs_is_said_of_its_step_alone(place: _Place) -> None:
    place.before.write_bytes(INPUTS, b"damaged")
    for steps in ([*place.plan.values()], place.steps):  # its own, and that of the training which phases continue
        [reason] = place.reasons(steps)
        assert reason.startswith(f"{place.before.uri}/{INPUTS}: ")

"""Trainings of every network: kills, settings that change next to nothing, initial weights, refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.decoder.network import Decoder
from pipeline.errors import DataError, ResumeError
from pipeline.networks.clip import load_clip_artifact
from pipeline.networks.files import load_network
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.tables import to_dict
from pipeline.train.assemble import TrainJob, assemble, samples_of
from pipeline.train.job import run_job
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import INPUTS, Artifact
from tests.tiny.shards import write_download, write_embed
from tests.tiny.training import KilledError, changed_recipe, kill_at, no_watch, tiny_inputs, tiny_job, training_recipe

_OF_THE_MACHINE = {"time", "samples_per_s", "stalled_share", "peak_memory_gb", "mfu", "eta_s", "begun"}


def _contents(output: Path) -> dict[str, bytes]:
    """The bytes of every file, without what depends on the machine in the curves."""
    contents = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    rows = [json.loads(line) for line in contents[METRICS].splitlines()]
    rows = [{name: value for name, value in row.items() if name not in _OF_THE_MACHINE} for row in rows]
    return contents | {METRICS: "\n".join(map(json.dumps, rows)).encode()}


@pytest.mark.parametrize("name", ["clip", "prior", "prior_2", "decoder", "decoder bound", "noisy_clip", "upsampler_1"])
def test_a_killed_training_ends_in_the_same_bytes(tmp_path: Path, name: str) -> None:
    inputs = tiny_inputs(tmp_path)
    metrics = run_job(tiny_job(name, inputs, tmp_path / "calm"), no_watch)
    calm = _contents(tmp_path / "calm")
    with pytest.raises(KilledError):
        run_job(tiny_job(name, inputs, tmp_path / "wild"), kill_at(5))
    assert Artifact(str(tmp_path / "wild")).exists(checkpoint_name(4))
    steps: list[int] = []

    def note(done: int, total: int, message: str) -> None:
        steps.append(done)

    assert run_job(tiny_job(name, inputs, tmp_path / "wild"), note) == metrics
    assert steps == [4, 5, 6]  # what the checkpoint holds is not done again
    assert _contents(tmp_path / "wild") == calm

    rows = [json.loads(line) for line in calm[METRICS].decode().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]
    assert metrics["num_steps"] == 6
    assert metrics["val_loss"] > 0


@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
def test_checkpointing_changes_no_byte(tmp_path: Path, name: str) -> None:
    inputs = tiny_inputs(tmp_path)
    run_job(tiny_job(name, inputs, tmp_path / "kept"), no_watch)
    job = tiny_job(name, inputs, tmp_path / "recomputed", changed_recipe(name, resources__checkpointing=True))
    run_job(job, no_watch)
    assert _contents(tmp_path / "recomputed") == _contents(tmp_path / "kept")
    names = ("checkpointing", "grad_checkpointing")
    assert any(getattr(module, name, False) for module in assemble(job).network.modules() for name in names)


@pytest.mark.parametrize("name", ["prior", "prior_2", "decoder", "noisy_clip", "upsampler_1"])
def test_half_precision_loses_nearly_the_same_and_leaves_full_weights(tmp_path: Path, name: str) -> None:
    inputs = tiny_inputs(tmp_path)
    full = run_job(tiny_job(name, inputs, tmp_path / "full"), no_watch)
    job = tiny_job(name, inputs, tmp_path / "half", changed_recipe(name, train__precision="bfloat16"))
    half = run_job(job, no_watch)
    assert half["loss"] != full["loss"]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.05)
    weights = load_file(job.output.path("model.safetensors")).values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("clip_precision", ["float32", "bfloat16"])
def test_captions_are_encoded_in_the_precision_of_the_recipe_whatever_the_training_computes_in(
    tmp_path: Path, clip_precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.assemble.CAPTION_TABLE_BYTES", 0)  # batch by batch, as of long lists
    recipe = changed_recipe("prior", train__precision="bfloat16", train__clip_precision=clip_precision)
    parts = assemble(tiny_job("prior", tiny_inputs(tmp_path), tmp_path / "out", recipe))
    encode: Any = parts.objective(parts.network)._encode_text
    expected = encode(["a red circle"])
    with torch.autocast("cpu", torch.bfloat16):
        actual = encode(["a red circle"])
    assert torch.equal(actual.hidden, expected.hidden)
    assert torch.equal(actual.pooled, expected.pooled)
    rounded = expected.hidden.bfloat16().float()
    assert torch.equal(expected.hidden, rounded) == (clip_precision == "bfloat16")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own question
@pytest.mark.parametrize("name", ["clip", "decoder"])
def test_a_compiled_training_is_the_same_but_for_rounding(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, torch_compile = list[Any](), torch.compile

    def quick_compile(function: Any) -> Any:
        """Without the code generator, which takes half a minute."""
        compiled.append(function.__self__)
        return torch_compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", quick_compile)
    inputs = tiny_inputs(tmp_path)
    plain = run_job(tiny_job(name, inputs, tmp_path / "plain"), no_watch)
    job = tiny_job(name, inputs, tmp_path / "compiled", changed_recipe(name, resources__compiled=True))
    assert run_job(job, no_watch)["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert [type(network) for network in compiled] == ([Decoder] if name == "decoder" else [])
    assert load_network(job.output) if name == "decoder" else load_clip_artifact(job.output)


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_1"])
def test_training_starts_from_given_weights(tmp_path: Path, name: str) -> None:
    inputs, first = tiny_inputs(tmp_path), tmp_path / "first"
    run_job(tiny_job(name, inputs, first), no_watch)
    as_they_are = changed_recipe(name, init_from=str(first), train__num_steps=0)
    run_job(tiny_job(name, inputs, tmp_path / "same", as_they_are), no_watch)
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (first / weights).read_bytes()
    tuned = changed_recipe(name, init_from=str(first))
    metrics = run_job(tiny_job(name, inputs, tmp_path / "tuned", tuned), no_watch)
    assert metrics["num_steps"] == 6
    assert (tmp_path / "tuned" / weights).read_bytes() != (first / weights).read_bytes()


def test_a_decoder_begins_with_the_weights_of_the_first_one(tmp_path: Path) -> None:
    tables = to_dict(training_recipe())
    tables["first_decoder"] = {"train": {"num_steps": 3}}
    tables["decoder"]["train"] |= {"num_steps": 1, "learning_rate": 1e-30}
    recipe = parse_recipe(tables)
    assert recipe.first_decoder is not None
    assert recipe.first_decoder.model.image_px == 4
    inputs, first, begun = tiny_inputs(tmp_path), tmp_path / "first", tmp_path / "decoder"
    run_job(tiny_job("first_decoder", inputs, first, recipe), no_watch)
    Artifact(str(first)).write_json(INPUTS, {"embed": "1"})
    metrics = run_job(tiny_job("decoder", inputs | {"first_decoder": Artifact(str(first))}, begun, recipe), no_watch)
    assert metrics["begun_with"] == {"name": "first_decoder", "key": "first", "input_contents": {"embed": "1"}}
    run_job(tiny_job("decoder", inputs, tmp_path / "other", recipe), no_watch)
    weights = [load_file(folder / "model.safetensors") for folder in (first, begun, tmp_path / "other")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)
    assert any(not torch.equal(weights[2][name], value) for name, value in weights[0].items())
    assert load_network(Artifact(str(begun))).config.image_px == 8


def test_job_refuses_a_checkpoint_of_another_recipe(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    job = tiny_job("upsampler_1", inputs, tmp_path / "out")
    run_job(job, no_watch)
    job = TrainJob("upsampler_1", training_recipe(), inputs, job.output, "another key", job.device)
    with pytest.raises(ResumeError, match="another recipe"):
        run_job(job, no_watch)


def test_a_seed_of_its_own_for_every_network(tmp_path: Path) -> None:
    jobs = [tiny_job(name, {}, tmp_path) for name in ("upsampler_1", "upsampler_2")]
    assert jobs[0].seed != jobs[1].seed


def test_a_training_of_pictures_refuses_imported_embeddings_of_other_rows(tmp_path: Path) -> None:
    other = write_embed(tmp_path / "imported", write_download(tmp_path / "other", num_rows=16))
    inputs = {"download": write_download(tmp_path / "download"), "embed": other}
    recipe = training_recipe()
    recipe = dataclasses.replace(recipe, embed=dataclasses.replace(recipe.embed, import_from="folder"))
    with pytest.raises(DataError, match=r"decoder: .* is no row of the download, whose pictures"):
        samples_of(tiny_job("decoder", inputs, tmp_path / "out", recipe), "train")
    assert samples_of(tiny_job("prior", inputs, tmp_path / "out", recipe), "train").num_rows  # it reads no pictures

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.decoder.config import TextTransformerConfig
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.prior.config import PriorConfig
from models.prior.network import EMBEDDING_SCALE
from pipeline.errors import DataError, ResumeError, StepError
from pipeline.networks.cascade import load_cascade
from pipeline.networks.clip import load_clip_artifact
from pipeline.networks.files import load_network
from pipeline.recipe.recipe import Recipe, parse_recipe, to_dict
from pipeline.recipe.train_sections import TrainConfig
from pipeline.runtime.tracking.records import begun_at
from pipeline.train.assemble import TrainJob, assemble, samples_of
from pipeline.train.job import MetricsLog, run_job
from pipeline.train.resume import CheckpointWriter, checkpoint_name, checkpoint_steps
from pipeline.train.state import create_state
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import INPUTS, Artifact
from tests.models.tiny_models import with_stages
from tests.tiny.shards import EMBED_DIM, write_download, write_embed
from tests.tiny.storage import fail_calls
from tests.tiny.training import no_watch, tiny_inputs, tiny_job, training_recipe

_OF_THE_MACHINE = {"time", "samples_per_s", "stalled_share", "peak_memory_gb", "mfu", "eta_s", "begun"}


def _contents(output: Path) -> dict[str, bytes]:
    """The bytes of every file, without what depends on the machine in the curves."""
    contents = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    rows = [json.loads(line) for line in contents[METRICS].splitlines()]
    rows = [{name: value for name, value in row.items() if name not in _OF_THE_MACHINE} for row in rows]
    return contents | {METRICS: "\n".join(map(json.dumps, rows)).encode()}


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("name", ["clip", "prior", "prior_2", "decoder", "decoder bound", "noisy_clip", "upsampler_1"])
def test_a_killed_training_ends_in_the_same_bytes(tmp_path: Path, name: str) -> None:
    inputs = tiny_inputs(tmp_path)
    metrics = run_job(tiny_job(name, inputs, tmp_path / "calm"), no_watch)
    calm = _contents(tmp_path / "calm")

    def kill(done: int, total: int, message: str) -> None:
        if done == 5:
            raise _KilledError

    with pytest.raises(_KilledError):
        run_job(tiny_job(name, inputs, tmp_path / "wild"), kill)
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


@pytest.fixture
def killed(tmp_path: Path) -> TrainJob:
    """A training that was killed after its checkpoint of step 4."""

    def kill(done: int, total: int, message: str) -> None:
        if done == 5:
            raise _KilledError

    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output")
    with pytest.raises(_KilledError):
        run_job(job, kill)
    return job


def test_a_training_whose_checkpoints_cannot_be_listed_does_not_begin_again(
    killed: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoint_steps(killed.output)
    with monkeypatch.context() as patch:
        fail_calls(patch, "scandir", times=99, ends=("live/checkpoints", "live/checkpoints/"))
        with pytest.raises(StepError, match=r"live/checkpoints/: cannot be read: Stale"):
            run_job(killed, no_watch)
    assert checkpoint_steps(killed.output) == checkpoints == [2, 4]


def test_curves_beyond_a_checkpoint_that_is_whole_after_all_are_kept(killed: TrainJob) -> None:
    newest = killed.output.path(checkpoint_name(4))
    whole = newest.read_bytes()
    before = killed.output.read_bytes(METRICS)

    def kill(done: int, total: int, message: str) -> None:
        if done == 3:
            raise _KilledError

    for _ in range(2):  # starts that see it as damaged, as on a machine with bad memory
        newest.write_bytes(whole[:-1])
        with pytest.raises(_KilledError):
            run_job(killed, kill)
        newest.write_bytes(whole)
    assert _steps_of_losses(killed)[-1] < 4
    run_job(killed, no_watch)
    assert _steps_of_losses(killed) == [1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in killed.output.read_bytes(METRICS).splitlines()]
    assert json.loads(before.splitlines()[-1]) in rows  # step 4 was not trained again


def test_a_training_says_that_it_begins_at_step_0_though_its_curves_went_further(killed: TrainJob) -> None:
    messages: list[str] = []

    def note(done: int, total: int, message: str) -> None:
        messages.append(f"{done} {message}")

    run_job(killed, note)
    assert messages[0] == "4 training"
    for step in checkpoint_steps(killed.output):
        killed.output.remove(checkpoint_name(step))
    messages.clear()
    run_job(killed, note)
    assert messages[0] == "0 training; begun at step 0: there is no checkpoint, though the curves reach step 6"
    assert messages[-1].endswith(messages[0].partition("training")[2])


def test_a_killed_training_that_is_validated_beside_loses_no_row_of_its_curves(tmp_path: Path) -> None:
    recipe = _changed("upsampler_1", resources__validation="beside")
    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe)

    def kill(done: int, total: int, message: str) -> None:
        if done == 5:
            raise _KilledError

    with pytest.raises(_KilledError):
        run_job(job, kill)
    assert checkpoint_steps(job.output) == [2, 4]
    assert _steps_of_losses(job) == [1, 2, 3, 4]
    run_job(job, no_watch)
    assert _steps_of_losses(job) == [1, 2, 3, 4, 5, 6]


def test_the_curves_are_published_before_a_checkpoint_and_by_the_thread_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker waits for it; if it fails there is no checkpoint, whose rows no later start would write."""
    recipe = _changed("upsampler_1", resources__validation="beside")
    job, write = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe), Artifact.write_bytes
    writers = list[str]()

    def write_noted(artifact: Artifact, name: str, data: bytes) -> None:
        if name == METRICS:
            writers.append(threading.current_thread().name)
            if writers.count("checkpoint") == 2:
                raise StepError("no room for curves")
        write(artifact, name, data)

    monkeypatch.setattr(Artifact, "write_bytes", write_noted)
    monkeypatch.setattr("pipeline.train.job._FLUSH_S", 600.0)
    with pytest.raises(StepError, match="no room for curves"):
        run_job(job, no_watch)
    # The first line is published at once, the others with the next checkpoint.
    assert writers == [threading.main_thread().name, "checkpoint", "checkpoint"]
    assert checkpoint_steps(job.output) == [2]
    monkeypatch.undo()
    run_job(job, no_watch)
    assert _steps_of_losses(job) == [1, 2, 3, 4, 5, 6]


def test_the_curves_are_published_before_the_state_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, keep = _changed("upsampler_1", resources__keep_state=True), CheckpointWriter.keep_state
    job = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe)

    def keep_and_die(writer: CheckpointWriter, *arguments: Any) -> None:
        keep(writer, *arguments)
        raise _KilledError

    monkeypatch.setattr("pipeline.train.job._FLUSH_S", 600.0)
    monkeypatch.setattr(CheckpointWriter, "keep_state", keep_and_die)
    with pytest.raises(_KilledError):
        run_job(job, no_watch)
    monkeypatch.undo()
    run_job(job, no_watch)
    assert _steps_of_losses(job) == [1, 2, 3, 4, 5, 6]


def test_rows_are_added_while_others_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = MetricsLog(Artifact(str(tmp_path)), 0), Artifact.write_bytes
    state = create_state(torch.nn.Linear(1, 1), TrainConfig(), torch.device("cpu"))
    begun, goes_on = threading.Event(), threading.Event()

    def write_slowly(artifact: Artifact, name: str, data: bytes) -> None:
        begun.set()
        assert goes_on.wait(10)
        write(artifact, name, data)

    monkeypatch.setattr(Artifact, "write_bytes", write_slowly)
    writer = threading.Thread(target=log.flush, args=(0,))
    writer.start()
    assert begun.wait(10)
    for state.step in (1, 2):
        log.add_losses(state, 0.1, {"samples_per_s": 1.0, "stalled_share": 0.0, "peak_memory_gb": 0.0}, 1)
    goes_on.set()
    writer.join()
    log.flush(2)
    assert [row["step"] for row in MetricsLog(Artifact(str(tmp_path)), 2).rows] == [1, 2]


def test_curves_that_cannot_be_read_for_a_moment_are_continued(
    killed: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _steps_of_losses(killed)
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "open", ends=(METRICS,))
        assert [row["step"] for row in MetricsLog(killed.output, 4).rows if "loss" in row] == before == [1, 2, 3, 4]
        assert len(failed) == 1


def test_a_training_has_begun_anew_only_if_it_has_no_checkpoint(tmp_path: Path) -> None:
    recipe = _changed("upsampler_1", resources__log_every_steps=4)  # and a checkpoint after every second step
    job, begun = tiny_job("upsampler_1", tiny_inputs(tmp_path), tmp_path / "output", recipe), list[float]()

    def kill(done: int, total: int, message: str) -> None:
        if done == 4:
            begun.append(begun_at(job.output.path(METRICS).read_text().splitlines()))
            raise _KilledError  # before the checkpoint of that step

    for without_checkpoints in (False, False, True):
        for step in checkpoint_steps(job.output) if without_checkpoints else []:
            job.output.remove(checkpoint_name(step))
        with pytest.raises(_KilledError):
            run_job(job, kill)
    assert begun[0] == begun[1] < begun[2]
    run_job(job, no_watch)
    rows = [json.loads(line) for line in job.output.path(METRICS).read_text().splitlines()]
    assert [row["begun"] for row in rows if "begun" in row] == begun[2:]


def _steps_of_losses(job: TrainJob) -> list[int]:
    rows = map(json.loads, job.output.path(METRICS).read_text().splitlines())
    return [row["step"] for row in rows if "loss" in row]


def test_a_damaged_checkpoint_counts_also_after_another_start(killed: TrainJob) -> None:
    path = killed.output.path(checkpoint_name(4))
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    def kill(done: int, total: int, message: str) -> None:
        if done == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        run_job(killed, kill)
    killed.output.remove(checkpoint_name(4))
    assert run_job(killed, no_watch)["num_damaged_checkpoints"] == 1


def _changed(name: str, **changes: Any) -> Recipe:
    """The recipe with fields of one step's section changed, ``section__field`` inside its tables."""
    section: Any = getattr(training_recipe(), name)
    for path, value in changes.items():
        table, _, field = path.rpartition("__")
        inner = dataclasses.replace(getattr(section, table), **{field: value}) if table else value
        section = dataclasses.replace(section, **{table or field: inner})
    return dataclasses.replace(training_recipe(), **{name: section})


@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
def test_checkpointing_changes_no_byte(tmp_path: Path, name: str) -> None:
    inputs = tiny_inputs(tmp_path)
    run_job(tiny_job(name, inputs, tmp_path / "kept"), no_watch)
    job = tiny_job(name, inputs, tmp_path / "recomputed", _changed(name, resources__checkpointing=True))
    run_job(job, no_watch)
    assert _contents(tmp_path / "recomputed") == _contents(tmp_path / "kept")
    names = ("checkpointing", "grad_checkpointing")
    assert any(getattr(module, name, False) for module in assemble(job).network.modules() for name in names)


@pytest.mark.parametrize("name", ["prior", "prior_2", "decoder", "noisy_clip", "upsampler_1"])
def test_half_precision_loses_nearly_the_same_and_leaves_full_weights(tmp_path: Path, name: str) -> None:
    inputs = tiny_inputs(tmp_path)
    full = run_job(tiny_job(name, inputs, tmp_path / "full"), no_watch)
    job = tiny_job(name, inputs, tmp_path / "half", _changed(name, train__precision="bfloat16"))
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
    recipe = _changed("prior", train__precision="bfloat16", train__clip_precision=clip_precision)
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
    job = tiny_job(name, inputs, tmp_path / "compiled", _changed(name, resources__compiled=True))
    assert run_job(job, no_watch)["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert [type(network) for network in compiled] == ([Decoder] if name == "decoder" else [])
    assert load_network(job.output) if name == "decoder" else load_clip_artifact(job.output)


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_1"])
def test_training_starts_from_given_weights(tmp_path: Path, name: str) -> None:
    inputs, first = tiny_inputs(tmp_path), tmp_path / "first"
    run_job(tiny_job(name, inputs, first), no_watch)
    as_they_are = _changed(name, init_from=str(first), train__num_steps=0)
    run_job(tiny_job(name, inputs, tmp_path / "same", as_they_are), no_watch)
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (first / weights).read_bytes()
    tuned = _changed(name, init_from=str(first))
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


def test_trained_networks_make_a_cascade(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    for name in ("prior", "decoder", "upsampler_1", "upsampler_2"):
        run_job(tiny_job(name, inputs, tmp_path / name, training_recipe(1)), no_watch)
    artifacts = {name: Artifact(str(tmp_path / name)) for name in ("clip", "prior", "decoder", "upsampler_1")}
    assert load_cascade(artifacts).sample(["a red circle"], [0]).images.shape == (1, 16, 16, 3)
    artifacts["upsampler_2"] = Artifact(str(tmp_path / "upsampler_2"))
    cascade = load_cascade(artifacts)
    assert cascade.sample(["a red circle"], [0]).images.shape == (1, 32, 32, 3)
    # Measured, since the recipe samples analytically; of a prior that has learned next to nothing it is the square
    # of the embeddings' scale, at every step.
    prior, decoder = (stage.network for stage in cascade.stages[:2])
    assert prior.x0_variance.tolist() == pytest.approx([EMBEDDING_SCALE**2] * 1000, rel=0.1)
    empty = load_clip_artifact(inputs["clip"]).encode_text([""])
    assert torch.equal(decoder.null_text.hidden, empty.hidden[:, :2])
    assert torch.equal(prior.null_text.pooled, empty.pooled)


def test_a_text_transformer_is_trained_with_its_decoder_and_samples(tmp_path: Path) -> None:
    inputs, recipe = tiny_inputs(tmp_path), training_recipe(2)
    text = TextTransformerConfig(width=16, depth=1, num_heads=2)
    model = dataclasses.replace(recipe.decoder.model, text_transformer=text)
    with_text = dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, model=model))
    run_job(tiny_job("prior", inputs, tmp_path / "prior", recipe), no_watch)
    outputs = {num: Artifact(str(tmp_path / f"decoder-{num}")) for num in (1, 6)}
    for num_steps, output in outputs.items():
        train = dataclasses.replace(recipe.decoder.train, num_steps=num_steps)
        section = dataclasses.replace(with_text.decoder, train=train)
        short = dataclasses.replace(with_text, decoder=section)
        run_job(TrainJob("decoder", short, inputs, output, "key", torch.device("cpu")), no_watch)
    networks = [load_network(output) for output in outputs.values()]
    embeddings = [network.state_dict()["text_transformer.embedding.weight"] for network in networks]
    assert (embeddings[0] - embeddings[1]).abs().max() > 0
    cascade = load_cascade(inputs | {"prior": Artifact(str(tmp_path / "prior")), "decoder": outputs[6]})
    assert cascade.sample(["a red circle"], [0]).images.shape == (1, 8, 8, 3)


def test_an_autoregressive_prior_takes_the_place_of_the_other(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    for name in ("prior", "prior_2", "decoder"):
        run_job(tiny_job(name, inputs, tmp_path / name, training_recipe(1)), no_watch)
    diffusion = load_cascade({name: Artifact(str(tmp_path / name)) for name in ("clip", "prior", "decoder")})
    other = {"prior": Artifact(str(tmp_path / "prior_2")), "decoder": Artifact(str(tmp_path / "decoder"))}
    autoregressive = load_cascade(other, clip=diffusion.clip)
    config = Artifact(str(tmp_path / "prior_2")).read_json("config.json")
    assert config["kind"] == "ar_prior"
    assert 1 < config["config"]["num_components"] < EMBED_DIM  # measured: the recipe leaves it open
    results = [cascade.sample(["a red circle"], [0]) for cascade in (diffusion, autoregressive)]
    assert [result.images.shape for result in results] == [(1, 8, 8, 3)] * 2
    torch.testing.assert_close(results[1].z_image.norm(dim=1), torch.ones(1))
    assert (results[0].z_image - results[1].z_image).abs().max() > 0.01
    again = load_cascade(inputs | other).sample(["a red circle"], [0])
    assert torch.equal(again.z_image, results[1].z_image)


def test_a_noise_aware_clip_guides_the_cascade_it_is_trained_for(tmp_path: Path) -> None:
    inputs, recipe = tiny_inputs(tmp_path), training_recipe(2)
    for name in ("prior", "decoder", "noisy_clip"):
        run_job(tiny_job(name, inputs, tmp_path / name, recipe), no_watch)
    artifacts = {name: Artifact(str(tmp_path / name)) for name in ("clip", "prior", "decoder", "noisy_clip")}
    cascade = load_cascade(artifacts)
    decoder = cascade.stage("decoder", DecoderStage)
    for parameter in decoder.network.parameters():  # those that start at zero too
        torch.nn.init.normal_(parameter, std=0.1)
    sampler = dataclasses.replace(decoder.sampler, clip_guidance_scale=50.0)
    guided = with_stages(cascade, dataclasses.replace(decoder, sampler=sampler))
    pictures = [one.sample(["a red circle"], [0]).images.float() for one in (cascade, guided)]
    assert (pictures[0] - pictures[1]).abs().max() > 1
    del artifacts["noisy_clip"]
    config = dataclasses.replace(decoder.network.config, sampler=sampler)
    with pytest.raises(DataError, match="no noise-aware CLIP"):
        load_cascade(artifacts, configs={"decoder": config})


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


def test_load_network_names_a_damaged_file_and_storage_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(tmp_path)
    output = Artifact(str(tmp_path / "out"))
    run_job(tiny_job("upsampler_1", inputs, tmp_path / "out", training_recipe(1)), no_watch)
    with pytest.raises(DataError, match="of kind upsampler, but the recipe's is of kind prior"):
        load_network(output, requested=PriorConfig())
    weights = output.path("model.safetensors").read_bytes()
    for times in (1, 99):
        with monkeypatch.context() as patch:
            failed = fail_calls(patch, "open", times=times, ends=("model.safetensors",))
            if times == 1:
                load_network(output)
            else:
                with pytest.raises(StepError, match=r"model\.safetensors: cannot be read: Stale file handle: see that"):
                    load_network(output)
            assert failed
    output.write_bytes("model.safetensors", weights[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors: not the weights of"):
        load_network(output)
    output.write_json("config.json", {"schema_version": 99, "kind": "upsampler"})
    with pytest.raises(DataError, match="schema version 99"):
        load_network(output)
    with pytest.raises(DataError, match="schema version"):
        load_cascade(dict.fromkeys(("prior", "decoder"), output) | {"clip": inputs["clip"]})
    output.remove("config.json")
    with pytest.raises(DataError, match=r"no file config\.json"):
        load_network(output)


def test_a_training_of_pictures_refuses_imported_embeddings_of_other_rows(tmp_path: Path) -> None:
    other = write_embed(tmp_path / "imported", write_download(tmp_path / "other", num_rows=16))
    inputs = {"download": write_download(tmp_path / "download"), "embed": other}
    recipe = training_recipe()
    recipe = dataclasses.replace(recipe, embed=dataclasses.replace(recipe.embed, import_from="folder"))
    with pytest.raises(DataError, match=r"decoder: .* is no row of the download, whose pictures"):
        samples_of(tiny_job("decoder", inputs, tmp_path / "out", recipe), "train")
    assert samples_of(tiny_job("prior", inputs, tmp_path / "out", recipe), "train").num_rows  # it reads no pictures

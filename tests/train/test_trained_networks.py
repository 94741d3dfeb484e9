"""Networks that were trained: they are loaded, and sample as a cascade."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.decoder.config import TextTransformerConfig
from models.decoder.stage import DecoderStage
from models.prior.config import PriorConfig
from models.prior.network import EMBEDDING_SCALE
from pipeline.errors import DataError, StepError
from pipeline.networks.cascade import load_cascade
from pipeline.networks.clip import load_clip_artifact
from pipeline.networks.files import load_network
from pipeline.train.assemble import TrainJob
from pipeline.train.job import run_job
from pipeline.workspace.store import Artifact
from tests.models.tiny_models import with_stages
from tests.tiny.shards import EMBED_DIM
from tests.tiny.storage import fail_calls
from tests.tiny.training import no_watch, tiny_inputs, tiny_job, training_recipe


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

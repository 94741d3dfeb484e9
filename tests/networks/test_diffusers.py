"""Export to and import from diffusers' layout: files, refusals, round trips, and trainings that start from them."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.stage import ArPriorStage
from models.cascade import Cascade
from models.clip_config import ClipDims
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.interchange.networks import (
    TRAINING_FIELDS,
    decoder_problems,
    import_diffusion,
    import_sampler,
    prior_problems,
    scheduler_config,
)
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.clip.files import load_pretrained
from pipeline.clip.frozen import FrozenClip, FrozenText
from pipeline.errors import ConfigError, DataError
from pipeline.networks.cascade import load_cascade
from pipeline.networks.clip import load_clip_artifact, load_text_artifact
from pipeline.networks.diffusers import export_diffusers, export_native, import_diffusers
from pipeline.networks.files import load_initial, load_network, save_network
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact
from tests.models.tiny_models import with_stages
from tests.tiny.networks import DECODER, PRIOR, UPSAMPLER, make_cascade, save_cascade


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cascade, Path]:
    folder = tmp_path_factory.mktemp("export") / "unclip"
    cascade = make_cascade()
    write(cascade, folder)
    return cascade, folder


def write(cascade: Cascade, folder: Path) -> list[str]:
    assert isinstance(cascade.clip, FrozenText)
    return export_diffusers(cascade, cascade.clip, folder)


def test_import_of_an_export_is_the_same_network_to_the_bit(exported: tuple[Cascade, Path], tmp_path: Path) -> None:
    cascade, folder = exported
    assert import_diffusers(folder, tmp_path / "ours") == []
    for name, network in (
        ("prior", cascade.stages[0].network),
        ("decoder", cascade.stages[1].network),
        ("upsampler_1", cascade.stages[2].network),
    ):
        imported = load_network(Artifact(str(tmp_path / "ours" / name)))
        theirs, ours = imported.state_dict(), network.state_dict()
        assert theirs.keys() == ours.keys()
        assert [key for key in ours if not torch.equal(theirs[key], ours[key])] == []
        assert imported.config.diffusion == network.config.diffusion
        theirs, ours = imported.config.sampler, network.config.sampler
        assert (theirs.clip_x0, theirs.clip_range) == (ours.clip_x0, ours.clip_range)
    decoder = load_network(Artifact(str(tmp_path / "ours/decoder")))
    assert isinstance(decoder, Decoder)
    assert decoder.config.unet == cascade.stages[1].network.config.unet
    assert decoder.dims == cascade.clip.dims


def test_imported_recipe_loads_and_starts_from_the_imported_networks(
    exported: tuple[Cascade, Path], tmp_path: Path
) -> None:
    cascade, folder = exported
    import_diffusers(folder, tmp_path / "ours")
    recipe = load_recipe(tmp_path / "ours/recipe.toml", ["pairs.source=drawn", "decoder.train.num_steps=0"])
    network = Decoder(recipe.decoder.model, cascade.clip.dims)
    load_initial(network, recipe.decoder.init_from)
    assert torch.equal(network.unet.conv_in.weight, cascade.stages[1].network.unet.conv_in.weight)
    assert recipe.upsampler_1 is not None
    upsampler = Upsampler(recipe.upsampler_1.model)
    load_initial(upsampler, recipe.upsampler_1.init_from)
    assert torch.equal(upsampler.unet.conv_in.weight, cascade.stages[2].network.unet.conv_in.weight)
    assert recipe.clip.source == "pretrained"
    assert Path(recipe.clip.name) == tmp_path / "ours/clip"
    copied, own = (load_file(base / "clip/open_clip_model.safetensors") for base in (tmp_path / "ours", folder))
    assert [name for name in own if not torch.equal(copied[name], own[name])] == []


def raw_folder(source: Path, folder: Path) -> Path:
    """The exported folder as if it were Karlo's: its prior was trained on embeddings of length 10.3, its CLIP is gone."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "clip")
    path = folder / "prior/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    statistics = F.normalize(torch.randn(2, 16, generator=generator).abs().flatten(), dim=0) * 10.3
    tensors["clip_mean"], tensors["clip_std"] = statistics.view(2, 1, 16)
    save_file(tensors, path)
    return folder


def test_folder_of_raw_embeddings_takes_unit_ones_here_and_goes_back_to_the_bit(
    exported: tuple[Cascade, Path], tmp_path: Path
) -> None:
    folder = raw_folder(exported[1], tmp_path / "raw")
    import_diffusers(folder, tmp_path / "ours")
    artifacts = {path.name: Artifact(str(path)) for path in (tmp_path / "ours").iterdir() if path.is_dir()}
    cascade = load_cascade(artifacts)
    prior, decoder = (stage.network for stage in cascade.stages[:2])
    assert isinstance(prior, Prior)
    assert (prior.config.image_norm, decoder.config.image_norm) == (10.3, 10.3)
    raw = load_file(folder / "prior/diffusion_pytorch_model.safetensors")
    direction = torch.nn.functional.normalize(raw["clip_std"] + raw["clip_mean"], dim=-1)
    torch.testing.assert_close(prior.unscale(torch.ones(1, 16)), direction)
    unit = torch.full((1, 16), 0.25)
    torch.testing.assert_close(prior.unscale(prior.scale(unit)), unit)
    write(cascade, tmp_path / "again")
    for path in folder.glob("*/*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "again" / path.relative_to(folder))
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [], path


def test_prior_for_embeddings_of_another_length_is_exported_for_the_decoders(tmp_path: Path) -> None:
    cascade = make_cascade()
    decoder = Decoder(replace(DECODER, image_norm=8.0), cascade.clip.dims)
    write(with_stages(cascade, DecoderStage.of(decoder)), tmp_path / "out")
    import_diffusers(tmp_path / "out", tmp_path / "ours")
    prior, again = (load_network(Artifact(str(tmp_path / "ours" / name))) for name in ("prior", "decoder"))
    assert (prior.config.image_norm, again.config.image_norm) == (8.0, 8.0)
    assert isinstance(prior, Prior)
    torch.testing.assert_close(prior.unscale(torch.ones(1, 16)), cascade.stages[0].network.unscale(torch.ones(1, 16)))


def test_statistics_that_were_never_set_are_refused(exported: tuple[Cascade, Path], tmp_path: Path) -> None:
    folder = raw_folder(exported[1], tmp_path / "raw")
    path = folder / "prior/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: torch.zeros(1, 16) for name in ("clip_mean", "clip_std")}, path)
    with pytest.raises(DataError, match="clip_mean and clip_std"):
        import_diffusers(folder, tmp_path / "ours")


def test_folder_without_our_clip_brings_its_own_text_tower_and_no_image_tower(
    exported: tuple[Cascade, Path], tmp_path: Path
) -> None:
    folder = raw_folder(exported[1], tmp_path / "raw")
    notes = import_diffusers(folder, tmp_path / "ours")
    assert len(notes) == 1
    assert "no image tower" in notes[0]
    artifact = Artifact(str(tmp_path / "ours/clip"))
    text, own = (
        load_text_artifact(artifact).encode_text(["a red circle"]),
        exported[0].clip.encode_text(["a red circle"]),
    )
    assert torch.equal(text.hidden, own.hidden)
    assert torch.equal(text.pooled, own.pooled)
    decoder = load_network(Artifact(str(tmp_path / "ours/decoder")))
    assert isinstance(decoder, Decoder)
    assert torch.equal(decoder.null_text.pooled, exported[0].clip.encode_text([""]).pooled)
    with pytest.raises(DataError, match="no image tower"):
        load_clip_artifact(artifact)
    with pytest.raises(ValueError, match="no image tower"):
        load_pretrained(f"local-dir:{artifact.uri}")


def test_another_vocabulary_is_refused(exported: tuple[Cascade, Path], tmp_path: Path) -> None:
    folder = raw_folder(exported[1], tmp_path / "raw")
    path = folder / "tokenizer/vocab.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(DataError, match="tokenizer: another vocabulary"):
        import_diffusers(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("network", "setting"),
    [
        ("prior", {"respacing": "trailing"}),
        ("prior", {"dynamic_threshold_prob": 0.9}),
        ("decoder", {"dynamic_threshold_prob": 0.995}),
        ("decoder", {"respacing": "trailing"}),
        ("decoder", {"method": "ddim", "eta": 0.5}),
        ("decoder", {"clip_guidance_scale": 1.0}),
        ("upsampler_1", {"num_steps": 27, "respacing": "fast27"}),
        ("upsampler_1", {"dynamic_threshold_prob": 0.9}),
    ],
)
def test_ways_of_sampling_that_the_pipeline_lacks_are_refused_by_name(
    tmp_path: Path, network: str, setting: dict[str, Any]
) -> None:
    cascade = make_cascade()
    configs = {"prior": PRIOR, "decoder": DECODER, "upsampler_1": UPSAMPLER}
    config = replace(configs[network], sampler=replace(configs[network].sampler, **setting))
    networks: dict[str, Any] = {
        "prior": cascade.stages[0].network,
        "decoder": cascade.stages[1].network,
        "upsampler_1": cascade.stages[2].network,
    }
    networks[network].config = config
    name, value = list(setting.items())[-1]
    with pytest.raises(ConfigError, match=rf"{network}\.model\.sampler\.{name} = {value!r}"):
        write(cascade, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "problems_of"), [(PRIOR, prior_problems), (DECODER, decoder_problems)])
def test_probabilities_of_training_alone_may_have_any_value(config: Any, problems_of: Any) -> None:
    names = {field.name for field in fields(config) if field.name == "dropout" or field.name.endswith("_prob")}
    assert names <= TRAINING_FIELDS
    assert problems_of(replace(config, **dict.fromkeys(names, 0.25)), ClipDims()) == []


def test_noise_of_the_upsampler_is_refused_by_name(tmp_path: Path) -> None:
    cascade = make_cascade(replace(UPSAMPLER, noise_level_max=0.3, noise_level=0.1))
    with pytest.raises(
        ConfigError, match=r"upsampler_1\.model\.noise_level_max = 0\.3.*upsampler_1\.model\.noise_level ="
    ):
        write(cascade, tmp_path / "out")


@pytest.mark.parametrize("change", ["value", "name"])
def test_older_bin_weights_and_another_last_network_are_read(
    exported: tuple[Cascade, Path], tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "older"
    shutil.copytree(exported[1], folder)
    for name in ("prior", "super_res_last"):
        path = folder / name / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        path.unlink()
        if name == "super_res_last":
            bias = tensors.pop("conv_in.bias")
            tensors["conv_in.bias" if change == "value" else "conv_in.shift"] = bias + 1
        torch.save({key: tensor.half() for key, tensor in tensors.items()}, path.with_suffix(".bin"))
    notes = import_diffusers(folder, tmp_path / "ours")
    assert len(notes) == 1
    assert "super_res_last" in notes[0]
    prior = load_network(Artifact(str(tmp_path / "ours/prior")))
    assert isinstance(prior, Prior)
    tensors = load_file(tmp_path / "ours/prior/model.safetensors")
    assert not any(tensor.dtype == torch.float16 for tensor in tensors.values())


def test_what_the_layout_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    cascade = make_cascade(replace(UPSAMPLER, diffusion=DiffusionConfig(schedule="linear")), text_width=32)
    unet = replace(DECODER.unet, patch_px=2, position_bands=3, attention_resolutions=(4,))
    config = replace(DECODER, unet=unet, diffusion=DiffusionConfig(prediction="v"))
    prior = Prior(replace(PRIOR, mlp_ratio=2), cascade.clip.dims)
    decoder = Decoder(config, cascade.clip.dims)
    broken = with_stages(cascade, PriorStage.of(prior), DecoderStage.of(decoder))
    with pytest.raises(ConfigError) as error:
        write(broken, tmp_path / "out")
    for name in (
        "decoder.model.unet.patch_px = 2",
        "decoder.model.unet.position_bands = 3",
        "decoder.model.diffusion.prediction = 'v'",
        "decoder.model.diffusion.variance = 'fixed_small'",
        "prior.model.mlp_ratio = 2",
        "upsampler_1.model.diffusion.schedule = 'linear'",
        "text_width = 32",
        "--native",
    ):
        assert name in str(error.value), name
    assert not (tmp_path / "out").exists()


def test_a_cascade_without_an_upsampler_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    cascade = make_cascade()
    bare = Cascade(cascade.clip, cascade.stages[:2])
    with pytest.raises(ConfigError, match="upsampler_1"):
        write(bare, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        write(cascade, tmp_path / "full")


def test_an_autoregressive_prior_is_refused(tmp_path: Path) -> None:
    cascade = make_cascade()
    prior = ArPrior(ArPriorConfig(width=8, depth=1, num_heads=2, num_components=2), cascade.clip.dims)
    other = with_stages(cascade, ArPriorStage.of(prior))
    with pytest.raises(ConfigError, match=r"prior\.model\.kind: the layout has a diffusion prior"):
        write(other, tmp_path / "out")


def test_text_towers_that_transformers_cannot_hold_are_refused_by_field() -> None:
    from models.interchange.towers import export_text

    cascade = make_cascade()
    assert isinstance(cascade.clip, FrozenClip)
    clip = cascade.clip.clip
    config = clip.model_config | {
        "text_cfg": clip.model_config["text_cfg"] | {"ls_init_value": 0.1, "pool_type": "last"}
    }
    with pytest.raises(ValueError, match=r"text_cfg.ls_init_value = 0.1.*text_cfg.pool_type = 'last'"):
        export_text(config, clip.model.state_dict())


def test_text_tower_comes_back_as_it_went() -> None:
    from models.interchange.towers import export_text, import_towers

    cascade = make_cascade()
    assert isinstance(cascade.clip, FrozenClip)
    clip = cascade.clip.clip
    state = {name: torch.randn(tensor.shape) for name, tensor in clip.model.state_dict().items()}
    model_config, imported = import_towers(export_text(clip.model_config, state))
    assert (model_config["embed_dim"], model_config["quick_gelu"]) == (clip.model_config["embed_dim"], False)
    assert model_config["text_cfg"].items() >= clip.model_config["text_cfg"].items()
    assert "vision_cfg" not in model_config
    assert {name for name in state if not name.startswith("visual.")} == imported.keys()
    assert [name for name in imported if name != "logit_scale" and not torch.equal(imported[name], state[name])] == []


def test_text_configuration_says_what_transformers_would_else_assume() -> None:
    from models.interchange.towers import export_text

    cascade = make_cascade()
    assert isinstance(cascade.clip, FrozenClip)
    clip = cascade.clip.clip
    text = clip.model_config["text_cfg"] | {"mlp_ratio": 2.0, "vocab_size": 100}
    for quick, activation in ((True, "quick_gelu"), (False, "gelu")):
        config = clip.model_config | {"text_cfg": text, "quick_gelu": quick}
        actual = export_text(config, clip.model.state_dict()).config
        assert actual["hidden_act"] == activation
        assert (actual["hidden_size"], actual["intermediate_size"]) == (16, 32)
        assert (actual["bos_token_id"], actual["eos_token_id"], actual["pad_token_id"]) == (98, 99, 99)


def test_tokenizer_names_its_two_last_tokens_and_ranks_its_merges() -> None:
    from models.interchange.towers import export_tokenizer

    encoder = {"a": 0, "b": 1, "ab": 2, "<start_of_text>": 3, "<end_of_text>": 4}
    files = export_tokenizer(encoder, {("b", "a"): 0, ("a", "b"): 1}, 24)
    assert files["vocab.json"] == {"a": 0, "b": 1, "ab": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    assert files["merges.txt"] == "#version: 0.2\nb a\na b\n"


def test_scheduler_says_the_process_in_the_words_of_diffusers() -> None:
    process = DiffusionConfig(num_timesteps=400, prediction="x0", variance="fixed_small")
    actual = scheduler_config(process, SamplerConfig(clip_x0=False, clip_range=3.0))
    del actual["_class_name"], actual["_diffusers_version"]
    assert actual == {
        "num_train_timesteps": 400,
        "variance_type": "fixed_small_log",
        "clip_sample": False,
        "clip_sample_range": 3.0,
        "prediction_type": "sample",
    }
    assert scheduler_config(DECODER.diffusion, DECODER.sampler)["variance_type"] == "learned_range"
    assert scheduler_config(DECODER.diffusion, DECODER.sampler)["prediction_type"] == "epsilon"
    short = import_sampler({"num_train_timesteps": 4}, num_steps=25, guidance_scale=2.0)
    assert (short.num_steps, short.clip_x0, short.clip_range) == (4, True, 1.0)


def test_imported_upsampler_is_trained_on_quarters_and_downloads_are_as_large_as_its_pictures(
    exported: tuple[Cascade, Path], tmp_path: Path
) -> None:
    import shutil
    import tomllib

    folder = tmp_path / "large"
    shutil.copytree(exported[1], folder)
    path = folder / "super_res_first/config.json"
    for image_px, crop_px, download_px in ((32, 8, 256), (512, 128, 512)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": image_px}))
        import_diffusers(folder, tmp_path / str(image_px))
        tables = tomllib.loads((tmp_path / str(image_px) / "recipe.toml").read_text())
        assert tables["upsampler_1"]["model"].get("crop_px", 64) == crop_px
        assert tables.get("download", {}).get("image_px", 256) == download_px  # 256 is the default


def test_second_upsampler_stands_beside_the_layout_and_notes_say_what_differs(tmp_path: Path) -> None:
    first = make_cascade(replace(UPSAMPLER, rounded=True))
    second = Upsampler(replace(UPSAMPLER, image_px=64, low_res_px=32, crop_px=32))
    cascade = Cascade(first.clip, [*first.stages, UpsamplerStage.of(second, 1)])
    notes = " ".join(write(cascade, tmp_path / "out"))
    assert "rounded" in notes
    assert "is sampled here by" not in notes
    assert "upsampler_2/" in notes
    beside = load_network(Artifact(str(tmp_path / "out/upsampler_2")))
    assert torch.equal(beside.unet.conv_in.weight, second.unet.conv_in.weight)


def test_native_export_copies_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a whole file of weights in memory."""
    cascade, read = make_cascade(), Path.read_bytes
    artifacts = save_cascade(cascade, tmp_path / "in")

    def read_small(path: Path) -> bytes:
        assert path.suffix != ".safetensors"
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_small)
    export_native(artifacts, tmp_path / "out")
    for name in ("prior", "decoder", "upsampler_1"):
        actual = load_network(Artifact(str(tmp_path / "out" / name)))
        assert actual.state_dict().keys() == load_network(artifacts[name]).state_dict().keys()
    assert (tmp_path / "out/clip/open_clip_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"added_emb_type": None}, "added_emb_type"),
        ({"norm_in_type": "layer"}, "norm_in_type"),
    ],
)
def test_import_refuses_networks_of_another_make(
    exported: tuple[Cascade, Path], tmp_path: Path, change: dict[str, object], words: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(exported[1], folder)
    path = folder / "prior/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=words):
        import_diffusers(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_names_a_missing_or_damaged_file(exported: tuple[Cascade, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="model_index"):
        import_diffusers(tmp_path, tmp_path / "out")
    folder = tmp_path / "damaged"
    shutil.copytree(exported[1], folder)
    weights = folder / "decoder/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="decoder/diffusion_pytorch_model"):
        import_diffusers(folder, tmp_path / "out")
    tensors = load_file(exported[1] / "decoder/diffusion_pytorch_model.safetensors")
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, weights)
    with pytest.raises(DataError, match=r"unet\.middle\.0\.block\.conv_in\.weight"):
        import_diffusers(folder, tmp_path / "out")


def test_import_refuses_a_scheduler_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="beta_schedule"):
        import_diffusion("prior_scheduler", {"_class_name": "UnCLIPScheduler", "beta_schedule": "linear"})


def test_initial_weights_of_another_shape_or_process_are_refused(tmp_path: Path) -> None:
    cascade = make_cascade()
    save_cascade(cascade, tmp_path)
    with pytest.raises(DataError, match="another shape"):
        load_initial(Decoder(replace(DECODER, context_width=24), cascade.clip.dims), str(tmp_path / "decoder"))
    with pytest.raises(DataError, match=r"image_norm = 1\.0, the recipe says 8\.0"):
        load_initial(Decoder(replace(DECODER, image_norm=8.0), cascade.clip.dims), str(tmp_path / "decoder"))
    process = replace(DECODER.diffusion, prediction="v")
    with pytest.raises(DataError, match=r"diffusion\.prediction"):
        load_initial(Decoder(replace(DECODER, diffusion=process), cascade.clip.dims), str(tmp_path / "decoder"))
    config = ArPriorConfig(width=8, depth=1, num_heads=2, num_components=2)
    prior, artifact = ArPrior(config, cascade.clip.dims), Artifact(str(tmp_path / "tokens"))
    save_network(artifact, config, cascade.clip.dims, prior.state_dict())
    with pytest.raises(DataError, match=r"bucket_range_std = 5\.0, the recipe says 4\.0"):
        load_initial(ArPrior(replace(config, bucket_range_std=4.0), cascade.clip.dims), artifact.uri)
    started = ArPrior(config, cascade.clip.dims)
    load_initial(started, artifact.uri)
    assert torch.equal(started.positions, prior.positions)

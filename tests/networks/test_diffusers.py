"""Import of diffusers' layout: round trips of an export, folders of others, refusals, and trainings that start from it."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.cascade import Cascade
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.interchange.networks import import_diffusion
from models.interchange.towers import export_text, import_towers
from models.prior.network import Prior
from models.upsampler.network import Upsampler
from pipeline.clip.files import load_pretrained
from pipeline.clip.frozen import FrozenClip
from pipeline.errors import DataError
from pipeline.networks.cascade import load_cascade
from pipeline.networks.clip import load_clip_artifact, load_text_artifact
from pipeline.networks.diffusers import import_diffusers
from pipeline.networks.files import load_initial, load_network
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact
from tests.models.tiny_models import with_stages
from tests.tiny.networks import DECODER, export_cascade, make_cascade


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cascade, Path]:
    folder = tmp_path_factory.mktemp("export") / "unclip"
    cascade = make_cascade()
    export_cascade(cascade, folder)
    return cascade, folder


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
    export_cascade(cascade, tmp_path / "again")
    for path in folder.glob("*/*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "again" / path.relative_to(folder))
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [], path


def test_prior_for_embeddings_of_another_length_is_exported_for_the_decoders(tmp_path: Path) -> None:
    cascade = make_cascade()
    decoder = Decoder(replace(DECODER, image_norm=8.0), cascade.clip.dims)
    export_cascade(with_stages(cascade, DecoderStage.of(decoder)), tmp_path / "out")
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


def test_text_tower_comes_back_as_it_went() -> None:
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


def test_imported_upsampler_is_trained_on_quarters_and_downloads_are_as_large_as_its_pictures(
    exported: tuple[Cascade, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    shutil.copytree(exported[1], folder)
    path = folder / "super_res_first/config.json"
    for image_px, crop_px, download_px in ((32, 8, 256), (512, 128, 512)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": image_px}))
        import_diffusers(folder, tmp_path / str(image_px))
        tables = tomllib.loads((tmp_path / str(image_px) / "recipe.toml").read_text())
        assert tables["upsampler_1"]["model"].get("crop_px", 64) == crop_px
        assert tables.get("download", {}).get("image_px", 256) == download_px  # 256 is the default


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

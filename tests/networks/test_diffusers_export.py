"""Export to diffusers' layout: what it cannot hold is refused by name, and what stands in the files of the rest."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
    import_sampler,
    prior_problems,
    scheduler_config,
)
from models.interchange.towers import export_text, export_tokenizer
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.clip.frozen import FrozenClip
from pipeline.errors import ConfigError
from pipeline.networks.diffusers import export_native
from pipeline.networks.files import load_network
from pipeline.workspace.store import Artifact
from tests.models.tiny_models import with_stages
from tests.tiny.networks import DECODER, PRIOR, UPSAMPLER, export_cascade, make_cascade, save_cascade


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
        export_cascade(cascade, tmp_path / "out")
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
        export_cascade(cascade, tmp_path / "out")


def test_what_the_layout_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    cascade = make_cascade(replace(UPSAMPLER, diffusion=DiffusionConfig(schedule="linear")), text_width=32)
    unet = replace(DECODER.unet, patch_px=2, position_bands=3, attention_resolutions=(4,))
    config = replace(DECODER, unet=unet, diffusion=DiffusionConfig(prediction="v"))
    prior = Prior(replace(PRIOR, mlp_ratio=2), cascade.clip.dims)
    decoder = Decoder(config, cascade.clip.dims)
    broken = with_stages(cascade, PriorStage.of(prior), DecoderStage.of(decoder))
    with pytest.raises(ConfigError) as error:
        export_cascade(broken, tmp_path / "out")
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
        export_cascade(bare, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export_cascade(cascade, tmp_path / "full")


def test_an_autoregressive_prior_is_refused(tmp_path: Path) -> None:
    cascade = make_cascade()
    prior = ArPrior(ArPriorConfig(width=8, depth=1, num_heads=2, num_components=2), cascade.clip.dims)
    other = with_stages(cascade, ArPriorStage.of(prior))
    with pytest.raises(ConfigError, match=r"prior\.model\.kind: the layout has a diffusion prior"):
        export_cascade(other, tmp_path / "out")


def test_text_towers_that_transformers_cannot_hold_are_refused_by_field() -> None:
    cascade = make_cascade()
    assert isinstance(cascade.clip, FrozenClip)
    clip = cascade.clip.clip
    config = clip.model_config | {
        "text_cfg": clip.model_config["text_cfg"] | {"ls_init_value": 0.1, "pool_type": "last"}
    }
    with pytest.raises(ValueError, match=r"text_cfg.ls_init_value = 0.1.*text_cfg.pool_type = 'last'"):
        export_text(config, clip.model.state_dict())


def test_text_configuration_says_what_transformers_would_else_assume() -> None:
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


def test_second_upsampler_stands_beside_the_layout_and_notes_say_what_differs(tmp_path: Path) -> None:
    first = make_cascade(replace(UPSAMPLER, rounded=True))
    second = Upsampler(replace(UPSAMPLER, image_px=64, low_res_px=32, crop_px=32))
    cascade = Cascade(first.clip, [*first.stages, UpsamplerStage.of(second, 1)])
    notes = " ".join(export_cascade(cascade, tmp_path / "out"))
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

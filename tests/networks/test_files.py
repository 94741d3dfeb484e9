"""Networks in artifacts: what is said of a damaged one, and of storage and memory that fail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.clip_config import ClipDims
from models.decoder.network import Decoder
from models.upsampler.network import Upsampler
from pipeline.clip import files as clip_files
from pipeline.clip.model import create_clip
from pipeline.errors import DataError
from pipeline.networks.clip import draw_as_loading, load_text_artifact, save_clip_artifact
from pipeline.networks.files import load_initial, load_network, save_network
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact
from tests.tiny.networks import CLIP, DECODER, UPSAMPLER, make_cascade, save_cascade
from tests.tiny.storage import fail_calls

_WEIGHTS = "model.safetensors"
_CLIP_WEIGHTS = "open_clip_model.safetensors"
_NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.fixture
def upsampler(tmp_path: Path) -> Artifact:
    artifact = Artifact(str(tmp_path / "network"))
    save_network(artifact, UPSAMPLER, ClipDims(), Upsampler(UPSAMPLER).state_dict())
    return artifact


@pytest.fixture
def clip(tmp_path: Path) -> Artifact:
    artifact = Artifact(str(tmp_path / "clip"))
    save_clip_artifact(artifact, create_clip(CLIP))
    return artifact


def _cut(artifact: Artifact, name: str) -> None:
    artifact.write_bytes(name, artifact.read_bytes(name)[:-100])


def test_a_damaged_network_is_brought_back_or_moved_away(upsampler: Artifact) -> None:
    _cut(upsampler, _WEIGHTS)
    with pytest.raises(DataError, match=f"bring it back from a copy, or move {upsampler.uri} away and run"):
        load_network(upsampler)
    upsampler.write_bytes(
        "config.json", upsampler.read_bytes("config.json").replace(b'"image_px": 32', b'"image_px": 33')
    )
    with pytest.raises(DataError, match="use the release that wrote it, or bring it back from a copy"):
        load_network(upsampler)


@pytest.mark.parametrize("name", [_WEIGHTS, "config.json"])
def test_a_damaged_network_in_init_from_is_brought_back_and_no_step_is_run_again(
    upsampler: Artifact, name: str
) -> None:
    _cut(upsampler, name)
    with pytest.raises(DataError, match=f"bring {upsampler.uri} back from where it came from, or name another"):
        load_initial(Upsampler(UPSAMPLER), upsampler.uri)
    upsampler.remove(name)
    with pytest.raises(DataError, match=f"no file {name}; bring {upsampler.uri} back from where it came from"):
        load_initial(Upsampler(UPSAMPLER), upsampler.uri)


def test_a_folder_that_a_recipe_takes_as_it_is_is_the_users_own(tmp_path: Path) -> None:
    save_cascade(make_cascade(), tmp_path / "mine")
    (decoder,) = finished_artifacts(load_recipe(tmp_path / "mine"), ["decoder"]).values()
    _cut(decoder, _WEIGHTS)
    with pytest.raises(DataError, match="back from where it came from"):
        load_network(decoder)


@pytest.mark.parametrize("name", [_CLIP_WEIGHTS, "open_clip_config.json"])
def test_a_damaged_clip_is_brought_back_or_moved_away(clip: Artifact, name: str) -> None:
    _cut(clip, name)
    with pytest.raises(DataError, match=f"bring it back from a copy, or move {clip.uri} away"):
        load_text_artifact(clip)
    clip.write_bytes("open_clip_config.json", b"{")
    with pytest.raises(DataError, match=f"bring it back from a copy, or move {clip.uri} away"):
        draw_as_loading(clip)


def test_memory_that_lacks_is_no_damage(upsampler: Artifact, clip: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise _NO_MEMORY

    monkeypatch.setattr(nn.Module, "load_state_dict", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_network(upsampler)
    monkeypatch.setattr(clip_files, "build_clip", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_text_artifact(clip)


def test_a_clip_is_written_again_where_storage_does_not_take_it_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, artifact = create_clip(CLIP), Artifact(str(tmp_path))
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "replace", ends=(_CLIP_WEIGHTS,))
        save_clip_artifact(artifact, clip)
    assert len(failed) == 1
    read = load_text_artifact(artifact).clip.model.state_dict()
    for name, weight in clip.model.state_dict().items():
        assert torch.equal(read[name], weight), name


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

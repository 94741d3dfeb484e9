"""The upsampler's training with noise levels: each sample has its own, and the network is told."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from models.clip_config import ClipDims
from models.sample_random import SampleRandom
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from pipeline.data.batch import Batch
from pipeline.networks.files import load_network, save_network
from pipeline.networks.upsampler import UpsamplerObjective
from pipeline.workspace.store import Artifact
from tests.models.tiny_models import CONVOLUTION

CONFIG = UpsamplerConfig(
    image_px=16, low_res_px=8, crop_px=8, unet=replace(CONVOLUTION, channel_mults=(1,)), noise_level_max=0.5
)


class Watching(Upsampler):
    """Keeps the conditions that it is called with."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.condition = condition
        return super().forward(x, t, condition)


def _batch(size: int) -> Batch:
    names = tuple(str(number) for number in range(size))
    return Batch(names, names, torch.full((size, 16, 16, 3), 128, dtype=torch.uint8))


def test_every_sample_is_trained_at_a_noise_level_of_its_own() -> None:
    network = Watching(CONFIG)
    UpsamplerObjective(network)(_batch(64), SampleRandom.of_samples(0, range(64)))
    level = network.condition[:, 3, 0, 0]
    assert (network.condition[:, 3] == level[:, None, None]).all()
    assert len(level.unique()) == 64
    assert 0 <= level.min() < 0.05
    assert 0.45 < level.max() <= 0.5
    spread = network.condition[:, :3].flatten(1).std(1)  # the picture is flat, so what varies is the noise
    torch.testing.assert_close(spread, level, rtol=0.25, atol=0.01)


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_crop_and_degradation_belong_to_a_sample(degradation: Literal["blur", "bsr"]) -> None:
    network = Watching(replace(CONFIG, image_px=64, low_res_px=16, crop_px=32, degradation=degradation))
    pixels = torch.randint(256, (5, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch, random = Batch(tuple("abcde"), tuple("abcde"), pixels), SampleRandom.of_samples(3, range(5))
    UpsamplerObjective(network)(batch, random)
    whole, part = network.condition, slice(2, 4)
    assert not torch.equal(whole[2], whole[3])
    UpsamplerObjective(network)(batch.rows(part), random.rows(part))
    assert torch.equal(network.condition, whole[part])


def test_a_trained_network_is_sampled_at_the_noise_level_of_the_recipe(tmp_path: Path) -> None:
    artifact, dims = Artifact(str(tmp_path)), ClipDims()
    save_network(artifact, CONFIG, dims, Upsampler(CONFIG).state_dict())
    changed = replace(CONFIG, noise_level=0.3)
    assert load_network(artifact, requested=changed).config == changed
    assert load_network(artifact).config == CONFIG

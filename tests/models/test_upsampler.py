"""The upsampler: conditioning and sizes."""

from dataclasses import replace

import pytest
import torch
from tiny_models import UNET, randomise

from models.config import UpsamplerConfig
from models.upsampler import Upsampler

CONFIG = UpsamplerConfig(image_px=32, low_res_px=16, crop_px=16, unet=replace(UNET, attention_resolutions=()))


@pytest.fixture
def upsampler() -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(CONFIG).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("low_res_px", [8, 16])
def test_upsampler_runs_on_crops_and_at_full_size(upsampler: Upsampler, low_res_px: int) -> None:
    low_res = torch.rand(2, 3, low_res_px, low_res_px) * 2 - 1
    condition = upsampler.encode_condition(low_res)
    x = torch.randn(2, 3, 2 * low_res_px, 2 * low_res_px)
    assert condition.shape == x.shape
    assert upsampler(x, torch.tensor([0, 5]), condition).shape == x.shape


def test_upsampler_condition_is_what_a_file_would_hold(upsampler: Upsampler) -> None:
    low_res = torch.rand(1, 3, 16, 16) * 2 - 1
    stored = ((low_res + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(upsampler.encode_condition(low_res), upsampler.encode_condition(stored))


def test_upsampler_reads_its_condition(upsampler: Upsampler) -> None:
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    one = upsampler.encode_condition(torch.full((1, 3, 16, 16), -0.5))
    other = upsampler.encode_condition(torch.full((1, 3, 16, 16), 0.5))
    assert (upsampler(x, t, one) - upsampler(x, t, other)).abs().max() > 1e-3


def test_upsampler_has_no_attention(upsampler: Upsampler) -> None:
    assert all(stage.attention is None for stage in [*upsampler.unet.down, *upsampler.unet.middle])

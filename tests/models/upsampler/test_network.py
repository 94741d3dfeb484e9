"""The upsampler: conditioning and sizes."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONVOLUTION, randomise

from models.diffusion.config import DiffusionConfig
from models.diffusion.noise import NoiseSource
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler

CONFIG = UpsamplerConfig(image_px=32, low_res_px=16, crop_px=16, unet=CONVOLUTION)


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


def test_upsampler_condition_that_is_not_rounded_is_plain_bicubic() -> None:
    upsampler = Upsampler(replace(CONFIG, rounded=False))
    low_res = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = torch.nn.functional.interpolate(low_res, size=(32, 32), mode="bicubic", antialias=True)
    assert torch.equal(upsampler.encode_condition(low_res), plain)
    assert plain.abs().max() > 1  # it overshoots, and that is kept
    assert torch.equal(upsampler.encode_condition(2 * low_res), upsampler.encode_condition((2 * low_res).clamp(-1, 1)))
    fourfold = Upsampler(replace(CONFIG, low_res_px=8, crop_px=32))
    assert fourfold.encode_condition(low_res).shape == (1, 3, 64, 64)


def test_upsampler_reads_its_condition(upsampler: Upsampler) -> None:
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    one = upsampler.encode_condition(torch.full((1, 3, 16, 16), -0.5))
    other = upsampler.encode_condition(torch.full((1, 3, 16, 16), 0.5))
    assert (upsampler(x, t, one) - upsampler(x, t, other)).abs().max() > 1e-3


def test_upsampler_has_no_attention(upsampler: Upsampler) -> None:
    assert all(stage.attention is None for stage in [*upsampler.unet.down, *upsampler.unet.middle])


@pytest.fixture
def levelled() -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(replace(CONFIG, noise_level_max=0.5, noise_level=0.2)).eval()
    randomise(model)
    return model


def test_condition_is_noised_to_the_level_of_each_sample_and_says_so(levelled: Upsampler) -> None:
    low_res, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 32, 32)
    plain = levelled.encode_condition(low_res)
    noised = levelled.encode_condition(low_res, torch.tensor([0.0, 0.4]), noise)
    assert torch.equal(noised[0], plain[0])
    torch.testing.assert_close(noised[1, :3], 0.84**0.5 * plain[1, :3] + 0.4 * noise[1])
    assert (noised[:, 3] == torch.tensor([0.0, 0.4])[:, None, None]).all()


def test_network_reads_the_level(levelled: Upsampler) -> None:
    x, t, condition = torch.randn(1, 3, 32, 32), torch.tensor([500]), torch.zeros(1, 4, 32, 32)
    other_level = condition.clone()
    other_level[:, 3] = 0.4
    assert (levelled(x, t, condition) - levelled(x, t, other_level)).abs().max() > 1e-3


def test_sampling_begins_at_the_configured_level_from_each_seed(levelled: Upsampler, upsampler: Upsampler) -> None:
    low_res = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1)
    x, condition = levelled.begin(low_res, NoiseSource.from_seeds([1, 2]))
    plain = levelled.encode_condition(low_res)
    added = (condition[:, :3] - 0.96**0.5 * plain[:, :3]) / 0.2
    assert (condition[:, 3] == 0.2).all()
    torch.testing.assert_close(added, NoiseSource.from_seeds([1, 2]).normal((3, 32, 32)), rtol=0, atol=1e-5)
    assert not torch.allclose(x, added)
    x_alone, alone = levelled.begin(low_res[:1], NoiseSource.from_seeds([2]))
    assert torch.equal(x_alone[0], x[1])
    assert torch.equal(alone[0], condition[1])
    x, condition = upsampler.begin(low_res, NoiseSource.from_seeds([1, 2]))  # off, the noise is x_T alone
    assert torch.equal(x, NoiseSource.from_seeds([1, 2]).normal((3, 32, 32)))
    assert torch.equal(condition, upsampler.encode_condition(low_res))


def test_level_and_network_must_fit(upsampler: Upsampler) -> None:
    with pytest.raises(ValueError, match="noise_level_max above 0"):
        upsampler.encode_condition(torch.zeros(1, 3, 16, 16), torch.tensor([0.1]), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"noise_level = 0\.3: between 0 and noise_level_max = 0\.2"):
        replace(CONFIG, noise_level_max=0.2, noise_level=0.3)


def test_residual_upsampler_starts_from_enlargement() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, residual=True, diffusion=DiffusionConfig(prediction="x0"))
    model = Upsampler(config).eval()
    condition = model.encode_condition(torch.rand(2, 3, 16, 16) * 2 - 1)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0, 5])
    assert torch.equal(model(x, t, condition), condition)  # its last layer starts at zero
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
        plain = Upsampler(replace(config, residual=False)).eval()
        plain.load_state_dict(model.state_dict())
        assert torch.allclose(model(x, t, condition), plain(x, t, condition) + condition)


def test_residual_is_refused_where_the_network_does_not_predict_the_picture() -> None:
    with pytest.raises(ValueError, match=r"residual = true needs diffusion\.prediction = 'x0', not 'eps'"):
        replace(CONFIG, residual=True)

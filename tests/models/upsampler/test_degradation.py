"""What upsamplers are conditioned on, against kernels written out here (against Pillow: tests/oracles)."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.pixels import quantise_8bit, resize
from models.sample_random import SampleRandom
from models.upsampler.bsr import Draws, add_noise, blur_kernel, bsr_light
from models.upsampler.degradation import (
    augment_noise,
    degraded_low_res,
    filter_each,
    gaussian_blur,
    random_blur,
    random_crop,
)
from models.upsampler.jpeg import jpeg


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(pictures: Tensor, seed: int = 0) -> SampleRandom:
    """Random numbers of each of the pictures."""
    return SampleRandom.of_samples(seed, range(len(pictures)))


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A picture with detail at every scale and edges, as photographs have, (1, 3, 128, 128) on the 256 levels."""
    noise = [torch.randn(1, 3, size_px, size_px, generator=seeded(size_px)) for size_px in (4, 8, 16, 32, 64, 128)]
    octaves = [F.interpolate(x, size=(128, 128), mode="bicubic") * 2.0**-i for i, x in enumerate(noise)]
    picture = torch.stack(octaves).sum(0) * 0.25
    picture[..., 40:90, 30:70] += 0.6
    return quantise_8bit(picture.clamp(-1, 1))


def test_resize_removes_detail_that_the_small_picture_cannot_hold() -> None:
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1
    assert resize(stripes, 16)[..., 2:-2].abs().max() < 0.05


def test_quantise_8bit_keeps_the_256_levels_and_rounds_the_rest() -> None:
    levels = torch.arange(256) / 127.5 - 1
    torch.testing.assert_close(quantise_8bit(levels), levels, rtol=0, atol=1e-6)
    assert torch.equal(quantise_8bit(quantise_8bit(levels + 0.003)), quantise_8bit(levels + 0.003))
    assert quantise_8bit(torch.tensor([-3.0, 2.0, 1 / 255 + 1e-4])).tolist() == pytest.approx(
        [-1, 1, 1 / 255], abs=1e-6
    )
    actual = quantise_8bit(torch.rand(1000) * 2 - 1)
    assert ((actual + 1) * 127.5 - ((actual + 1) * 127.5).round()).abs().max() < 1e-4


def test_gaussian_blur_is_the_papers_kernel_of_3_px_and_sigma_06() -> None:
    spot = torch.zeros(1, 1, 5, 5)
    spot[..., 2, 2] = 1
    side = math.exp(-0.5 / 0.36)
    row = torch.tensor([side, 1, side]) / (1 + 2 * side)
    torch.testing.assert_close(gaussian_blur(spot, torch.tensor([0.6]))[0, 0, 1:4, 1:4], row[:, None] * row[None, :])


def test_gaussian_blur_has_its_own_width_for_each_picture(photo: Tensor) -> None:
    batch = photo.expand(3, -1, -1, -1)
    actual = gaussian_blur(batch, torch.tensor([0.0, 0.6, 2.0]), kernel_size=9)
    torch.testing.assert_close(actual[0], photo[0])
    assert (actual[1] - photo[0]).abs().mean() < (actual[2] - photo[0]).abs().mean()
    torch.testing.assert_close(actual[1:2], gaussian_blur(photo, torch.tensor([0.6]), kernel_size=9))
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 3, 8, 8), torch.tensor([0.6])), torch.ones(1, 3, 8, 8))


def test_random_blur_is_sampled_for_each_picture_and_not_for_the_batch(photo: Tensor) -> None:
    batch = photo.expand(200, -1, -1, -1)[..., :8, :8]
    blurred = (random_blur(batch, numbers(batch)) - batch).abs().flatten(1).amax(dim=1) > 1e-4
    assert 60 < int(blurred.sum()) < 140
    assert torch.equal(random_blur(batch, numbers(batch, 3)), random_blur(batch, numbers(batch, 3)))
    assert torch.equal(random_blur(batch, numbers(batch), prob=0.0), batch)
    torch.testing.assert_close(
        random_blur(batch, numbers(batch), prob=1.0), gaussian_blur(batch, torch.full((200,), 0.6))
    )


def test_filter_each_correlates_with_the_kernel_of_each_picture() -> None:
    batch = torch.randn(2, 3, 6, 6)
    kernels = torch.zeros(2, 3, 3)
    kernels[0, 1, 2] = 1  # the pixel to the right
    kernels[1, 1, 1] = 2
    actual = filter_each(batch, kernels)
    torch.testing.assert_close(actual[0, :, :, :-1], batch[0, :, :, 1:])
    torch.testing.assert_close(actual[0, :, :, -1], batch[0, :, :, -2])  # edges are reflected
    torch.testing.assert_close(actual[1], 2 * batch[1])


def test_random_crop_cuts_on_the_grid_of_the_small_picture() -> None:
    place = torch.arange(32 * 32, dtype=torch.float32).reshape(1, 1, 32, 32).expand(50, 2, -1, -1)
    actual = random_crop(place, 8, numbers(place), multiple_px=4)
    assert actual.shape == (50, 2, 8, 8)
    tops, lefts = actual[:, 0, 0, 0] // 32, actual[:, 0, 0, 0] % 32
    assert set(tops.tolist()) == set(range(0, 25, 4)) == set(lefts.tolist())
    torch.testing.assert_close(actual[0, 1, 3, 5], actual[0, 0, 0, 0] + 3 * 32 + 5)
    assert torch.equal(actual, random_crop(place, 8, numbers(place), multiple_px=4))
    wide = torch.arange(8 * 40, dtype=torch.float32).reshape(1, 1, 8, 40).expand(50, -1, -1, -1)
    assert set(random_crop(wide, 8, numbers(wide), multiple_px=8)[:, 0, 0, 0].tolist()) == {0, 8, 16, 24, 32}
    with pytest.raises(ValueError, match="33 px"):
        random_crop(place, 33, numbers(place))


def test_augment_noise_keeps_the_variance_and_has_a_level_per_picture() -> None:
    condition, noise = torch.randn(2, 2, 3, 64, 64, generator=seeded()).unbind(0)
    actual = augment_noise(condition, torch.tensor([0.0, 0.6]), noise)
    assert torch.equal(actual[0], condition[0])
    torch.testing.assert_close(actual[1], 0.8 * condition[1] + 0.6 * noise[1])
    assert actual[1].std().item() == pytest.approx(1, abs=0.03)


def test_jpeg_takes_any_size_and_refuses_other_qualities(photo: Tensor) -> None:
    assert jpeg(photo[..., :13, :21], 80).shape == (1, 3, 13, 21)
    with pytest.raises(ValueError, match="quality"):
        jpeg(photo, 0)


def test_bsr_degrades_each_picture_in_its_own_way_from_the_generator(photo: Tensor) -> None:
    batch = photo.expand(12, -1, -1, -1)
    actual = bsr_light(batch, 32, numbers(batch, 5))
    assert actual.shape == (12, 3, 32, 32)
    assert actual.abs().max() <= 1
    assert torch.equal(actual, bsr_light(batch, 32, numbers(batch, 5)))
    assert not torch.equal(actual, bsr_light(batch, 32, numbers(batch, 6)))
    errors = (actual - resize(photo, 32)).square().mean(dim=(1, 2, 3))
    assert len(set(errors.tolist())) == 12
    psnr = 10 * torch.log10(4 / errors)
    assert 14 < psnr.min() < psnr.max() < 45  # spoilt, and still the same picture


@pytest.mark.parametrize(("scale", "stretch"), [(2, 1.5e-3), (4, 3.5e-3), (8, 6e-3)])
def test_bsr_keeps_the_picture_in_place(scale: int, stretch: float) -> None:
    ramp = torch.linspace(-0.8, 0.8, 128).expand(6, 3, 128, 128)
    actual = bsr_light(ramp, 128 // scale, numbers(ramp))
    expected = resize(ramp, 128 // scale)
    inner = slice(128 // scale // 4, -(128 // scale // 4))
    errors = (actual - expected)[..., inner]
    assert errors.mean().abs() < 0.01
    assert all(side.mean().abs() < stretch for side in errors.chunk(2, dim=-1))  # nor is it stretched


def test_bsr_refuses_sizes_that_do_not_fit(photo: Tensor) -> None:
    with pytest.raises(ValueError, match="128"):
        bsr_light(photo, 48, numbers(photo))


def test_blur_kernels_sum_to_one_and_are_round_or_stretched() -> None:
    kernels = [blur_kernel(4, Draws(seeded(seed)), 64) for seed in range(40)]
    for kernel in kernels:
        assert kernel.shape == (1, 15, 15)
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    round_ones = sum(bool((kernel - kernel.mT).abs().max() < 1e-6) for kernel in kernels)
    assert 8 < round_ones < 32


def test_blur_kernels_are_turned_and_no_wider_than_their_scale_allows() -> None:
    place = torch.arange(-7.0, 8.0)
    at = torch.stack(torch.meshgrid(place, place, indexing="ij"))
    kernels = torch.cat([blur_kernel(4, Draws(seeded(seed)), 64) for seed in range(200)])
    moments = torch.einsum("nij,aij,bij->nab", kernels, at, at)
    widest = torch.linalg.eigvalsh(moments).amax(1)  # along the long axis, px squared
    assert 1.8 < widest.max() < 2.01  # (4 + scale) / 4
    assert moments[:, 0, 1].min() < -0.3  # turned to either side
    assert moments[:, 0, 1].max() > 0.3


def test_random_integers_include_both_ends_and_orders_hold_all() -> None:
    draws = Draws(seeded())
    assert all(2 <= draws.uniform(2.0, 3.0) < 3 for _ in range(60))
    assert {draws.integer(80, 83) for _ in range(60)} == {80, 81, 82, 83}
    assert {draws.choice("abc") for _ in range(60)} == set("abc")
    assert sorted(draws.order(5)) == [0, 1, 2, 3, 4]


def test_bsr_blurs_a_picture_that_it_has_halved_by_the_scale_that_is_left(
    photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: set[tuple[int, int]] = set()

    def watched(scale: int, draws: Draws, side_px: int) -> Tensor:
        pairs.add((scale, side_px))
        return blur_kernel(scale, draws, side_px)

    monkeypatch.setattr("models.upsampler.bsr.blur_kernel", watched)
    bsr_light(photo[..., :32, :32].expand(24, -1, -1, -1), 8, SampleRandom.of_samples(0, range(24)))
    whole_or_halved = {(scale, side_px) for scale, side_px in pairs if side_px in {16, 32}}
    assert whole_or_halved == {(4, 32), (2, 16)}


def test_noise_of_bsr_is_one_or_two_levels() -> None:
    grey = torch.zeros(1, 3, 64, 64)
    sizes = [add_noise(grey, Draws(seeded(seed))).std().item() * 127.5 for seed in range(30)]
    assert 0.3 < min(sizes) < max(sizes) < 2.5


def test_noise_of_bsr_is_coloured_grey_or_in_between() -> None:
    flat = torch.zeros(1, 3, 32, 32)
    likeness = torch.tensor(
        [torch.corrcoef(add_noise(flat, Draws(seeded(seed)))[0].flatten(1)).triu(1).abs().max() for seed in range(200)]
    )
    assert 60 < int((likeness < 0.12).sum()) < 105  # 40 %, and those in between that are nearly so
    assert 60 < int((likeness > 0.999).sum()) < 100  # 40 %


def test_bsr_ends_in_jpeg_and_often_goes_through_it_before(photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, Tensor]] = []

    def watched(image: Tensor, quality: int) -> Tensor:
        written.append((quality, jpeg(image, quality)))
        return written[-1][1]

    monkeypatch.setattr("models.upsampler.bsr.jpeg", watched)
    actual = bsr_light(photo[..., :32, :32].expand(24, -1, -1, -1), 8, SampleRandom.of_samples(0, range(24)))
    assert 24 + 16 < len(written) <= 24 + 24  # nine of ten
    assert torch.equal(written[-1][1], actual[-1:])
    assert {quality for quality, _ in written} <= set(range(80, 96))


@pytest.mark.parametrize("kind", ["blur", "bsr"])
def test_small_pictures_are_spoilt_in_full_precision(photo: Tensor, kind: Literal["blur", "bsr"]) -> None:
    photos = photo.repeat(4, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        half = degraded_low_res(photos, photo.shape[-1] // 4, kind, numbers(photos))
    full = degraded_low_res(photos, photo.shape[-1] // 4, kind, numbers(photos))
    assert torch.equal(half, full)


def test_degraded_low_res_follows_its_kind(photo: Tensor) -> None:
    batch = photo.expand(4, -1, -1, -1)
    plain = resize(batch, 32)
    assert torch.equal(degraded_low_res(batch, 32, "none", numbers(batch)), plain)
    assert torch.equal(degraded_low_res(batch, 32, "blur", numbers(batch)), random_blur(plain, numbers(plain)))
    assert torch.equal(degraded_low_res(batch, 32, "bsr", numbers(batch)), bsr_light(batch, 32, numbers(batch)))

"""The two forms of pictures, and how CLIP's input is cut."""

import torch

from models.pixels import resize_crop, to_pixels, to_uint8


def test_to_pixels_and_back_keeps_every_level() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(pixels), images)


def test_to_uint8_clips_and_rounds_to_the_nearest_level() -> None:
    pixels = torch.tensor([-1.5, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5, 1.2]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 1, 2, 255]


def test_resize_crop_takes_the_centre_of_the_longer_side() -> None:
    pixels = torch.linspace(-1, 1, 32).expand(1, 3, 8, 32)
    assert torch.equal(resize_crop(pixels, 8), pixels[..., 12:20])
    assert torch.equal(resize_crop(pixels.transpose(2, 3), 8), pixels[..., 12:20].transpose(2, 3))


def test_resize_crop_scales_the_shorter_side_without_distortion() -> None:
    pixels = torch.full((2, 3, 30, 47), 0.25)
    assert torch.allclose(resize_crop(pixels, 16), torch.full((2, 3, 16, 16), 0.25))

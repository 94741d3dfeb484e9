"""Known parts of pictures: the random regions of training, and what the decoder makes of them."""

import pytest
import torch
from tiny_models import DIMS, UNET, make_text, randomise

from models.decoder.config import DecoderConfig
from models.decoder.inpainting import known_planes, random_masks, replacing
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.steps import SamplerState, initial_state
from models.rows import concat_rows
from models.sample_random import SampleRandom


def test_regions_are_everything_rectangles_or_what_is_around_them() -> None:
    masks = random_masks(SampleRandom.of_samples(0, range(4000)), 16, 0.4)[:, 0]
    everything = masks.flatten(1).all(1)
    assert everything.float().mean().item() == pytest.approx(0.4, abs=0.03)
    kinds = [(_is_rectangle(region), _is_rectangle(~region)) for region in masks[~everything][:300]]
    assert all(inside or outside for inside, outside in kinds)
    assert 100 < sum(inside for inside, _ in kinds) < 200


def test_rectangles_have_sides_of_their_own_and_reach_every_pixel() -> None:
    masks = random_masks(SampleRandom.of_samples(1, range(2000)), 16, 0.0)[:, 0]
    rectangles = torch.stack([region for region in masks if _is_rectangle(region)])
    assert len(rectangles) == pytest.approx(1000, abs=70)  # the others are around one
    heights, widths = rectangles.any(2).sum(1), rectangles.any(1).sum(1)
    assert torch.corrcoef(torch.stack([heights, widths]).float())[0, 1].abs() < 0.1
    reached = rectangles.float().mean(0)
    assert reached.min() > 0.01
    torch.testing.assert_close(reached, reached.flip(0, 1), rtol=0, atol=0.06)


def _is_rectangle(region: torch.Tensor) -> bool:
    """Whether it is one whose sides are a quarter to nine tenths of 16 px."""
    rows, columns = region.any(1), region.any(0)
    sides = (int(rows.sum()), int(columns.sum()))
    return torch.equal(region, rows[:, None] & columns[None]) and min(sides) >= 4 and max(sides) <= 14


def test_regions_differ_from_sample_to_sample_and_follow_the_seed() -> None:
    first, again = (random_masks(SampleRandom.of_samples(3, range(8)), 16, 0.0) for _ in range(2))
    assert torch.equal(first, again)
    assert len({region.numpy().tobytes() for region in first}) == 8
    assert random_masks(SampleRandom.of_samples(3, range(8)), 16, 1.0).all()


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(image_px=8, context_width=6, unet=UNET, inpainting=True), DIMS).eval()
    randomise(model)
    return model


def test_decoder_reads_the_known_part_and_nothing_of_the_rest(decoder: Decoder) -> None:
    text, z_image, t = make_text((3,)), torch.ones(1, DIMS.embed_dim), torch.tensor([500])
    x, pixels = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    other_left, other_right = pixels.clone(), pixels.clone()
    other_left[..., :4], other_right[..., 4:] = 0.5, 0.5

    def output(picture: torch.Tensor | None) -> torch.Tensor:
        planes = None if picture is None else known_planes(picture, mask)
        return decoder(x, t, decoder.encode_condition(z_image, text, planes=planes))

    assert torch.equal(output(pixels), output(other_right))
    assert not torch.allclose(output(pixels), output(other_left))
    nothing = known_planes(pixels, torch.ones_like(mask))
    condition = decoder.encode_condition(z_image, text, planes=nothing)
    assert torch.equal(decoder(x, t, condition), output(None))


def test_conditions_with_and_without_a_known_part_can_be_joined(decoder: Decoder) -> None:
    text, z_image, t = make_text((3,)), torch.ones(1, DIMS.embed_dim), torch.tensor([500, 20])
    planes = known_planes(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    parts = [decoder.encode_condition(z_image, text, planes=each) for each in (None, planes)]
    x = torch.randn(2, 3, 8, 8)
    joined = concat_rows(parts)
    together = decoder(x, t, joined)
    for i, part in enumerate(parts):
        torch.testing.assert_close(together[i : i + 1], decoder(x[i : i + 1], t[i : i + 1], part), rtol=0, atol=1e-5)
        torch.testing.assert_close(joined.planes[i : i + 1], planes if i else torch.zeros_like(planes))


def test_guidance_tells_both_halves_of_the_known_part(decoder: Decoder) -> None:
    text, z_image, t = make_text((3,)), torch.ones(1, DIMS.embed_dim), torch.tensor([500])
    x, planes = torch.randn(1, 3, 8, 8), known_planes(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    with torch.no_grad():
        null = decoder(x, t, decoder.null_condition(1, planes))
        condition = decoder.encode_condition(z_image, text, planes=planes)
        both = concat_rows([decoder.null_condition(1, planes), condition])
        plain, guided = decoder(x, t, condition), DecoderStage.of(decoder).denoiser(both, [3.0])(x, t)
    torch.testing.assert_close(guided[:, :3], (null + 3 * (plain - null))[:, :3], rtol=0, atol=1e-4)


def test_decoder_without_the_channels_refuses_a_known_part() -> None:
    plain = Decoder(DecoderConfig(image_px=8, context_width=6, unet=UNET), DIMS)
    with pytest.raises(ValueError, match="no inpainting channels"):
        plain.encode_condition(torch.ones(1, DIMS.embed_dim), make_text((3,)), planes=torch.zeros(1, 4, 8, 8))


def test_replaced_part_is_known_at_the_step_reached_and_clean_at_the_end() -> None:
    diffusion = Diffusion(DecoderConfig().diffusion)
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[..., 4:] = True
    pictures, x = torch.randn(2, 2, 3, 8, 8).unbind(0)

    def stays(_denoise: object, state: SamplerState, *_: object) -> SamplerState:
        return state

    step = replacing(stays, pictures, masks, NoiseSource.from_seeds([1, 2]))
    t, t_prev = torch.tensor([600, 300]), torch.tensor([300, -1])
    actual = step(lambda x, _t: x, initial_state(x, diffusion), t, t_prev, diffusion).x
    expected = diffusion.q_sample(pictures, t_prev, NoiseSource.from_seeds([1, 2]).normal_like(pictures))
    assert torch.equal(actual[..., 4:], x[..., 4:])
    assert torch.equal(actual[..., :4], expected[..., :4])
    torch.testing.assert_close(actual[1, ..., :4], pictures[1, ..., :4])

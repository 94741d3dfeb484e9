"""The decoder: its two conditions, their nulls, and caching."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, UNET, make_text, randomise

from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder, image_scale
from models.diffusion.config import DiffusionConfig
from models.rows import concat_rows, take_rows

CONFIG = DecoderConfig(image_px=8, context_width=6, unet=UNET)


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG, DIMS).eval()
    randomise(model)
    model.null_text.set(make_text((2,)))
    return model


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    z_image = torch.nn.functional.normalize(torch.randn(size, DIMS.embed_dim, generator=generator), dim=-1)
    return x, torch.arange(size) * 100, z_image


def test_decoder_has_twice_the_channels_where_variance_is_learned() -> None:
    x, t, z_image = batch(1)
    text = make_text((3,))
    for variance, channels in (("learned_range", 6), ("fixed_small", 3)):
        config = DecoderConfig(
            image_px=8, unet=CONFIG.unet, context_width=6, diffusion=DiffusionConfig(variance=variance)
        )
        model = Decoder(config, DIMS)
        assert model(x, t, model.encode_condition(z_image, text)).shape == (1, channels, 8, 8)


def test_decoder_reads_z_image_and_caption(decoder: Decoder) -> None:
    x, t, z_image = batch(2)
    plain = decoder(x, t, decoder.encode_condition(z_image, make_text((3, 7))))
    other_image = decoder(x, t, decoder.encode_condition(-z_image, make_text((3, 7))))
    other_text = decoder(x, t, decoder.encode_condition(z_image, make_text((4, 6))))
    assert (plain - other_image).abs().amax((1, 2, 3)).min() > 1e-3
    assert (plain - other_text).abs().amax((1, 2, 3)).min() > 1e-3


def test_decoder_image_reaches_both_embedding_and_tokens(decoder: Decoder) -> None:
    _, _, z_image = batch(1)
    one, other = (decoder.encode_condition(z, make_text((3,))) for z in (z_image, -z_image))
    assert (one.embedding != other.embedding).any()
    assert (one.context[0].keys[:, :, :4] != other.context[0].keys[:, :, :4]).all()
    assert torch.equal(one.context[0].keys[:, :, 4:], other.context[0].keys[:, :, 4:])


def test_decoder_reads_z_image_at_the_size_of_one_per_feature(decoder: Decoder) -> None:
    config = DecoderConfig()
    assert [image_scale(config, ClipDims(embed_dim=width)) for width in (16, 64, 768, 1024)] == [4, 8, 32, 32]
    assert image_scale(replace(config, image_norm=10.3), ClipDims(embed_dim=768)) == 2
    (_, _, z_image), text = batch(2), make_text((3, 5))
    condition = decoder.encode_condition(z_image, text)
    expected = decoder.image_to_embedding(4 * z_image) + decoder.pooled_to_embedding(text.pooled)
    torch.testing.assert_close(condition.embedding, expected)
    torch.testing.assert_close(condition.z_text.norm(dim=1), torch.ones(2))


def test_decoder_both_dropped_is_the_null_condition(decoder: Decoder) -> None:
    x, t, z_image = batch(3)
    text = make_text((3, 7, 5))
    drop_last = torch.tensor([True, True, False])
    mixed = decoder(x, t, decoder.encode_condition(z_image, text, keep_image=drop_last, keep_text=drop_last))
    full = decoder(x, t, decoder.encode_condition(z_image, text))
    null = decoder(x, t, decoder.null_condition(3))
    torch.testing.assert_close(mixed[:2], full[:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[2], null[2], rtol=0, atol=1e-5)
    assert (mixed[2] - full[2]).abs().max() > 1e-3


def test_decoder_image_and_caption_are_dropped_apart(decoder: Decoder) -> None:
    _, _, z_image = batch(1)
    text, drop = make_text((3,)), torch.tensor([False])
    conditions = [
        decoder.encode_condition(z_image, text),
        decoder.encode_condition(z_image, text, keep_image=drop),
        decoder.encode_condition(z_image, text, keep_text=drop),
        decoder.null_condition(1),
    ]
    embeddings = torch.cat([condition.embedding for condition in conditions])
    assert torch.cdist(embeddings, embeddings).add(10 * torch.eye(4)).min() > 1e-3


def test_decoder_null_image_is_learned(decoder: Decoder) -> None:
    x, t, z_image = batch(1)
    condition = decoder.encode_condition(z_image, make_text((3,)), keep_image=torch.tensor([False]))
    decoder(x, t, condition).square().sum().backward()
    assert decoder.null_image.grad is not None
    assert decoder.null_image.grad.abs().min() > 0


def test_decoder_output_does_not_depend_on_padding(decoder: Decoder) -> None:
    x, t, z_image = batch(2)
    text = make_text((3, 5))
    plain = decoder(x, t, decoder.encode_condition(z_image, text))
    padded = decoder(x, t, decoder.encode_condition(z_image, text.padded(9)))
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-5)


def test_decoder_conditions_can_be_joined_and_split(decoder: Decoder) -> None:
    x, t, z_image = batch(3)
    parts = [
        decoder.encode_condition(z_image[:1], make_text((3,), width=4)),
        decoder.encode_condition(z_image[1:], make_text((7, 5))),
    ]
    joined = concat_rows(parts)
    apart = torch.cat([decoder(x[:1], t[:1], parts[0]), decoder(x[1:], t[1:], parts[1])])
    torch.testing.assert_close(decoder(x, t, joined), apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoder(x[1:], t[1:], take_rows(joined, slice(1, None))), apart[1:], rtol=0, atol=1e-5)

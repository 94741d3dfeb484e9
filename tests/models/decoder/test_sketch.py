"""The sketch that the decoder reads from the caption alone, beside the noisy one."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, UNET, decoder_inputs, make_text, randomise

from models.decoder.config import DecoderConfig, TextAdapterConfig
from models.decoder.network import Decoder

CONFIG = DecoderConfig(
    image_px=8, context_width=6, unet=UNET, sketch_px=4, text_adapter=TextAdapterConfig(depth=1, head_width=3)
)


def _decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG, DIMS).eval()
    randomise(model)
    return model


def test_the_sketch_is_of_the_caption_alone_and_of_none_of_its_padding() -> None:
    decoder, (_, _, z_image), text = _decoder(), decoder_inputs(2), make_text((5, 3))
    sketch = decoder.encode_condition(z_image, text).sketch
    assert sketch is not None
    assert sketch.shape == (2, 3, 4, 4)
    other_image = decoder.encode_condition(-z_image, replace(text, pooled=-text.pooled)).sketch
    torch.testing.assert_close(other_image, sketch, rtol=0, atol=0)
    padded = replace(text, hidden=text.hidden.masked_fill(~text.mask[..., None], 7.0))
    torch.testing.assert_close(decoder.encode_condition(z_image, padded).sketch, sketch)
    words = replace(text, hidden=text.hidden.flip(2), tokens=text.tokens.flip(1))
    other = decoder.encode_condition(z_image, words).sketch
    assert other is not None
    assert (other - sketch).abs().amax((1, 2, 3)).min() > 1e-4


def test_the_words_of_the_sketch_are_read_by_an_adapter_that_the_unet_does_not_read() -> None:
    decoder, (_, _, z_image), text = _decoder(), decoder_inputs(2), make_text((5, 3))
    condition = decoder.encode_condition(z_image, text)
    assert decoder.sketch is not None
    randomise(decoder.sketch)  # as no generator is set anew, other weights
    changed = decoder.encode_condition(z_image, text)
    assert changed.sketch is not None
    assert condition.sketch is not None
    assert (changed.sketch - condition.sketch).abs().max() > 1e-4
    torch.testing.assert_close(changed.context, condition.context, rtol=0, atol=0)


def test_the_decoder_reads_the_sketch_where_it_lies() -> None:
    decoder, (x, t, z_image), text = _decoder(), decoder_inputs(2), make_text((4, 6))
    condition = decoder.encode_condition(z_image, text)
    plain = decoder(x, t, condition)
    assert condition.sketch is not None
    brighter = condition.sketch.clone()
    brighter[0] += 1.0
    other = decoder(x, t, replace(condition, sketch=brighter))
    assert (other[0] - plain[0]).abs().max() > 1e-4
    torch.testing.assert_close(other[1], plain[1], rtol=0, atol=1e-6)


def test_without_a_caption_the_sketch_is_that_of_the_empty_one() -> None:
    decoder, (_, _, z_image) = _decoder(), decoder_inputs(2)
    none = torch.zeros(2, dtype=torch.bool)
    dropped = decoder.encode_condition(z_image, make_text((4, 6)), keep_text=none).sketch
    torch.testing.assert_close(dropped, decoder.null_condition(2).sketch)


def test_a_sketch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sketch_px = 9: at most image_px = 8"):
        replace(CONFIG, sketch_px=9)
    with pytest.raises(ValueError, match="a sketch needs text_adapter"):
        replace(CONFIG, text_adapter=TextAdapterConfig())

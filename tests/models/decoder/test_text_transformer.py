"""The decoder's own text transformer: what it reads, and that it is trained."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, UNET, decoder_inputs, make_text, randomise

from models.decoder.config import DecoderConfig, TextTransformerConfig
from models.decoder.network import Decoder
from models.decoder.text_transformer import TextTransformer

TEXT = TextTransformerConfig(width=16, depth=2, num_heads=2)
CONFIG = DecoderConfig(image_px=8, context_width=6, unet=UNET, text_transformer=TEXT)


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG, DIMS).eval()
    randomise(model)
    return model


def test_text_transformer_reads_every_token_of_a_caption_from_every_place_and_no_padding() -> None:
    torch.manual_seed(0)
    model = TextTransformer(TEXT, DIMS.context_length).eval()
    text = make_text((5, 3))
    pooled, hidden = model(text.tokens, text.mask)
    later = text.tokens.clone()
    later[0, 4] += 1
    assert (model(later, text.mask)[1][0, :4] - hidden[0, :4]).abs().amax(1).min() > 1e-6  # not causal
    torch.testing.assert_close(pooled[1], hidden[1, 2])
    padded = text.padded(9)
    garbage = padded.tokens.masked_fill(~padded.mask, 7)
    torch.testing.assert_close(model(garbage, padded.mask)[0], pooled, rtol=0, atol=1e-5)


def test_decoder_with_a_text_transformer_reads_tokens_and_not_the_frozen_states(decoder: Decoder) -> None:
    (x, t, z_image), text = decoder_inputs(2), make_text((4, 6))
    plain = decoder(x, t, decoder.encode_condition(z_image, text))
    frozen = replace(text, hidden=text.hidden + 1, pooled=text.pooled + 1)
    torch.testing.assert_close(decoder(x, t, decoder.encode_condition(z_image, frozen)), plain, rtol=0, atol=0)
    tokens = replace(text, tokens=(text.tokens + 1) * text.mask)
    changed = decoder(x, t, decoder.encode_condition(z_image, tokens))
    assert (changed - plain).abs().amax((1, 2, 3)).min() > 1e-4


def test_decoder_with_a_text_transformer_drops_captions_to_the_empty_one(decoder: Decoder) -> None:
    (x, t, z_image), text = decoder_inputs(2), make_text((4, 6))
    keep = torch.tensor([True, False])
    none = torch.zeros(2, dtype=torch.bool)
    dropped = decoder(x, t, decoder.encode_condition(z_image, text, keep_text=keep))
    full = decoder(x, t, decoder.encode_condition(z_image, text))
    other = decoder(x, t, decoder.encode_condition(z_image, make_text((3, 3)), keep_text=keep))
    torch.testing.assert_close(dropped[0], full[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(dropped[1], other[1], rtol=0, atol=1e-5)
    null = decoder(x, t, decoder.encode_condition(z_image, text, keep_image=none, keep_text=none))
    torch.testing.assert_close(null, decoder(x, t, decoder.null_condition(2)), rtol=0, atol=1e-5)


def test_text_transformer_is_trained_with_the_decoder(decoder: Decoder) -> None:
    (x, t, z_image), text = decoder_inputs(2), make_text((4, 6))
    decoder(x, t, decoder.encode_condition(z_image, text)).square().mean().backward()
    assert decoder.text_transformer is not None
    gradients = {name: p.grad for name, p in decoder.text_transformer.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    token_ids = {int(token) for token in text.tokens[text.mask]}
    used = gradients["embedding.weight"]
    assert used is not None
    assert {int(row) for row in used.abs().amax(1).nonzero().flatten()} == token_ids

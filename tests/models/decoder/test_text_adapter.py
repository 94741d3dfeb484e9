"""The adapter on CLIP's token states, and the dropping of both pooled vectors: what the decoder then reads."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, UNET, decoder_inputs, make_text, randomise
from torch import Tensor

from models.clip_config import VOCAB_SIZE
from models.decoder.config import DecoderConfig, TextAdapterConfig, TextTransformerConfig
from models.decoder.network import Decoder
from models.decoder.text_transformer import TextAdapter, _codes, _one_way
from models.layers.transformer import Block

ADAPTER = TextAdapterConfig(depth=2, head_width=3)
WITH_TOKENS = replace(ADAPTER, code_width=4)
ONE_WAY = replace(WITH_TOKENS, one_way_heads=True)
CONFIG = DecoderConfig(image_px=8, context_width=6, unet=UNET, text_adapter=ADAPTER)


@pytest.fixture
def decoder() -> Decoder:
    return _decoder(ADAPTER)


def _decoder(adapter: TextAdapterConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(replace(CONFIG, text_adapter=adapter), DIMS).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("config", [ADAPTER, ONE_WAY])
def test_adapter_lets_each_token_read_the_whole_caption_its_place_and_no_padding(config: TextAdapterConfig) -> None:
    torch.manual_seed(0)
    adapter = TextAdapter(config, 6, DIMS.context_length).eval()
    text = make_text((5, 3))
    mask, states = text.mask, torch.randn(*text.mask.shape, 6)
    out = adapter(states, text.tokens, mask)
    last = states.clone()
    last[0, 4] = last[0, 4].flip(0)
    assert (adapter(last, text.tokens, mask)[0, :4] - out[0, :4]).abs().amax(
        1
    ).min() > 1e-6  # CLIP's tower is causal; this is not
    padding = states.masked_fill(~mask[..., None], 7.0)
    torch.testing.assert_close(adapter(padding, text.tokens, mask)[1, :3], out[1, :3])
    swapped = states.clone()
    swapped[:, :2] = states[:, :2].flip(1)
    assert (adapter(swapped, text.tokens, mask)[0, 0] - out[0, 1]).abs().max() > 1e-6  # a token knows where it stands


def test_decoder_reads_the_adapted_states(decoder: Decoder) -> None:
    (x, t, z_image), text = decoder_inputs(2), make_text((4, 6))
    plain = decoder(x, t, decoder.encode_condition(z_image, text))
    other = decoder(x, t, decoder.encode_condition(z_image, replace(text, hidden=text.hidden.flip(2))))
    assert (other - plain).abs().amax((1, 2, 3)).min() > 1e-4
    assert decoder.text_adapter is not None
    with torch.no_grad():
        decoder.text_adapter.positions.add_(torch.randn_like(decoder.text_adapter.positions))
    moved = decoder(x, t, decoder.encode_condition(z_image, text))
    assert (moved - plain).abs().amax((1, 2, 3)).min() > 1e-4


def test_adapter_with_codes_reads_the_words_themselves() -> None:
    decoder, (x, t, z_image), text = _decoder(WITH_TOKENS), decoder_inputs(2), make_text((4, 6))
    condition = decoder.encode_condition(z_image, text)
    plain = decoder(x, t, condition)
    tokens = text.tokens.clone()
    tokens[0, 1] += 1
    other = decoder(x, t, decoder.encode_condition(z_image, replace(text, tokens=tokens)))
    assert (other[0] - plain[0]).abs().max() > 1e-4
    torch.testing.assert_close(other[1], plain[1], rtol=0, atol=0)
    padding = torch.where(text.mask, text.tokens, 7)
    torch.testing.assert_close(
        decoder(x, t, decoder.encode_condition(z_image, replace(text, tokens=padding))), plain, rtol=0, atol=1e-6
    )


def test_every_token_has_a_code_of_its_own_that_never_changes() -> None:
    codes = _codes(torch.arange(VOCAB_SIZE)[None], 64)[0]
    assert codes[49407, 60:].tolist() == pytest.approx([0.0271, -0.3326, -1.2671, 1.2757], abs=1e-4)
    assert codes.mean(0).abs().max() < 0.02
    of_some = torch.nn.functional.normalize(codes[::20], dim=1)
    likeness = (of_some @ of_some.T).fill_diagonal_(0)
    assert likeness.std() < 1.02 / 64**0.5  # that of independent ones is an eighth
    assert likeness.max() < 0.75


def test_heads_that_read_one_way_read_what_is_before_or_after_a_token() -> None:
    (before, after), padded = _one_way(torch.tensor([[True, True, True], [True, True, False]]), 2)
    assert before.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert after.tolist() == [[True, True, True], [False, True, True], [False, False, True]]
    assert padded[0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert padded[1].tolist() == [[True, True, False], [False, True, False], [False, False, True]]


@pytest.mark.parametrize("one_way", [True, False])
def test_a_head_of_the_adapter_reads_one_way_where_the_recipe_says_so(*, one_way: bool) -> None:
    torch.manual_seed(0)
    adapter = TextAdapter(replace(ADAPTER, depth=1, one_way_heads=one_way), 6, DIMS.context_length).eval()
    [block] = adapter.transformer.blocks
    assert isinstance(block, Block)
    with torch.no_grad():
        block.out.weight[:, 3:] = 0  # the second head's, which reads what is after
    text = make_text((5,))
    states = torch.randn(*text.tokens.shape, 6)
    last = states.clone()
    last[0, 4] = last[0, 4].flip(0)
    moved = adapter(last, text.tokens, text.mask) - adapter(states, text.tokens, text.mask)
    assert (moved[0, :4].abs().amax(1) > 1e-6).tolist() == [not one_way] * 4


@pytest.mark.parametrize("adapter", [ADAPTER, WITH_TOKENS, ONE_WAY])
def test_adapter_is_trained_with_the_decoder(adapter: TextAdapterConfig) -> None:
    decoder, (x, t, z_image), text = _decoder(adapter), decoder_inputs(2), make_text((DIMS.context_length, 6))
    decoder(x, t, decoder.encode_condition(z_image, text)).square().mean().backward()
    assert decoder.text_adapter is not None
    gradients = {name: p.grad for name, p in decoder.text_adapter.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0] == []


@pytest.mark.parametrize("adapter", [TextAdapterConfig(), ADAPTER])
def test_without_the_pooled_vectors_the_token_states_alone_count(adapter: TextAdapterConfig) -> None:
    decoder = _decoder(adapter)
    (x, t, z_image), text, keep = decoder_inputs(2), make_text((4, 6)), torch.tensor([True, False])

    def run(z_image: Tensor = z_image, **changes: Tensor) -> Tensor:
        condition = decoder.encode_condition(z_image, replace(text, **changes), keep_pooled=keep)
        return decoder(x, t, condition)

    plain = run()
    for other in (run(-z_image), run(pooled=text.pooled + 1)):
        torch.testing.assert_close(other[1], plain[1], rtol=0, atol=0)
        assert (other[0] - plain[0]).abs().max() > 1e-4
    assert (run(hidden=text.hidden.flip(2)) - plain).abs().amax((1, 2, 3)).min() > 1e-4
    kept = decoder(x, t, decoder.encode_condition(z_image, text))
    torch.testing.assert_close(plain[0], kept[0], rtol=0, atol=1e-5)


def test_without_caption_and_pooled_vectors_the_condition_is_the_null_one(decoder: Decoder) -> None:
    (x, t, z_image), none = decoder_inputs(2), torch.zeros(2, dtype=torch.bool)
    condition = decoder.encode_condition(z_image, make_text((4, 6)), keep_text=none, keep_pooled=none)
    torch.testing.assert_close(decoder(x, t, condition), decoder(x, t, decoder.null_condition(2)), rtol=0, atol=1e-5)


def test_adapter_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context_width = 6 has 1 heads, an odd number"):
        replace(CONFIG, text_adapter=replace(ONE_WAY, head_width=6))
    with pytest.raises(ValueError, match=r"context_width = 6 is not a multiple of text_adapter.head_width = 4"):
        replace(CONFIG, text_adapter=TextAdapterConfig(depth=1, head_width=4))
    text = TextTransformerConfig(width=16, depth=1, num_heads=2)
    for fields in ({"text_adapter": ADAPTER}, {"text_adapter": TextAdapterConfig(), "pooled_drop_prob": 0.5}):
        with pytest.raises(ValueError, match="text_transformer replaces them"):
            replace(CONFIG, text_transformer=text, **fields)

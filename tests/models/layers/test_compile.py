"""Every network compiles into one graph, and into the same numbers; channels-last in and out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONVOLUTION, DIMS, UNET, make_text, randomise

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.decoder.config import DecoderConfig, TextAdapterConfig, TextTransformerConfig
from models.decoder.network import Decoder
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.mark.parametrize("cache", [False, True])
def test_prior_compiles_without_graph_breaks(cache: bool) -> None:
    prior = Prior(PriorConfig(width=16, depth=2, num_heads=2), DIMS)
    randomise(prior)
    compiled = torch.compile(prior, backend="eager", fullgraph=True)
    with torch.no_grad():
        condition = prior.encode_condition(make_text((3, 5)), cache=cache)
    x, t = torch.randn(2, DIMS.embed_dim), torch.tensor([3, 900])
    torch.testing.assert_close(compiled(x, t, condition), prior(x, t, condition))


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_decoder_and_its_condition_compile_without_graph_breaks(variance: str) -> None:
    config = DecoderConfig(image_px=8, context_width=6, unet=replace(UNET, dropout=0.1))
    decoder = Decoder(replace(config, diffusion=replace(config.diffusion, variance=variance)), DIMS).eval()
    randomise(decoder)
    z_image, text = F.normalize(torch.randn(2, DIMS.embed_dim), dim=-1), make_text((3, 5))
    encode = torch.compile(decoder.encode_condition, backend="eager", fullgraph=True)
    with torch.no_grad():
        condition = encode(z_image, text, keep_image=torch.tensor([True, False]))
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    expected = decoder(x, t, decoder.encode_condition(z_image, text, keep_image=torch.tensor([True, False])))
    torch.testing.assert_close(compiled(x, t, condition), expected)


def test_text_adapter_compiles_without_graph_breaks() -> None:
    config = DecoderConfig(
        image_px=8, context_width=6, unet=UNET, text_adapter=TextAdapterConfig(depth=1, head_width=3, code_width=4)
    )
    decoder = Decoder(config, DIMS).eval()
    randomise(decoder)
    z_image, text = F.normalize(torch.randn(2, DIMS.embed_dim), dim=-1), make_text((3, 5))
    encode = torch.compile(decoder.encode_condition, backend="eager", fullgraph=True)
    keep = torch.tensor([True, False])
    with torch.no_grad():
        compiled = encode(z_image, text, keep_pooled=keep).context[0].keys
        torch.testing.assert_close(compiled, decoder.encode_condition(z_image, text, keep_pooled=keep).context[0].keys)


def test_upsampler_compiles_without_graph_breaks() -> None:
    unet = replace(UNET, attention_resolutions=(), patch_px=2)
    upsampler = Upsampler(UpsamplerConfig(image_px=32, low_res_px=16, crop_px=16, unet=unet))
    randomise(upsampler)
    compiled = torch.compile(upsampler, backend="eager", fullgraph=True)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    condition = upsampler.encode_condition(torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(compiled(x, t, condition), upsampler(x, t, condition))


def test_ar_prior_compiles_without_graph_breaks() -> None:
    config = ArPriorConfig(width=16, depth=2, num_heads=2, num_components=4, num_buckets=6, num_dot_buckets=3)
    prior = ArPrior(config, DIMS)
    randomise(prior)
    with torch.no_grad():
        prefix, dot = prior.encode_condition(make_text((3, 5))), torch.tensor([0, 2])
    compiled = torch.compile(prior, backend="eager", fullgraph=True)
    tokens = torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])
    torch.testing.assert_close(compiled(tokens, dot, prefix), prior(tokens, dot, prefix))


def test_decoder_with_all_that_it_may_have_compiles_without_graph_breaks() -> None:
    text = TextTransformerConfig(width=16, depth=1, num_heads=2)
    unet = replace(UNET, patch_px=2, position_bands=2, attention_resolutions=(2,))
    config = DecoderConfig(image_px=8, context_width=6, unet=unet, text_transformer=text, inpainting=True)
    decoder = Decoder(config, DIMS).eval()
    randomise(decoder)
    z_image, text = F.normalize(torch.randn(2, DIMS.embed_dim), dim=-1), make_text((3, 5))
    known_planes = torch.randn(2, 4, 8, 8)
    encode = torch.compile(decoder.encode_condition, backend="eager", fullgraph=True)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        condition = encode(z_image, text, planes=known_planes)
    expected = decoder(x, t, decoder.encode_condition(z_image, text, planes=known_planes))
    torch.testing.assert_close(compiled(x, t, condition), expected)


def test_noisy_clip_compiles_without_graph_breaks() -> None:
    network = NoisyClip(NoisyClipConfig(image_px=8, tower=CONVOLUTION), DIMS)
    randomise(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(compiled(x, t), network(x, t))


def test_training_step_compiles_with_its_gradient() -> None:
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2), DIMS)
    randomise(prior)
    text, x, t = make_text((3, 5)), torch.randn(2, DIMS.embed_dim), torch.tensor([3, 900])

    def loss() -> torch.Tensor:
        return prior(x, t, prior.encode_condition(text, keep=torch.tensor([True, False]))).square().mean()

    loss().backward()
    expected = {name: parameter.grad for name, parameter in prior.named_parameters()}
    prior.zero_grad(set_to_none=True)
    torch.compile(loss, backend="aot_eager", fullgraph=True)().backward()
    for name, parameter in prior.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_unet_answers_in_channels_last_whatever_its_input() -> None:
    decoder = Decoder(DecoderConfig(image_px=8, context_width=6, unet=UNET), DIMS)
    randomise(decoder)
    condition = decoder.encode_condition(torch.randn(2, DIMS.embed_dim), make_text((3, 5)))
    out = decoder(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), condition)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert decoder.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_no_step_changes_is_computed_once_for_a_chain() -> None:
    from models.decoder.stage import decoder_denoiser
    from models.prior.stage import prior_denoiser

    prior = Prior(PriorConfig(width=16, depth=2, num_heads=2), DIMS).eval()
    decoder = Decoder(DecoderConfig(image_px=8, context_width=6, unet=UNET), DIMS).eval()
    calls: list[str] = []
    watched = {
        "text of the prior": prior.text_in,
        "text of the decoder": decoder.text_to_tokens,
        "context": next(
            stage.attention for stage in decoder.unet.down if stage.attention is not None
        ).context_key_value,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    text, x = make_text((3, 5)), torch.randn(2, DIMS.embed_dim)
    of_prior = prior_denoiser(prior, text, 2.0)
    of_decoder = decoder_denoiser(decoder, F.normalize(x, dim=-1), text, 2.0)
    once = sorted(calls)
    for t in (900, 500, 3):
        of_prior(x, torch.tensor([t, t]))
        of_decoder(torch.randn(2, 3, 8, 8), torch.tensor([t, t]))
    assert sorted(calls) == once
    assert set(once) == set(watched)

"""Networks against diffusers' modules with the same weights: outputs and gradients."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from models.clip_config import ClipDims
from models.decoder.network import Decoder
from models.interchange.networks import (
    Component,
    export_decoder,
    export_prior,
    export_upsampler,
    import_decoder,
    import_prior,
)
from models.interchange.unet import rename
from models.prior.network import Prior
from models.upsampler.network import Upsampler
from tests.models.tiny_models import make_text
from tests.tiny.networks import DECODER, PRIOR, UPSAMPLER, randomise

DIMS = ClipDims(embed_dim=12, text_width=12, context_length=9)
TEXT = make_text((3, 7, 9), 9, DIMS)
T = torch.tensor([0, 500, 999])


def theirs(kind: Any, component: Component) -> Any:
    module = kind.from_config(component.config).eval()
    module.load_state_dict(component.tensors)
    return module


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_equal_outputs(ours: Tensor, reference: Tensor) -> None:
    assert ours.std() > 0.05  # a network of zeros would agree with anything
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def text_proj() -> Any:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    import pipeline.clip.library  # noqa: F401  (it lets torchvision be imported, which the pipelines' modules want)

    return UnCLIPTextProjModel


@pytest.mark.parametrize("cache", [False, True])
def test_prior_is_diffusers_prior_transformer(cache: bool) -> None:
    torch.manual_seed(0)
    prior = Prior(PRIOR, DIMS).eval()
    randomise(prior)
    reference = theirs(PriorTransformer, export_prior(prior))
    x = seeded(3, 12)
    ours = prior(x, T, prior.encode_condition(TEXT, cache=cache))
    reference_output = reference(x, T, TEXT.pooled, TEXT.hidden, TEXT.mask).predicted_image_embedding
    assert_equal_outputs(ours, reference_output)
    embeddings = F.normalize(reference.post_process_latents(reference_output), dim=-1)  # of length one in ours alone
    torch.testing.assert_close(prior.unscale(ours), embeddings, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time_norm", ["scale_shift", "add"])
def test_decoder_is_diffusers_unet_with_text_projection(text_proj: Any, time_norm: str) -> None:
    torch.manual_seed(0)
    config = replace(DECODER, unet=replace(DECODER.unet, time_norm=time_norm))
    decoder = Decoder(config, DIMS).eval()
    randomise(decoder)
    torch.nn.init.normal_(decoder.null_image)
    unet, projection = (
        theirs(kind, part)
        for kind, part in zip((UNet2DConditionModel, text_proj), export_decoder(decoder), strict=True)
    )
    x, z_image = seeded(3, 3, 16, 16), F.normalize(seeded(3, 12), dim=-1)
    for dropped in (False, True):
        keep = torch.full((3,), not dropped)
        ours = decoder(x, T, decoder.encode_condition(z_image, TEXT, keep_image=keep))
        raw_z_image = projection.learned_classifier_free_guidance_embeddings.expand(3, -1) if dropped else z_image
        context, embedding = projection(
            image_embeddings=raw_z_image,
            prompt_embeds=TEXT.pooled,
            text_encoder_hidden_states=TEXT.hidden,
            do_classifier_free_guidance=False,
        )
        mask = F.pad(TEXT.mask, (4, 0), value=True)
        reference_output = unet(x, T, context, class_labels=embedding, attention_mask=mask).sample
        assert_equal_outputs(ours, reference_output)


def test_imported_networks_take_unit_vectors_where_diffusers_takes_raw_ones(text_proj: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "embedding_dim": 12,
        "num_embeddings": 9,
    }
    prior = PriorTransformer(**heads).eval()
    torch.nn.init.normal_(prior.clip_mean)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 4.0)
    layout = export_decoder(Decoder(DECODER, DIMS))
    unet, projection = (
        UNet2DConditionModel.from_config(layout[0].config).eval(),
        text_proj.from_config(layout[1].config),
    )
    torch.nn.init.normal_(projection.learned_classifier_free_guidance_embeddings)
    for module, name in ((prior, "prior"), (unet, "unet"), (projection.eval(), "text_proj")):
        module.save_pretrained(tmp_path / name)
    parts = {
        name: Component(json.loads((tmp_path / name / "config.json").read_text()), load_file(path))
        for name in ("prior", "unet", "text_proj")
        for path in (tmp_path / name).glob("*.safetensors")
    }
    scheduler = {"_class_name": "UnCLIPScheduler", "variance_type": "fixed_small_log", "prediction_type": "sample"}
    config, dims, state = import_prior(parts["prior"], scheduler)
    norm = torch.cat([prior.clip_mean, prior.clip_std]).norm().item()
    assert norm > 5
    assert config.image_norm == pytest.approx(norm, rel=5e-3)
    ours = Prior(config, dims).eval()
    ours.load_state_dict(state)
    x = seeded(3, 12)
    latents = prior(x, T, TEXT.pooled, TEXT.hidden, TEXT.mask).predicted_image_embedding
    raw = prior.post_process_latents(latents)  # of any length
    torch.testing.assert_close(ours.unscale(ours(x, T, ours.encode_condition(TEXT))), F.normalize(raw, dim=-1))

    scheduler |= {"variance_type": "learned_range", "prediction_type": "epsilon"}
    settings, _, state = import_decoder(
        parts["unet"], parts["text_proj"], scheduler, context_length=9, image_norm=config.image_norm
    )
    decoder = Decoder(settings, dims).eval()
    decoder.load_state_dict(state)
    z_image, x = F.normalize(seeded(3, 12), dim=-1), seeded(3, 3, 16, 16)
    for dropped in (False, True):
        raw_z_image = z_image * config.image_norm
        if dropped:
            raw_z_image = projection.learned_classifier_free_guidance_embeddings.expand(3, -1)
        context, embedding = projection(
            image_embeddings=raw_z_image,
            prompt_embeds=TEXT.pooled,
            text_encoder_hidden_states=TEXT.hidden,
            do_classifier_free_guidance=False,
        )
        reference = unet(x, T, context, class_labels=embedding, attention_mask=F.pad(TEXT.mask, (4, 0), value=True))
        condition = decoder.encode_condition(z_image, TEXT, keep_image=torch.full((3,), not dropped))
        assert_equal_outputs(decoder(x, T, condition), reference.sample)


def test_decoder_gradients_are_those_of_diffusers_unet(text_proj: Any) -> None:
    torch.manual_seed(0)
    decoder = Decoder(DECODER, DIMS).eval()
    randomise(decoder)
    component, projected = export_decoder(decoder)
    unet, projection = theirs(UNet2DConditionModel, component), theirs(text_proj, projected)
    x, z_image = seeded(3, 3, 16, 16), F.normalize(seeded(3, 12), dim=-1)
    decoder(x, T, decoder.encode_condition(z_image, TEXT)).square().mean().backward()
    context, embedding = projection(
        image_embeddings=z_image,
        prompt_embeds=TEXT.pooled,
        text_encoder_hidden_states=TEXT.hidden,
        do_classifier_free_guidance=False,
    )
    mask = F.pad(TEXT.mask, (4, 0), value=True)
    unet(x, T, context, class_labels=embedding, attention_mask=mask).sample.square().mean().backward()
    from models.interchange.unet import unet_keys

    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    renamed = rename(gradients, unet_keys(DECODER.unet, DECODER.image_px), prefix="unet.")
    reference = {name: parameter.grad for name, parameter in unet.named_parameters()}
    assert renamed.keys() == reference.keys()
    for name, gradient in renamed.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-3, atol=1e-5)


def test_upsampler_is_diffusers_unet_without_attention() -> None:
    torch.manual_seed(0)
    upsampler = Upsampler(UPSAMPLER).eval()
    randomise(upsampler)
    reference = theirs(UNet2DModel, export_upsampler(upsampler))
    x, low_res = seeded(3, 3, 32, 32), seeded(3, 3, 16, 16).clamp(-1, 1)
    condition = upsampler.encode_condition(low_res)
    assert_equal_outputs(upsampler(x, T, condition), reference(torch.cat([x, condition], 1), T).sample)

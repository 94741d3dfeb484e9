"""diffusers' modules with our weights: the same shapes, the same arithmetic, the same inputs."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipeline.clip.library  # noqa: F401  (it lets torchvision be imported beside a torch without CUDA)
from models.clip_config import END_TOKEN, START_TOKEN, ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.interchange.networks import Component, export_decoder, export_prior
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.text import TextEncoding


@dataclass(frozen=True)
class Inputs:
    """One batch."""

    z_image: Tensor
    text: TextEncoding
    t: Tensor
    pictures: Tensor


def make_inputs(dims: ClipDims, batch_size: int, image_px: int) -> Inputs:
    """Random inputs; captions of full length, so that neither side gains by cutting them."""
    length = dims.context_length
    tokens = torch.full((batch_size, length), START_TOKEN)
    tokens[:, -1] = END_TOKEN
    text = TextEncoding(
        pooled=torch.randn(batch_size, dims.embed_dim),
        hidden=torch.randn(batch_size, length, dims.text_width),
        mask=torch.ones(batch_size, length, dtype=torch.bool),
        tokens=tokens,
    )
    z_image = F.normalize(torch.randn(batch_size, dims.embed_dim), dim=-1)
    t = torch.randint(1000, (batch_size,))
    return Inputs(z_image, text, t, torch.randn(batch_size, 3, image_px, image_px))


def randomise(network: nn.Module) -> None:
    """Random weights in place of zeros, which a library may treat as a shortcut."""
    for name, parameter in network.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.03)


def module_of(kind: Any, component: Component, *, share: bool = False) -> Any:
    """A diffusers module with the weights of a component, copied or shared."""
    module = kind.from_config(component.config)
    module.load_state_dict(component.tensors, assign=share)
    return module


class PriorPair:
    """Our prior, and diffusers' PriorTransformer."""

    def __init__(self, config: PriorConfig, dims: ClipDims) -> None:
        from diffusers import PriorTransformer

        self.ours = Prior(config, dims)
        randomise(self.ours)
        self.theirs: Any = module_of(PriorTransformer, export_prior(self.ours))

    def run_ours(self, batch: Inputs) -> Tensor:
        """Predict x0."""
        return self.ours(self.ours.scale(batch.z_image), batch.t, self.ours.encode_condition(batch.text))

    def run_theirs(self, batch: Inputs) -> Tensor:
        """Predict x0."""
        x, text = self.ours.scale(batch.z_image), batch.text
        return self.theirs(x, batch.t, text.pooled, text.hidden, text.mask).predicted_image_embedding


class DecoderPair:
    """Our decoder, and diffusers' UNet2DConditionModel with its text projection."""

    def __init__(self, config: DecoderConfig, dims: ClipDims) -> None:
        from diffusers import UNet2DConditionModel
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

        self.ours = Decoder(config, dims)
        randomise(self.ours)
        unet, projection = export_decoder(self.ours)
        self.unet: Any = module_of(UNet2DConditionModel, unet)
        self.projection: Any = module_of(UnCLIPTextProjModel, projection)
        self.theirs = nn.ModuleList([self.unet, self.projection])

    def condition_theirs(self, batch: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Context, embedding and mask."""
        context, embedding = self.projection(
            image_embeddings=batch.z_image,
            prompt_embeds=batch.text.pooled,
            text_encoder_hidden_states=batch.text.hidden,
            do_classifier_free_guidance=False,
        )
        return context, embedding, F.pad(batch.text.mask, (4, 0), value=True)

    def run_ours(self, batch: Inputs) -> Tensor:
        """Predict noise and variance."""
        return self.ours(batch.pictures, batch.t, self.ours.encode_condition(batch.z_image, batch.text))

    def run_theirs(self, batch: Inputs) -> Tensor:
        """Predict noise and variance."""
        context, embedding, mask = self.condition_theirs(batch)
        return self.unet(batch.pictures, batch.t, context, class_labels=embedding, attention_mask=mask).sample

"""The decoder, P(image | z_image, caption): arXiv:2204.06125, section 2.1, with Karlo's conditioning or GLIDE's.

z_image and the pooled caption are added to the timestep embedding; z_image becomes a few tokens, which the caption's
token states follow in the context of every attention. The caption's states are those of the frozen CLIP (Karlo), which
an adapter may rework, or of a text transformer that is trained with the decoder (GLIDE, and the paper). Legend: B
batch, D joint space, E timestep embedding, L text tokens, K image tokens, M = K + L context tokens, P side of a sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.inpainting import NUM_KNOWN_CHANNELS
from models.decoder.sketch import Sketch
from models.decoder.text_transformer import TextAdapter, TextTransformer
from models.layers.transformer import KeysValues
from models.layers.unet import UNet
from models.text import NullText, TextEncoding

NUM_COLOURS = 3


@dataclass(frozen=True)
class DecoderCondition:
    """z_image and caption as the decoder reads them, computed once for all steps of a chain."""

    embedding: Float[Tensor, "B E"]
    """Added to the timestep embedding."""
    context: tuple[KeysValues, ...]
    """Keys and values of the context tokens, for each attention."""
    valid: Bool[Tensor, "B M"]
    """False at padding."""
    z_text: Float[Tensor, "B D"]
    """Embedding of the caption, of length one: the target of CLIP guidance."""
    planes: Float[Tensor, "B 4 H W"] | None
    """The known part of the pictures (models/decoder/inpainting.py); None without inpainting channels."""
    sketch: Float[Tensor, "B 3 P P"] | None
    """The coarse picture that the tokens describe, of ``sketch_px`` (models/decoder/sketch.py); None without one."""

    def __len__(self) -> int:
        return self.embedding.shape[0]


def image_scale(config: DecoderConfig, dims: ClipDims) -> float:
    """Power of two that scales the features of z_image from ``image_norm`` / sqrt(D) to about one.

    A power of two, because diffusers' layout has no such factor: multiplied into the weights that read z_image
    (models/interchange/networks.py) it changes their exponents alone, and can be taken out again without rounding.
    """
    return 2.0 ** round(math.log2(dims.embed_dim) / 2 - math.log2(config.image_norm))


class Decoder(nn.Module):
    """A UNet on pictures of ``config.image_px``, conditioned on z_image and a caption."""

    def __init__(self, config: DecoderConfig, dims: ClipDims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims
        self.out_channels = NUM_COLOURS * (2 if config.diffusion.variance == "learned_range" else 1)
        width = config.context_width
        in_channels = NUM_COLOURS + (NUM_KNOWN_CHANNELS if config.inpainting else 0)
        in_channels += NUM_COLOURS if config.sketch_px > 0 else 0
        self.unet = UNet(config.unet, config.image_px, in_channels, self.out_channels, context_width=width)
        self.image_to_embedding = nn.Linear(dims.embed_dim, self.unet.width)
        text = config.text_transformer
        self.text_transformer = None if text is None else TextTransformer(text, dims.context_length)
        pooled_width, text_width = (dims.embed_dim, dims.text_width) if text is None else (text.width, text.width)
        self.pooled_to_embedding = nn.Linear(pooled_width, self.unet.width)
        self.image_to_tokens = nn.Linear(dims.embed_dim, config.num_image_tokens * width)
        self.text_to_tokens = nn.Linear(text_width, width)
        adapter = config.text_adapter
        self.text_adapter = None if adapter.depth == 0 else TextAdapter(adapter, width, dims.context_length)
        self.norm_text = nn.LayerNorm(width)
        self.sketch = None
        if config.sketch_px > 0:
            self.sketch = Sketch(config.sketch_px, adapter, width, dims.context_length, NUM_COLOURS)
        self.null_image = nn.Parameter(torch.zeros(dims.embed_dim))
        self.null_text = NullText(dims)

    def encode_condition(
        self,
        z_image: Float[Tensor, "B D"],
        text: TextEncoding,
        *,
        keep_image: Bool[Tensor, " B"] | None = None,
        keep_text: Bool[Tensor, " B"] | None = None,
        keep_pooled: Bool[Tensor, " B"] | None = None,
        planes: Float[Tensor, "B 4 H W"] | None = None,
    ) -> DecoderCondition:
        """Encode the part of the input that is the same at every step.

        Args:
            z_image: Image embeddings of length one.
            text: The captions.
            keep_image: False where z_image is replaced by its learned null (all are kept if None).
            keep_text: False where the caption is replaced by the empty one (all are kept if None).
            keep_pooled: False where z_image and the pooled caption are replaced and the token states stay (all are
                kept if None); not for a decoder with a text transformer of its own.
            planes: The known part of the pictures, from ``inpainting.known_planes``; None: nothing is known.

        Raises:
            ValueError: If a part is known and the decoder was built without inpainting channels.
        """
        if planes is not None and not self.config.inpainting:
            raise ValueError("this decoder has no inpainting channels to read a known part with")
        image = z_image * (self.config.image_norm * image_scale(self.config, self.dims))
        text = self.null_text.drop(text, keep_text)
        if keep_pooled is not None:
            text = self.null_text.drop_pooled(text, keep_pooled)
            keep_image = keep_pooled if keep_image is None else keep_image & keep_pooled
        if keep_image is not None:
            image = torch.where(keep_image[:, None], image, self.null_image.to(image.dtype))
        return self._encode(image, text, planes)

    def null_condition(self, batch_size: int, planes: Float[Tensor, "B 4 H W"] | None = None) -> DecoderCondition:
        """The condition without z_image and caption, for classifier-free guidance; a known part stays known."""
        return self._encode(self.null_image.expand(batch_size, -1), self.null_text.encoding(batch_size), planes)

    def _encode(
        self, image: Float[Tensor, "B D"], text: TextEncoding, planes: Float[Tensor, "B 4 H W"] | None
    ) -> DecoderCondition:
        pooled, hidden = text.pooled, text.hidden
        if self.text_transformer is not None:
            pooled, hidden = self.text_transformer(text.tokens, text.mask)
        embedding = self.image_to_embedding(image) + self.pooled_to_embedding(pooled)
        # Feature c of token k is row c * K + k of the projection, as in diffusers' UnCLIPTextProjModel.
        tokens = self.image_to_tokens(image).unflatten(1, (-1, self.config.num_image_tokens)).transpose(1, 2)
        words = self.text_to_tokens(hidden)
        sketch = None if self.sketch is None else self.sketch(words, text.tokens, text.mask)
        if self.text_adapter is not None:
            words = self.text_adapter(words, text.tokens, text.mask)
        tokens = torch.cat([tokens, self.norm_text(words)], dim=1)
        valid = F.pad(text.mask, (self.config.num_image_tokens, 0), value=True)
        if self.config.inpainting and planes is None:
            side_px = self.config.image_px
            planes = embedding.new_zeros(len(text), NUM_KNOWN_CHANNELS, side_px, side_px)
        return DecoderCondition(embedding, self.unet.encode_context(tokens), valid, text.z_text, planes, sketch)

    def forward(
        self, x: Float[Tensor, "B 3 H W"], t: Int[Tensor, " B"], condition: DecoderCondition
    ) -> Float[Tensor, "B C H W"]:
        """The network's output at noised pictures ``x``: C is 3, or 6 where the variance is learned."""
        if condition.planes is not None:
            x = torch.cat([x, condition.planes.to(x.dtype)], dim=1)
        if condition.sketch is not None:
            sketch = F.interpolate(condition.sketch, x.shape[-2:], mode="bilinear")
            x = torch.cat([x, sketch.to(x.dtype)], dim=1)
        return self.unet(x, t, embedding=condition.embedding, context=condition.context, valid=condition.valid)

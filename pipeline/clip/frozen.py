"""The frozen CLIP of the cascade: it embeds pictures and captions, without gradients.

Legend: B batch, L text tokens, D joint space, W text width, H W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.clip_config import ClipDims
from models.text import TextEncoding, padded_length
from pipeline.clip.library import TextTransformer, open_clip, text_global_pool
from pipeline.clip.model import OpenClip
from pipeline.errors import ConfigError

_NO_STATES = (
    "clip: the text tower of this CLIP has no causal states of CLIP's own tokens, and the prior and the decoder read "
    "them: it can embed and search, not train or sample; for that, choose a plain CLIP (for example ViT-L-14)"
)


class FrozenText(nn.Module):
    """The text tower of the frozen CLIP, without gradients: it embeds captions. Sampling needs no image tower."""

    def __init__(self, clip: OpenClip) -> None:
        super().__init__()
        self.clip = clip
        self.model = clip.model.eval().requires_grad_(requires_grad=False)
        self.tower = _causal_tower(clip)

    @property
    def dims(self) -> ClipDims:
        """The sizes that the prior and the decoder depend on."""
        return self.clip.dims

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.logit_scale.device

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  (nn.Module's signature)
        """Stay in evaluation mode, because a frozen tower must not update batch statistics."""
        return self

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Float[Tensor, "B D"]:
        """z_text of captions, of length one; with any of open_clip's text towers."""
        return self.embed_tokens(self.clip.tokenize(captions))

    @torch.no_grad()
    def embed_tokens(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """z_text of the token ids of ``tokenize``."""
        if self.tower is not None:
            return self.encode_tokens(tokens).z_text
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        """Encode B captions; L is the length of the longest, rounded up to a multiple of 8 tokens.

        Raises:
            ConfigError: If this is no plain CLIP: its text tower has no causal states of CLIP's tokens.
        """
        return self.encode_tokens(self.clip.tokenize(captions))

    @torch.no_grad()
    def encode_tokens(self, tokens: Int[Tensor, "B L"]) -> TextEncoding:
        """Encode the token ids of ``tokenize``.

        The text tower is causal, so tokens after the end of the longest caption are cut off to save time.

        Raises:
            ConfigError: See ``encode_text``.
        """
        if self.tower is None:
            raise ConfigError(_NO_STATES)
        mask = _token_mask(tokens, self.clip.tokenizer.eot_token_id)
        length = padded_length(int(mask.sum(1).max()), tokens.shape[1])
        tokens = tokens[:, :length].to(self.device)
        hidden = self._hidden(self.tower, tokens).float()
        return TextEncoding(
            pooled=self._pool(self.tower, hidden, tokens),
            hidden=hidden,
            mask=mask[:, :length].to(self.device),
            tokens=tokens,
        )

    def _hidden(self, tower: Any, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        length = tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        return tower.ln_final(x)

    def _pool(self, tower: Any, hidden: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        pooled = text_global_pool(hidden, tokens, "argmax")
        projection = tower.text_projection
        if projection is None:
            return pooled
        # In float32 also of a tower in half precision: it is one small product.
        if isinstance(projection, nn.Linear):
            bias: Tensor | None = getattr(projection, "bias", None)
            return F.linear(pooled, projection.weight.float(), None if bias is None else bias.float())
        return pooled @ projection.float()


class FrozenClip(FrozenText):
    """The frozen CLIP of the cascade with both towers, without gradients: it embeds pictures and captions."""

    @property
    def image_px(self) -> int:
        """Side of the image tower's input, in pixels; pictures are resized to it."""
        return self.clip.image_px

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Float[Tensor, "B D"]:
        """Embed pictures.

        Args:
            images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [-1, 1], of any size; pictures of another size than
                ``image_px`` are framed as the model's own preprocessing does.

        Returns:
            z_image, of length one.
        """
        pixels = self.clip.prepare(images.to(self.device)).to(self.model.logit_scale.dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def compile_towers(self) -> None:
        """Compile both towers when they are first called; names and values of the weights stay."""
        self.model.visual.compile()
        text: Any = getattr(self.model, "text", self.model)
        text.transformer.compile()


def freeze(clip: OpenClip) -> FrozenText:
    """Freeze a CLIP: as a ``FrozenClip`` if it has an image tower, else as a ``FrozenText``."""
    return FrozenClip(clip) if clip.has_images else FrozenText(clip)


def _causal_tower(clip: OpenClip) -> Any:
    """The module with the text tower's layers, if it has causal states of CLIP's own tokens; else None.

    That is open_clip's CLIP itself, or the ``text`` of other models. SigLIP's text tower looks both ways, CoCa's has an
    added token, and others have a vocabulary of their own.
    """
    tower: Any = getattr(clip.model, "text", clip.model)
    if "hf_tokenizer_name" in clip.model_config["text_cfg"] or not isinstance(tower, open_clip.CLIP | TextTransformer):
        return None
    is_plain = tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None
    return tower if is_plain else None


def _token_mask(tokens: Int[Tensor, "B L"], end: int) -> Tensor:
    """Mask (B, L) that is True up to and including the first end token of each row."""
    ends = (tokens == end).int()
    return ends.cumsum(1) - ends == 0

"""Shapes of CLIP, and the sizes that other networks take from it."""

from __future__ import annotations

from typing import Any, Literal

from models.configclass import configclass, require
from models.layers.config import require_transformer

VOCAB_SIZE = 49408
"""Entries of the CLIP byte-pair vocabulary, in tokens: a smaller table overflows with the real tokenizer."""
START_TOKEN, END_TOKEN = VOCAB_SIZE - 2, VOCAB_SIZE - 1
"""First and last token of every caption in CLIP's vocabulary."""


@configclass
class ClipDims:
    """The sizes that the prior and the decoder take from the frozen CLIP; never repeated in a recipe."""

    embed_dim: int = 768
    """Width D of the joint space of z_image and z_text, in features (ViT-L/14: 768)."""
    text_width: int = 768
    """Width W of the text tower's hidden states, in features (ViT-L/14: 768)."""
    context_length: int = 77
    """Length L of a tokenised caption, in tokens."""

    def __post_init__(self) -> None:
        require(
            min(self.embed_dim, self.text_width, self.context_length) >= 1,
            f"embed_dim = {self.embed_dim}, text_width = {self.text_width}, "
            f"context_length = {self.context_length}: each at least 1",
        )


@configclass
class ClipConfig:
    """A CLIP built by open_clip: ModifiedResNet or ViT, and a text transformer (arXiv:2103.00020)."""

    embed_dim: int = 128
    """Width D of the joint space, in features."""
    image_px: int = 64
    """Side of the square input picture, in pixels; the ResNet divides it by 32, the ViT by ``patch_px``."""
    vision: Literal["resnet", "vit"] = "resnet"
    """Image tower: the ResNet learns from few pictures, the ViT is the paper's (appendix C: ViT-H/16)."""
    vision_layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Bottleneck blocks in each of the four stages of the ResNet."""
    vision_width: int = 32
    """Channels of the ResNet's first stage, or width of the ViT, in features (appendix C: 1280)."""
    vision_depth: int = 12
    """Blocks of the ViT (appendix C: 32)."""
    vision_heads: int = 1
    """Attention heads of the ViT."""
    patch_px: int = 16
    """Side of the ViT's patches, in pixels (appendix C: 16)."""
    text_width: int = 128
    """Width W of the text transformer, in features."""
    text_heads: int = 4
    """Attention heads of the text transformer."""
    text_layers: int = 2
    """Blocks of the text transformer."""
    context_length: int = 32
    """Length L of a tokenised caption, in tokens, start and end included; longer captions are cut."""
    hard_negatives: bool = False
    """Whether training also tells each picture's caption from the same words in another order (arXiv:2210.01936), made
    by swapping two spans of at most three words where every new pair of neighbours occurs in the batch. It teaches CLIP
    the order of words, which a batch of unlike captions does not ask for, and runs the text transformer twice."""

    def __post_init__(self) -> None:
        require(self.patch_px >= 1, f"patch_px = {self.patch_px}: at least 1")
        factor = 32 if self.vision == "resnet" else self.patch_px
        require(
            self.image_px > 0 and self.image_px % factor == 0,
            f"image_px = {self.image_px}: this CLIP's {self.vision} needs a multiple of {factor}",
        )
        require(self.embed_dim >= 1, f"embed_dim = {self.embed_dim}: at least 1")
        require(self.vision_width % 2 == 0, f"vision_width = {self.vision_width}: must be even")
        require(min(self.vision_layers) >= 1, f"vision_layers = {self.vision_layers}: each at least 1")
        vision, text = (
            {"prefix": "vision_", "depth_name": "vision_depth"},
            {"prefix": "text_", "depth_name": "text_layers"},
        )
        require_transformer(self.vision_width, self.vision_depth, self.vision_heads, **vision)
        require_transformer(self.text_width, self.text_layers, self.text_heads, **text)
        require(self.context_length >= 3, f"context_length = {self.context_length}: at least 3")

    def dims(self) -> ClipDims:
        """The sizes of this CLIP that the prior and the decoder need."""
        return ClipDims(embed_dim=self.embed_dim, text_width=self.text_width, context_length=self.context_length)

    def to_open_clip(self) -> dict[str, Any]:
        """The same model as an open_clip model configuration (the ``model_cfg`` of open_clip_config.json)."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": self._vision(),
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": VOCAB_SIZE,
                "width": self.text_width,
                "heads": self.text_heads,
                "layers": self.text_layers,
            },
        }

    def _vision(self) -> dict[str, Any]:
        tower: dict[str, Any] = {"image_size": self.image_px, "width": self.vision_width}
        if self.vision == "resnet":
            return tower | {
                "layers": list(self.vision_layers),
                "head_width": min(64, self.vision_width),
                "patch_size": None,
            }
        return tower | {
            "layers": self.vision_depth,
            "head_width": self.vision_width // self.vision_heads,
            "patch_size": self.patch_px,
        }

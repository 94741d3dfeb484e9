"""Shapes of the layers that networks share, as data."""

from __future__ import annotations

from typing import Literal

from models.configclass import configclass, require, require_dropout


def require_transformer(width: int, depth: int, num_heads: int, *, prefix: str = "", depth_name: str = "depth") -> None:
    """Check the sizes of a transformer.

    Args:
        width: Features of each token.
        depth: Number of blocks.
        num_heads: Attention heads, which share the width equally.
        prefix: Prefix of the names ``width`` and ``heads`` in the configuration.
        depth_name: Name of the field that holds the depth.

    Raises:
        ValueError: If the heads do not divide the width, or a size is below 1.
    """
    heads_name = f"{prefix}heads" if prefix else "num_heads"
    require(depth >= 1, f"{depth_name} = {depth}: at least 1")
    require(num_heads >= 1, f"{heads_name} = {num_heads}: at least 1")
    require(
        width >= 1 and width % num_heads == 0,
        f"{prefix}width = {width} is not a positive multiple of {heads_name} = {num_heads}",
    )


@configclass
class UNetConfig:
    """Shape of an ADM UNet: arXiv:2105.05233, with the key-value context of GLIDE (arXiv:2112.10741)."""

    channels: int = 128
    """Channels of the first level (table 3: 512 / 320 / 192)."""
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level as a multiple of ``channels``; each level halves the side (table 3: 1,2,3,4)."""
    num_res_blocks: int = 3
    """Residual blocks per level on the way down; one more on the way up (table 3: 3 / 3 / 2)."""
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    """Sides of the levels with attention, in pixels (table 3: 32,16,8); if none, the middle has none too."""
    head_channels: int = 64
    """Channels per attention head (table 3: 64)."""
    norm_groups: int = 32
    """Groups of each group normalisation."""
    time_norm: Literal["scale_shift", "add"] = "scale_shift"
    """How the timestep enters a residual block: after the norm as scale and shift (ADM), or added before it."""
    dropout: float = 0.1
    """Dropout inside the residual blocks, per feature (table 3: 0.1)."""
    patch_px: int = 1
    """Side of the square of pixels folded into the channels before the first level and unfolded after the last, in
    pixels (arXiv:1609.05158): 1 is the paper's network; 2 and 4 trade the finest level for speed."""
    position_bands: int = 0
    """Octaves of sines and cosines of a pixel's place that are appended to the input (arXiv:1807.03247, with the
    features of arXiv:2006.10739): 0 is the paper's network; a few let a small network place and outline the
    objects of a caption after fewer steps. Not for networks that are trained on crops."""

    def __post_init__(self) -> None:
        require(self.patch_px >= 1, f"patch_px = {self.patch_px}: at least 1")
        require(self.position_bands >= 0, f"position_bands = {self.position_bands}: must not be negative")
        require(
            self.num_res_blocks >= 1 and len(self.channel_mults) >= 1 and min(self.channel_mults) >= 1,
            f"num_res_blocks = {self.num_res_blocks}, channel_mults = {self.channel_mults}: each at least 1",
        )
        require(
            self.norm_groups >= 1 and self.channels >= 1 and self.channels % self.norm_groups == 0,
            f"channels = {self.channels} is not a positive multiple of norm_groups = {self.norm_groups}",
        )
        require(self.channels % 2 == 0, f"channels = {self.channels}: must be even")
        require(self.head_channels >= 1, f"head_channels = {self.head_channels}: at least 1")
        require_dropout(self.dropout)

    def level_sides_px(self, image_px: int) -> tuple[int, ...]:
        """Side of each level for pictures of side ``image_px``, in pixels."""
        return tuple(image_px // self.patch_px // 2**level for level in range(len(self.channel_mults)))

    def require_fits(self, image_px: int) -> None:
        """Raise ValueError unless pictures of side ``image_px`` pass through every level."""
        factor = self.patch_px * 2 ** (len(self.channel_mults) - 1)
        require(
            image_px >= factor and image_px % factor == 0,
            f"image_px = {image_px} is not a multiple of {factor} (patch_px times a halving for each further level)",
        )
        sides = self.level_sides_px(image_px)
        missing = [side for side in self.attention_resolutions if side not in sides]
        require(not missing, f"attention_resolutions {missing} are not among the levels {sides}, in pixels")
        for side, mult in zip(sides, self.channel_mults, strict=True):
            if side in self.attention_resolutions:
                self._require_heads(mult)
        if self.attention_resolutions:
            self._require_heads(self.channel_mults[-1])

    def _require_heads(self, mult: int) -> None:
        require(
            (self.channels * mult) % self.head_channels == 0,
            f"{self.channels * mult} channels at a level with attention: not a multiple of "
            f"head_channels = {self.head_channels}",
        )

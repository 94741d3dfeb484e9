"""The ADM UNet (arXiv:2105.05233) with attention that also reads a context, as in GLIDE (arXiv:2112.10741).

Legend: B batch, C channels, H W pixels of a level, E embedding, M context tokens, X context width, N attention heads.
Pictures may be in either memory order; inside they are channels-last, so that attention needs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers.config import UNetConfig
from models.layers.dropout import SampleDropout
from models.layers.embedding import TimestepEmbedding
from models.layers.transformer import Block, KeysValues

Resample = Literal["down", "up", "none"]
_LEAST_FUSED_PX = 16


def _zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """``layer`` with zero weights: a residual branch that starts at zero makes its block the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _resample(x: Tensor, how: Resample) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    if how == "none":
        return x
    return enlarge(x) if torch.compiler.is_compiling() else F.interpolate(x, scale_factor=2.0, mode="nearest")


def enlarge(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 2*H 2*W"]:
    """Each pixel twice in both directions, channels-last; the gradient is a sum, where that of interpolate scatters."""
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # B H 1 W 1 C
    return rows.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _enlarged_conv(x: Float[Tensor, "B C H W"], conv: nn.Conv2d) -> Float[Tensor, "B D 2*H 2*W"]:
    """``conv`` (3 x 3) of ``x`` enlarged twice by nearest neighbour, without making the enlarged picture.

    The four pixels of each square are equal, so the nine taps of a kernel read at most four values. Both operations
    together are one transposed convolution of stride 2 with a 4 x 4 kernel: 16 multiplications instead of 36.
    """
    taps = conv.weight.flip(2, 3).transpose(0, 1)
    kernel = sum(F.pad(taps, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1))
    return F.conv_transpose2d(x, cast(Tensor, kernel), conv.bias, stride=2, padding=1)


class GroupNorm(nn.GroupNorm):
    """torch's, but written out where it is compiled, so that channels-last pictures stay so.

    torch's own kernel for GPUs gives rows of pixels whatever its input is. The compiler keeps to that order between
    operators, and each convolution before and after it copies its gradient or its input.
    """

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise each group of channels."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(
    x: Float[Tensor, "B C H W"], num_groups: int, weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "B C H W"]:
    """``F.group_norm`` in float32, by moments of each channel; channels-last, and so is its gradient."""
    rows = x.float().permute(0, 2, 3, 1)
    variance, mean = (one.unflatten(1, (num_groups, -1)) for one in torch.var_mean(rows, dim=(1, 2), correction=0))
    between, centre = torch.var_mean(mean, dim=2, correction=0, keepdim=True)
    scale = torch.rsqrt(variance.mean(2, keepdim=True) + between + eps) * weight.unflatten(0, (num_groups, -1))
    shift = bias - (centre * scale).flatten(1)
    return torch.addcmul(shift[:, None, None], rows, scale.flatten(1)[:, None, None]).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Two convolutions beside a skip; the embedding enters between them; both branches may change the side."""

    def __init__(self, channels: tuple[int, int], width: int, config: UNetConfig, resample: Resample = "none") -> None:
        super().__init__()
        num_in, num_out = channels
        self.resample: Resample = resample
        self.scale_shift = config.time_norm == "scale_shift"
        self.norm_in = GroupNorm(config.norm_groups, num_in)
        self.conv_in = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.embedding = nn.Linear(width, (2 if self.scale_shift else 1) * num_out)
        self.norm_out = GroupNorm(config.norm_groups, num_out)
        self.dropout = SampleDropout(config.dropout)
        self.conv_out = _zeroed(nn.Conv2d(num_out, num_out, 3, padding=1))
        self.skip = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"], embedding: Float[Tensor, "B E"]) -> Tensor:
        """Apply to features ``x``; ``embedding`` has its activation already."""
        hidden = F.silu(self.norm_in(x))
        # On one core, training, 128 channels, 16 -> 32 px: 24 ms instead of 44. Below 16 px it saves nothing.
        if self.resample == "up" and x.device.type == "cpu" and x.shape[-1] >= _LEAST_FUSED_PX:
            hidden = _enlarged_conv(hidden, self.conv_in)
        else:
            hidden = self.conv_in(_resample(hidden, self.resample))
        change = self.embedding(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = change.chunk(2, dim=1)
            hidden = torch.addcmul(shift, self.norm_out(hidden), scale + 1)
        else:
            hidden = self.norm_out(hidden + change)
        return self.skip(_resample(x, self.resample)) + self.conv_out(self.dropout(F.silu(hidden)))


class Attention(nn.Module):
    """Each pixel attends to the context tokens and all pixels; the result is added to the input."""

    def __init__(self, channels: int, context_width: int | None, config: UNetConfig) -> None:
        super().__init__()
        self.num_heads = channels // config.head_channels
        self.norm = GroupNorm(config.norm_groups, channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.context_key_value = None if context_width is None else nn.Linear(context_width, 2 * channels)
        self.out = _zeroed(nn.Linear(channels, channels))

    def encode_context(self, context: Float[Tensor, "B M X"]) -> KeysValues:
        """Keys and values of the context: they are the same at every step."""
        if self.context_key_value is None:
            raise ValueError("this UNet was built without a context")
        keys, values = self.context_key_value(context).chunk(2, dim=-1)
        return KeysValues(self._heads(keys), self._heads(values))

    def forward(
        self, x: Float[Tensor, "B C H W"], context: KeysValues | None, valid: Bool[Tensor, "B M"] | None
    ) -> Float[Tensor, "B C H W"]:
        """Attend over [context, pixels]; ``valid`` is False at context tokens that must not be read."""
        height, width = x.shape[2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, keys, values = (self._heads(part) for part in self.query_key_value(tokens).chunk(3, dim=-1))
        mask = None
        if context is not None:
            keys = torch.cat([context.keys, keys], dim=2)
            values = torch.cat([context.values, values], dim=2)
            if valid is not None:
                mask = F.pad(valid, (0, height * width), value=True)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, (height, width))

    def _heads(self, tokens: Float[Tensor, "B L C"]) -> Float[Tensor, "B N L c"]:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class UNetStage(nn.Module):
    """A residual block, and attention at the levels that have it."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.checkpointing = False

    def forward(
        self, x: Tensor, embedding: Tensor, context: KeysValues | None, valid: Tensor | None
    ) -> Float[Tensor, "B C H W"]:
        """Apply both."""
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._run, x, embedding, context, valid, use_reentrant=False))
        return self._run(x, embedding, context, valid)

    def _run(self, x: Tensor, embedding: Tensor, context: KeysValues | None, valid: Tensor | None) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x, context, valid)


class UNet(nn.Module):
    """Down, middle and up, with a skip from each stage of the way down to its mirror on the way up.

    Stages are in execution order. The skips are the outputs of ``conv_in`` and of each stage of ``down``.
    """

    def __init__(
        self,
        config: UNetConfig,
        image_px: int,
        in_channels: int,
        out_channels: int,
        *,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        config.require_fits(image_px)
        self.config = config
        self.width = 4 * config.channels
        self._context_width = context_width
        self.timestep = TimestepEmbedding(config.channels, self.width)
        patch_area = config.patch_px**2
        num_in = in_channels * patch_area + 4 * config.position_bands
        self.conv_in = nn.Conv2d(num_in, config.channels, 3, padding=1)
        sides = config.level_sides_px(image_px)
        attends = [side in config.attention_resolutions for side in sides]
        widths = [config.channels * mult for mult in config.channel_mults]

        down, skips = self._build_down(widths, attends)
        self.down = nn.ModuleList(down)
        last = widths[-1]
        has_attention = bool(config.attention_resolutions)
        self.middle = nn.ModuleList([self._stage((last, last), has_attention), self._stage((last, last), False)])
        self.up = nn.ModuleList(self._build_up(widths, attends, skips))
        reads_context = context_width is not None
        self._num_context_layers = sum(stage.attention is not None for stage in self._stages()) if reads_context else 0
        self.takes_skip = _takes_skip(len(widths), config.num_res_blocks)
        self.norm_out = GroupNorm(config.norm_groups, widths[0])
        self.conv_out = _zeroed(nn.Conv2d(widths[0], out_channels * patch_area, 3, padding=1))
        # Convolutions then return channels-last for any order of their input: 5-15 % faster on a CPU, and the order
        # that tensor cores need.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)

    def _stage(self, channels: tuple[int, int], attends: bool, resample: Resample = "none") -> UNetStage:
        block = ResBlock(channels, self.width, self.config, resample)
        return UNetStage(block, Attention(channels[1], self._context_width, self.config) if attends else None)

    def _build_down(self, widths: Sequence[int], attends: Sequence[bool]) -> tuple[list[UNetStage], list[int]]:
        stages: list[UNetStage] = []
        skips = [self.config.channels]
        channels = self.config.channels
        for level, width in enumerate(widths):
            for _ in range(self.config.num_res_blocks):
                stages.append(self._stage((channels, width), attends[level]))
                channels = width
                skips.append(channels)
            if level + 1 < len(widths):
                stages.append(self._stage((channels, channels), False, "down"))
                skips.append(channels)
        return stages, skips

    def _build_up(self, widths: Sequence[int], attends: Sequence[bool], skips: list[int]) -> list[UNetStage]:
        stages: list[UNetStage] = []
        skips = list(skips)
        channels = widths[-1]
        for level in reversed(range(len(widths))):
            for _ in range(self.config.num_res_blocks + 1):
                stages.append(self._stage((channels + skips.pop(), widths[level]), attends[level]))
                channels = widths[level]
            if level > 0:
                stages.append(self._stage((channels, channels), False, "up"))
        return stages

    def encode_context(self, context: Float[Tensor, "B M X"]) -> tuple[KeysValues, ...]:
        """Keys and values of the context for each attention, in execution order."""
        attentions = (stage.attention for stage in self._stages())
        return tuple(attention.encode_context(context) for attention in attentions if attention is not None)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Int[Tensor, " B"],
        *,
        embedding: Float[Tensor, "B E"] | None = None,
        context: Sequence[KeysValues] = (),
        valid: Bool[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B C_out H W"]:
        """Run the network.

        Args:
            x: Input channels; any side that can be halved at each level.
            t: 0-based timesteps.
            embedding: Added to the embedding of ``t``.
            context: From ``encode_context``; empty for a UNet without context.
            valid: False at context tokens that must not be read.

        Raises:
            ValueError: If the context does not have the layers that this UNet was built for.
        """
        if len(context) != self._num_context_layers:
            raise ValueError(
                f"this UNet reads a context at {self._num_context_layers} layers, and was given {len(context)}"
            )
        added = self.timestep(t) if embedding is None else self.timestep(t) + embedding
        activated = F.silu(added)
        layers = iter(context)

        def run(stage: UNetStage, hidden: Tensor) -> Tensor:
            layer = None if stage.attention is None else next(layers, None)
            return stage(hidden, activated, layer, valid)

        patch_px = self.config.patch_px
        x = x if patch_px == 1 else F.pixel_unshuffle(x, patch_px)
        if self.config.position_bands:
            x = torch.cat([x, _positions(x, self.config.position_bands)], dim=1)
        hidden = self.conv_in(x)
        skips = [hidden]
        for stage in self.down:
            hidden = run(cast(UNetStage, stage), hidden)
            skips.append(hidden)
        for stage in self.middle:
            hidden = run(cast(UNetStage, stage), hidden)
        for stage, takes_skip in zip(self.up, self.takes_skip, strict=True):
            if takes_skip:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = run(cast(UNetStage, stage), hidden)
        out = self.conv_out(F.silu(self.norm_out(hidden)))
        return out if patch_px == 1 else F.pixel_shuffle(out, patch_px)

    def _stages(self) -> list[UNetStage]:
        return [cast(UNetStage, stage) for part in (self.down, self.middle, self.up) for stage in part]


def _positions(x: Float[Tensor, "B C H W"], num_bands: int) -> Float[Tensor, "B P H W"]:
    """Sine and cosine of each pixel's place, in [-1, 1] times pi / 2, pi, 2 pi ...: P is 4 a band."""
    planes: list[Tensor] = []
    for axis in (2, 3):
        size = x.shape[axis]
        place = (2 * torch.arange(size, device=x.device, dtype=x.dtype) + 1) / size - 1
        octaves = 2.0 ** torch.arange(-1, num_bands - 1, device=x.device, dtype=x.dtype)
        angles = torch.pi * octaves[:, None] * place[None]  # (bands, size)
        waves = torch.cat([angles.sin(), angles.cos()])
        planes.append(waves[:, :, None] if axis == 2 else waves[:, None, :])
    both = torch.cat([plane.expand(-1, x.shape[2], x.shape[3]) for plane in planes])
    return both.expand(x.shape[0], -1, -1, -1)


def _takes_skip(num_levels: int, num_res_blocks: int) -> tuple[bool, ...]:
    """Which stages on the way up read a skip: all but those that enlarge."""
    level = [True] * (num_res_blocks + 1)
    return tuple(([*level, False] * num_levels)[:-1])


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The parts of UNets and transformers that run one after another, an inner one before the one around it.

    What reads the context of an attention runs before the stage that it is in, so it stands alone.
    """
    attentions = (module for module in network.modules() if isinstance(module, Attention))
    readers = [reader for attention in attentions if (reader := attention.context_key_value) is not None]
    return [*readers, *(module for module in network.modules() if isinstance(module, UNetStage | Block))]


def set_checkpointing(network: nn.Module, *, enabled: bool) -> int:
    """Recompute the stages of every UNet and the blocks of every transformer in the backward pass, or keep them.

    Activation checkpointing (arXiv:1604.06174): memory for time, with the same numbers. open_clip's transformers have
    the same by another name.

    Returns:
        How many modules of ``network`` support it; 0 means that it always keeps its activations.
    """
    num_modules = 0
    for module in network.modules():
        for name in ("checkpointing", "grad_checkpointing"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, enabled)
                num_modules += 1
    return num_modules

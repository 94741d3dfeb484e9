"""Our UNet under the names of diffusers' UNet2DConditionModel (with attention) and UNet2DModel (without).

Both libraries build the same network (ADM's, arXiv:2105.05233); diffusers keeps queries, keys and values in matrices
of their own, where we keep them in one. Keys are prefixes of module names: ours -> theirs, several if one matrix of
ours is cut along its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.layers.config import UNetConfig

Json = dict[str, Any]
Keys = dict[str, tuple[str, ...]]

_BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION: Keys = {
    "norm": ("group_norm",),
    "query_key_value": ("to_q", "to_k", "to_v"),
    "context_key_value": ("add_k_proj", "add_v_proj"),
    "out": ("to_out.0",),
}
_TIME_NORMS = {"scale_shift": "scale_shift", "add": "default"}
_ATTENDS = {"down": "SimpleCrossAttnDownBlock2D", "up": "SimpleCrossAttnUpBlock2D"}
_PLAIN = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}


def rename(state: Mapping[str, Tensor], keys: Keys, *, prefix: str = "") -> dict[str, Tensor]:
    """Our tensors under diffusers' names; those that ``keys`` does not name are left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.removeprefix(prefix).rpartition(".")
        if name.startswith(prefix) and module in keys:
            theirs = keys[module]
            renamed |= {f"{one}.{kind}": part for one, part in zip(theirs, tensor.chunk(len(theirs)), strict=True)}
    return renamed


def rename_back(tensors: Mapping[str, Tensor], keys: Keys, *, prefix: str = "") -> dict[str, Tensor]:
    """Inverse of ``rename``.

    Raises:
        ValueError: If some of the tensors that form one of ours are missing.
    """
    state: dict[str, Tensor] = {}
    for ours, theirs in keys.items():
        for kind in ("weight", "bias"):
            parts = [tensors[f"{name}.{kind}"] for name in theirs if f"{name}.{kind}" in tensors]
            if parts and len(parts) < len(theirs):
                raise ValueError(f"of {theirs} some have no {kind}")
            if parts:
                state[f"{prefix}{ours}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return state


def unet_keys(config: UNetConfig, image_px: int) -> Keys:
    """Module names of a UNet, ours -> theirs, in the order of ``UNet.down``, ``middle`` and ``up``."""
    keys: Keys = {
        "timestep.expand": ("time_embedding.linear_1",),
        "timestep.project": ("time_embedding.linear_2",),
        "conv_in": ("conv_in",),
        "norm_out": ("conv_norm_out",),
        "conv_out": ("conv_out",),
    }
    num_levels, attends = len(config.channel_mults), _levels_with_attention(config, image_px)
    place = 0
    for level in range(num_levels):
        for number in range(config.num_res_blocks):
            keys |= _stage(f"down.{place}", f"down_blocks.{level}", number, attends=attends[level])
            place += 1
        if level + 1 < num_levels:
            keys |= _block(f"down.{place}.block", f"down_blocks.{level}.downsamplers.0")
            place += 1
    keys |= _stage("middle.0", "mid_block", 0, attends=any(attends))
    keys |= _stage("middle.1", "mid_block", 1, attends=False)
    place = 0
    for level in reversed(range(num_levels)):
        theirs = f"up_blocks.{num_levels - 1 - level}"
        for number in range(config.num_res_blocks + 1):
            keys |= _stage(f"up.{place}", theirs, number, attends=attends[level])
            place += 1
        if level > 0:
            keys |= _block(f"up.{place}.block", f"{theirs}.upsamplers.0")
            place += 1
    return keys


def unet_problems(config: UNetConfig) -> list[str]:
    """Fields that diffusers' UNets cannot hold, one message each."""
    problems: list[str] = []
    if config.patch_px != 1:
        problems.append(f"patch_px = {config.patch_px}: its UNets fold no pixels into channels; only 1 can be held")
    if config.position_bands != 0:
        problems.append(f"position_bands = {config.position_bands}: its UNets are given no places; only 0 can be held")
    if config.channel_mults[0] != 1:
        problems.append(f"channel_mults[0] = {config.channel_mults[0]}: its first level has the channels of conv_in")
    return problems


def unet_config(
    config: UNetConfig, image_px: int, out_channels: int, *, in_channels: int = 3, context_width: int | None = None
) -> Json:
    """The ``config.json`` of a UNet2DConditionModel, or of a UNet2DModel if there is no context."""
    attends = _levels_with_attention(config, image_px)
    down = [_ATTENDS["down"] if attention else _PLAIN["down"] for attention in attends]
    up = [_ATTENDS["up"] if attention else _PLAIN["up"] for attention in reversed(attends)]
    shared: Json = {
        "sample_size": image_px,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [config.channels * mult for mult in config.channel_mults],
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": _TIME_NORMS[config.time_norm],
        "dropout": config.dropout,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if context_width is None:
        return {"_class_name": "UNet2DModel", **shared, "add_attention": False}
    return {
        "_class_name": "UNet2DConditionModel",
        **shared,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": context_width,
        "attention_head_dim": config.head_channels,
        "class_embed_type": "identity",
    }


def from_unet_config(name: str, layout: Json) -> tuple[UNetConfig, int, int]:
    """Our configuration of a UNet, its picture side in pixels and its output channels.

    Raises:
        ValueError: If the UNet has another architecture; names the fields that differ.
    """
    conditional = layout.get("_class_name") == "UNet2DConditionModel"
    expected = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}
    expected |= (
        {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "class_embed_type": "identity",
            "only_cross_attention": False,
            "in_channels": 3,
        }
        if conditional
        else {"_class_name": "UNet2DModel", "add_attention": False, "in_channels": 6}
    )
    others = {key: layout[key] for key, value in expected.items() if key in layout and layout[key] != value}
    channels, image_px = list(layout["block_out_channels"]), int(layout["sample_size"])
    down, up = list(layout["down_block_types"]), list(layout["up_block_types"])
    attends = [kind == _ATTENDS["down"] for kind in down]
    expected_down = [_ATTENDS["down"] if attention else _PLAIN["down"] for attention in attends]
    expected_up = [_ATTENDS["up"] if attention else _PLAIN["up"] for attention in reversed(attends)]
    others |= {} if (down, up) == (expected_down, expected_up) else {"down_block_types": down, "up_block_types": up}
    others |= {} if all(c % channels[0] == 0 for c in channels) else {"block_out_channels": channels}
    if others:
        raise ValueError(f"{name}: this unclip has no UNet with {others}")
    sides = [image_px // 2**level for level in range(len(channels))]
    config = UNetConfig(
        channels=channels[0],
        channel_mults=tuple(c // channels[0] for c in channels),
        num_res_blocks=layout["layers_per_block"],
        attention_resolutions=tuple(side for side, attention in zip(sides, attends, strict=True) if attention),
        head_channels=layout["attention_head_dim"] if conditional else 64,
        norm_groups=layout.get("norm_num_groups", 32),
        time_norm="scale_shift" if layout.get("resnet_time_scale_shift") == "scale_shift" else "add",
        dropout=layout.get("dropout", 0.0),
    )
    return config, image_px, layout["out_channels"]


def _levels_with_attention(config: UNetConfig, image_px: int) -> list[bool]:
    return [side in config.attention_resolutions for side in config.level_sides_px(image_px)]


def _stage(ours: str, theirs: str, number: int, *, attends: bool) -> Keys:
    keys = _block(f"{ours}.block", f"{theirs}.resnets.{number}")
    if attends:
        place = f"{theirs}.attentions.{number}"
        keys |= {f"{ours}.attention.{name}": tuple(f"{place}.{n}" for n in names) for name, names in _ATTENTION.items()}
    return keys


def _block(ours: str, theirs: str) -> Keys:
    return {f"{ours}.{name}": (f"{theirs}.{their_name}",) for name, their_name in _BLOCK.items()}

"""Activation checkpointing: memory for time, with the same numbers (arXiv:1604.06174)."""

from __future__ import annotations

from torch import nn

from models.layers.transformer import CausalTransformer
from models.layers.unet import Stage


def set_checkpointing(network: nn.Module, *, enabled: bool) -> int:
    """Recompute the stages of every UNet and the blocks of every transformer in the backward pass, or keep them.

    Returns:
        How many modules of ``network`` can be told; 0 means that it keeps its activations whatever is asked.
    """
    told = [module for module in network.modules() if isinstance(module, Stage | CausalTransformer)]
    for module in told:
        module.checkpointing = enabled
    return len(told)

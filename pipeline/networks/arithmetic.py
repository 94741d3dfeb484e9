"""In which numbers networks compute when they are sampled: float32, TF32, bfloat16 or float16; compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.networks.kind import AnyKind
from pipeline.recipe.sections import Precision

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """How the networks of a cascade compute."""

    precision: Precision = "float32"
    """Of the products in a step of a network; samplers, CLIP and the autoregressive prior stay in float32."""
    compiled: bool = False
    """Whether the networks of diffusion are compiled, once for batches of any size."""

    def set_up(self) -> None:
        """Set this process's float32 arithmetic on GPUs; torch's own default rounds the factors of convolutions."""
        has_tf32 = self.precision == "tf32"
        torch.set_float32_matmul_precision("high" if has_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = has_tf32

    def prepare(self, network: nn.Module, kind: AnyKind, device: torch.device | str) -> None:
        """Let a network on its device compute like this from now on."""
        device_type = torch.device(device).type
        if kind.channels_last and device_type == "cuda":
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in the stubs)
        if self.precision in _HALVES:
            network.forward = _in_half(network.forward, device_type, _HALVES[self.precision])
        if self.compiled:
            for module in kind.compiled(network):
                module.compile(dynamic=True)


def _in_half(forward: Callable[..., Tensor], device_type: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device_type, dtype):
            return forward(*args, **kwargs).float()

    return call

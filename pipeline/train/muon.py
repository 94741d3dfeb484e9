"""Muon (K. Jordan, 2024, "Muon: an optimizer for hidden layers in neural networks"), and AdamW for the rest.

A kernel's momentum is replaced by the orthogonal matrix nearest to it, so that it moves equally far in every direction;
rare directions are then learned as soon as frequent ones. A kernel of C_out x C_in x k x k counts as a matrix
of C_out rows.
Legend: G kernels of one shape, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

MIN_SIDE = 32
"""Kernels with fewer rows or columns (the first layer of pixels, the last) stay with AdamW."""
_MOMENTUM = 0.95
_NUM_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd quintic that drives singular values from (0, 1] to about 1 (Jordan, 2024)."""
_RMS = 0.2
"""Root mean square of an update of rate one, which is about AdamW's (arXiv:2502.16982, section 2.2)."""


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``muon = True`` are moved by orthogonalised momentum instead.

    Args:
        groups: Parameter groups; those of Muon have parameters of two dimensions and more.
        **options: Options of AdamW; ``fused`` must be set, because its ``found_inf`` skips a step on the device.
    """

    found_inf: Tensor | None = None
    """1 if the gradients are not finite: the step then changes nothing, and the host does not wait for the device."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every group."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._move(group)

    def _move(self, group: dict[str, Any]) -> None:
        is_bad = torch.zeros(()) if self.found_inf is None else self.found_inf
        keep = is_bad.to(group["params"][0].device) == 0
        for kernels in _by_shape(group["params"]):
            momenta = torch.stack([self._momentum(kernel, keep) for kernel in kernels])
            rows, columns = momenta.shape[1:]
            rate = group["lr"] * _RMS * math.sqrt(max(rows, columns))
            updates = torch.where(keep, rate * orthogonal(momenta), 0.0)
            for kernel, update in zip(kernels, updates, strict=True):
                kernel.mul_(1 - group["lr"] * group["weight_decay"] * keep).sub_(update.view(kernel.shape))

    def _momentum(self, kernel: Tensor, keep: Tensor) -> Float[Tensor, "M N"]:
        """Update a kernel's momentum, and look one step ahead (Nesterov)."""
        assert kernel.grad is not None
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum: Tensor = state["momentum"]
        momentum.copy_(torch.where(keep, torch.lerp(kernel.grad, momentum, _MOMENTUM), momentum))
        return torch.lerp(kernel.grad, momentum, _MOMENTUM).flatten(1)


def orthogonal(matrices: Float[Tensor, "G M N"]) -> Float[Tensor, "G M N"]:
    """The nearest (semi-)orthogonal matrix of each, roughly: its singular values lie between about 0.7 and 1.2.

    Each iteration multiplies x from the left by p = a + b g + c g g, where g = x x^T; g then becomes p g p. So wide
    matrices (9 times as wide as high: 3 x 3 kernels) are multiplied twice in all, and their square g the other times.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram, factor = x @ x.mT, None
    for iteration in range(_NUM_ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if iteration + 1 < _NUM_ITERATIONS:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    x = factor @ x
    return x.mT if is_tall else x


def kernels_of(network: nn.Module) -> list[Tensor]:
    """The parameters that Muon updates: the weights of convolutions and linear layers, large enough on both sides."""
    return [
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and module.weight.requires_grad
        and min(module.weight.flatten(1).shape) >= MIN_SIDE
    ]


def _by_shape(kernels: list[Tensor]) -> Iterator[list[Tensor]]:
    """Kernels with gradients, those of one shape together: their products are then one batch."""
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for kernel in kernels:
        if kernel.grad is not None:
            shapes.setdefault((kernel.shape[0], kernel[0].numel()), []).append(kernel)
    yield from shapes.values()

"""Muon (K. Jordan, 2024, "Muon: an optimizer for hidden layers in neural networks"), and AdamW for the rest.

A kernel's momentum is replaced by the orthogonal matrix nearest to it, so that it moves equally far in every direction;
rare directions are then learned as soon as frequent ones. A kernel of C_out x C_in x k x k counts as a matrix
of C_out rows.
Legend: G kernels of one shape, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
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


@dataclass(frozen=True)
class MatrixShards:
    """Kernels of which each worker of a group has some rows, a run of them in the order of the workers."""

    group: torch.distributed.ProcessGroup
    num_rows: dict[Tensor, int]
    """M of each kernel, by this worker's part of it."""

    def orthogonal(self, parts: Sequence[Tensor], num_rows: int) -> Iterator[Tensor]:
        """This worker's rows of the orthogonal matrix of each; every worker of the group iterates over all of it.

        As many matrices as there are workers are gathered at a time, each by one worker, which computes its orthogonal
        matrix and sends the rows back.

        Args:
            parts: This worker's rows of each matrix, (m, N).
            num_rows: M.
        """
        rank, size = self.group.rank(), self.group.size()
        most = -(-num_rows // size)
        columns = parts[0].shape[1]
        lengths = [columns * max(0, min(most, num_rows - place * most)) for place in range(size)]
        for start in range(0, len(parts), size):
            some = parts[start : start + size]
            send_sizes = [some[0].numel() if place < len(some) else 0 for place in range(size)]
            receive_sizes = lengths if rank < len(some) else [0] * size
            matrix = self._exchange(torch.cat([part.flatten() for part in some]), send_sizes, receive_sizes)
            if rank < len(some):
                matrix = orthogonal(matrix.view(1, num_rows, columns)).flatten()
            yield from self._exchange(matrix, receive_sizes, send_sizes).view(len(some), -1, columns)

    def _exchange(self, tensor: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        out = tensor.new_empty(sum(receive_sizes))
        torch.distributed.all_to_all_single(out, tensor.contiguous(), receive_sizes, send_sizes, group=self.group)
        return out


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``muon = True`` are moved by orthogonalised momentum instead.

    Args:
        groups: Parameter groups; those of Muon have parameters of two dimensions and more.
        **options: Options of AdamW; ``fused`` must be set, because its ``found_inf`` skips a step on the device.
    """

    found_inf: Tensor | None = None
    """1 if the gradients are not finite: the step then changes nothing, and the host does not wait for the device.
    It is the same on every worker: those that exchange rows wait for each other."""
    shards: MatrixShards | None = None
    """Where the kernels' other rows are; None: every worker has all of them."""

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
        keep = None  # whether a tensor is to change, on the device
        if self.found_inf is not None and self.found_inf.device.type == "cpu":
            if self.found_inf:
                return
        elif self.found_inf is not None:
            keep = self.found_inf == 0
        for (rows, columns), kernels in self._by_shape(group["params"]):
            ahead = kernels[0].new_empty(len(kernels), kernels[0].shape[0], columns)
            for kernel, matrix in zip(kernels, ahead, strict=True):
                self._look_ahead(kernel, _shaped(matrix, kernel), keep)
            directions = orthogonal(ahead) if self.shards is None else self.shards.orthogonal(list(ahead), rows)
            rate = group["lr"] * _RMS * math.sqrt(max(rows, columns))
            for kernel, direction in zip(kernels, directions, strict=True):
                _subtract(
                    kernel, _shaped(direction.contiguous(), kernel), rate, group["lr"] * group["weight_decay"], keep
                )

    def _by_shape(self, kernels: list[Tensor]) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        """Kernels with gradients, those of one shape (M, N) together: their products are then one batch."""
        num_rows = {} if self.shards is None else self.shards.num_rows
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for kernel in kernels:
            if kernel.grad is not None:
                shape = (num_rows.get(kernel, kernel.shape[0]), math.prod(kernel.shape[1:]))
                shapes.setdefault(shape, []).append(kernel)
        yield from shapes.items()

    def _look_ahead(self, kernel: Tensor, ahead: Tensor, keep: Tensor | None) -> None:
        """Update a kernel's momentum, and write what it will be one step ahead (Nesterov) into ``ahead``."""
        assert kernel.grad is not None
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum: Tensor = state["momentum"]
        if keep is None:
            torch.lerp(kernel.grad, momentum, _MOMENTUM, out=momentum)
        else:
            momentum.copy_(torch.where(keep, torch.lerp(kernel.grad, momentum, _MOMENTUM), momentum))
        torch.lerp(kernel.grad, momentum, _MOMENTUM, out=ahead)


def _shaped(matrix: Float[Tensor, "M N"], kernel: Tensor) -> Tensor:
    """A contiguous matrix as a kernel, without a copy: its columns are in the order in which the kernel lies in memory.

    Which order that is changes nothing: the orthogonal matrix of the same columns in another order is the same, in that
    order.
    """
    return matrix.as_strided(kernel.shape, kernel.stride())


def _subtract(kernel: Tensor, direction: Tensor, rate: float, decay: float, keep: Tensor | None) -> None:
    """Let a kernel shrink by ``decay`` and move by ``rate`` against a direction; where ``keep`` is False, neither."""
    if keep is not None:
        kernel.mul_(1 - decay * keep).sub_(torch.where(keep, rate * direction, 0.0))
        return
    if decay:
        kernel.mul_(1 - decay)
    kernel.sub_(direction, alpha=rate)


def orthogonal(matrices: Float[Tensor, "G M N"]) -> Float[Tensor, "G M N"]:
    """The nearest (semi-)orthogonal matrix of each, roughly: its singular values lie between about 0.7 and 1.2.

    Each iteration multiplies x from the left by p = a + b g + c g g, where g = x x^T; g then becomes p g p. So wide
    matrices (9 times as wide as high: 3 x 3 kernels) are multiplied twice in all, and their square g the other times.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    gram, factor = x @ x.mT, None
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-14)
    gram = gram / squared_norm  # that of x / norm, which is not made: matrices are large, their squares small
    for iteration in range(_NUM_ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if iteration + 1 < _NUM_ITERATIONS:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    x = (factor / squared_norm.sqrt()) @ x
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

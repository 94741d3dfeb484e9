"""Counters for the operations and the saved activations of a network while it runs, also on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.clip_config import ClipDims
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import num_network_calls
from models.text import TextEncoding

_COUNTED = 2
"""Samples in the batch that is counted; one would be too few for the batch norms of CLIP's ResNet."""


class Counter(TorchDispatchMode):
    """Adds up the operations of every matrix product and convolution, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class FusedAttention(TorchFunctionMode):
    """Attention by ``kernel``, since torch keeps all weights of tensors without data.

    Args:
        kernel: An autograd function of (query, key, value).
    """

    def __init__(self, kernel: type[torch.autograd.Function]) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._kernel.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class CountedAttention(torch.autograd.Function):
    """The matrix products of attention and of its gradient; the other operations cost next to nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Two products, (B, H, S, C) each side."""
        out = (query @ key.mT) @ value
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Four products; a kernel that computes the weights again makes a fifth, which is not counted."""
        query, key, value, _ = ctx.saved_tensors
        weights = query.new_empty(*query.shape[:-1], key.shape[-2])
        by_weights = grads[0] @ value.mT
        return by_weights @ key, by_weights.mT @ query, weights.mT @ grads[0]


class Activations(contextlib.AbstractContextManager["Activations"]):
    """Adds up the memory that autograd saves for the backward pass, each piece once, without the parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._own = {identity_of(tensor) for tensor in [*network.parameters(), *network.buffers()]}
        self._counted: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.num_bytes = 0

    def __enter__(self) -> Activations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        identity = identity_of(tensor)
        if identity not in self._own and identity not in self._counted:
            self._counted[identity] = tensor  # alive, so that no other piece of memory gets its number
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor


def identity_of(tensor: Tensor) -> int:
    """A number of the tensor's memory, while it is alive."""
    storage: Any = tensor.untyped_storage()
    return int(storage._cdata)  # tensors without data have no address


@dataclass(frozen=True)
class Work:
    """The work of a network that is counted."""

    run: Callable[[int], Tensor]
    """(number of samples) -> something to differentiate: the forward pass of a training."""
    sampling_flops: float
    """Operations of all network calls for one result."""
    num_calls: int
    """Network calls of one chain; guidance doubles the items of each."""
    encode: Callable[[int], Any] | None = None
    """For a kind that contrasts: (number of samples) -> their ``Pairs``."""


def count(run: Callable[[], object]) -> float:
    """Operations of one call of ``run``."""
    with Counter() as counter:
        run()
    return counter.flops


def backward_in_modes(loss: Tensor) -> None:
    """The backward pass, with the modes that are entered also where blocks are run again.

    torch leaves a mode of functions while it handles ``Tensor.backward`` or ``torch.autograd.backward``, so a block
    that is recomputed would run other operations than it did in the forward pass. This asks their engine directly.
    """
    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]  (no other way in)
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def count_training_pass(network: nn.Module, run: Callable[[int], Tensor]) -> tuple[float, float]:
    """Operations of a forward and a backward pass of one sample, and the bytes saved between them."""
    network.train()
    with Counter() as counter:
        with Activations(network) as activations:
            loss = run(_COUNTED)
        backward_in_modes(loss)
    network.zero_grad(set_to_none=True)
    return counter.flops / _COUNTED, activations.num_bytes / _COUNTED


def count_forward_pass(run: Callable[[int], Tensor]) -> float:
    """Operations of a forward pass of one sample."""
    return count(lambda: run(_COUNTED)) / _COUNTED


def count_chain(
    network: nn.Module, diffusion: DiffusionConfig, sampler: SamplerConfig, make: Callable[[], Denoise], x: Tensor
) -> tuple[float, int]:
    """Operations and network calls of one whole chain.

    Args:
        network: The network; left in evaluation mode.
        diffusion: Its process.
        sampler: How it is sampled.
        make: Encodes the condition and returns the denoiser.
        x: Any tensor with the shape of one sample, (1, ...).
    """
    network.eval()
    calls = num_network_calls(sampler, Diffusion(diffusion))
    denoisers: list[Denoise] = []
    before = count(lambda: denoisers.append(make()))
    return before + calls * count(lambda: denoisers[0](x, first_steps(1))), calls


def full_captions(dims: ClipDims, size: int) -> TextEncoding:
    """``size`` captions of full length, all zeros."""
    length = dims.context_length
    return TextEncoding(
        pooled=torch.zeros(size, dims.embed_dim),
        hidden=torch.zeros(size, length, dims.text_width),
        mask=torch.ones(size, length, dtype=torch.bool),
        tokens=torch.zeros(size, length, dtype=torch.int64),
    )


def first_steps(size: int) -> Tensor:
    """Timestep 0 of ``size`` samples."""
    return torch.zeros(size, dtype=torch.int64)

"""The memory of a training worker before anything runs: against its GPU, and what would make it fit.

The network and its optimizer are built as torch's fake tensors, which have shapes, types and lifetimes but no data, and
one step is taken with them. What is alive at the same time is added up, so checkpointing, the copies of autocast and
the optimizer's temporaries count as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from models.layers.dropout import dropouts_of
from models.layers.ema import create_average, update_average
from models.layers.unet import set_checkpointing
from pipeline.clip import OpenClip
from pipeline.data.order import Share
from pipeline.networks.costs import build_clip
from pipeline.networks.counting import FusedAttention, identity_of
from pipeline.networks.table import kind_of
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.train.muon import Muon
from pipeline.train.state import create_optimizer

Json = dict[str, Any]

USABLE = 0.94
"""Share of a GPU's memory that tensors can have: CUDA's context, the kernels' workspaces and gaps between tensors take
the rest. An assumption."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker of one training at its peak."""

    name: str
    samples: int
    """Samples in one forward and backward pass."""
    weights: int
    gradients: int
    """Of DistributedDataParallel these are its buckets."""
    optimizer: int
    average: int
    buckets: int
    """The buckets beside the gradients, which several workers have while they add up parts of a batch."""
    clip: int
    """The frozen CLIP of a network that reads captions."""
    work: int
    """Activations, copies in half precision and temporaries, at their peak in one step."""
    gpu: int
    """Memory of the GPU that the recipe names; 0: none."""

    @property
    def state(self) -> int:
        """All that does not depend on the number of samples."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets + self.clip

    @property
    def total(self) -> int:
        """All together."""
        return self.state + self.work

    @property
    def fits(self) -> bool:
        """Whether the GPU has room for it; True if the recipe names none."""
        return not self.gpu or self.total <= USABLE * self.gpu

    def to_dict(self) -> Json:
        """All fields, the sums and the verdict."""
        return asdict(self) | {"state": self.state, "total": self.total, "fits": self.fits}


class LiveBytes(TorchDispatchMode):
    """Adds up the memory that is made inside of it and alive.

    Args:
        before: Tensors that are there already and do not count.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes = {identity_of(tensor): 0 for tensor in before}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        identity = identity_of(tensor)
        if identity in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[identity] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, identity)  # a storage in use keeps its Python object

    def _forget(self, identity: int) -> None:
        self.now -= self._sizes.pop(identity, 0)


def recipe_memory(recipe: Recipe) -> list[WorkerMemory]:
    """Memory of a worker of every training of a recipe.

    Raises:
        ConfigError: If the shape of the recipe's pretrained CLIP is not known on this machine.
    """
    with torch.device("meta"):
        frozen = build_clip(recipe)
    trained = {
        name: section
        for name, section in recipe.trained().items()
        if section.train.total_steps and not (section is recipe.clip and recipe.clip.source == "pretrained")
    }
    return [count_memory(name, section, recipe, frozen) for name, section in trained.items()]


def count_memory(name: str, section: TrainedSection, recipe: Recipe, frozen: OpenClip) -> WorkerMemory:
    """Memory of a worker of one training.

    Args:
        name: Its step.
        section: Its section of the recipe.
        recipe: The recipe.
        frozen: The recipe's CLIP, on the meta device.
    """
    resources, share = section.resources, _share(section)
    samples = share.largest_part(resources.micro_batch_size)
    is_divided = samples < share.largest
    kind = kind_of(section.model)
    with torch.device("meta"):
        clip = build_clip(recipe) if kind.name == "clip" else frozen
        network: nn.Module = clip.model if kind.name == "clip" else kind.create(section.model, clip.dims)
        average = create_average(network)
        run = None if kind.name == "clip" else kind.work(network, clip).run  # CLIP's holds pictures of its own
    with FakeTensorMode(), torch.device("cpu"), FusedAttention(_Attention):
        _make_fake(network)
        _make_fake(average)
        run = run or kind.work(network, clip).run
        network.train().requires_grad_(requires_grad=True)
        set_checkpointing(network, enabled=resources.checkpointing)
        step = _Step(network, average, create_optimizer(network, section.train), run, section.train.precision)
        stays = share.world_size > 1 or is_divided
        work = step.peak_bytes(samples, gradients_stay=stays)
        weights, gradients = _bytes_of([*network.parameters(), *network.buffers()]), _bytes_of(network.parameters())
        moments = _bytes_of(step.moments())
    return WorkerMemory(
        name=name,
        samples=samples,
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        average=weights,
        buckets=gradients if share.world_size > 1 and is_divided else 0,
        clip=_bytes_of([*frozen.model.parameters(), *frozen.model.buffers()]) if kind.captions else 0,
        work=max(0, work),
        gpu=round(resources.gpu_memory_gb * 1e9),
    )


def advice(memory: WorkerMemory, recipe: Recipe) -> str:
    """What would make a training fit that does not; each proposal is counted before it is made."""
    section, room = recipe.trained()[memory.name], USABLE * memory.gpu
    if memory.state > room:
        return f"its state alone is larger; a GPU of {_gb(memory.state / USABLE)} and more, or a smaller network"
    with torch.device("meta"):
        frozen = build_clip(recipe)
    can_checkpoint = not section.resources.checkpointing and kind_of(section.model).name != "clip"
    can_divide = getattr(section.model, "vision", "") != "resnet"
    sizes = [0, *(2**power for power in reversed(range(memory.samples.bit_length())))] if can_divide else [0]
    for checkpointing in (False, True) if can_checkpoint else (section.resources.checkpointing,):
        for size in sizes:
            resources = replace(
                section.resources,
                checkpointing=checkpointing,
                micro_batch_size=size or section.resources.micro_batch_size,
            )
            if count_memory(memory.name, replace(section, resources=resources), recipe, frozen).fits:
                changes = ["checkpointing = true"] if checkpointing and can_checkpoint else []
                return "resources: " + " and ".join(changes + ([f"micro_batch_size = {size}"] if size else []))
    return "more workers or a smaller batch" if not can_divide else "a larger GPU: not even one sample has room"


def format_memory(memories: list[WorkerMemory], recipe: Recipe) -> str:
    """A table for a terminal, with a sentence about each training that does not fit."""
    names = ("network", "samples", "weights", "gradients", "moments", "average", "CLIP", "work", "in all", "GPU")
    widths = (11, 9, 10, 10, 10, 10, 10, 10, 10, 10)
    rows = [names, *(_cells(memory) for memory in memories)]
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [
        "memory of a worker at its peak; samples: in one pass; gradients: with buckets; work: activations, copies in",
        f"half precision, temporaries. A training fits into {USABLE:.0%} of its GPU (resources.gpu_memory_gb).",
    ]
    for memory in memories:
        if not memory.fits:
            lines.append(
                f"{memory.name} does not fit: {_gb(memory.total)} of {_gb(USABLE * memory.gpu)}; "
                f"what would make it fit: {advice(memory, recipe)}"
            )
    return "\n".join(lines)


class _Attention(torch.autograd.Function):
    """It makes and keeps only what a fused kernel does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        del grads
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _share(section: TrainedSection) -> Share:
    return Share(section.train.batch_size, 0, section.resources.num_workers)


def _make_fake(network: nn.Module) -> None:
    """Replace the tensors of a network on the meta device by those of the active mode, on the CPU, in place."""
    fakes: dict[Tensor, Tensor] = {}
    for module in network.modules():
        own: Any = module  # its tensors by name, also where two modules share one
        for tensors in (own._parameters, own._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in fakes:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    fakes[tensor] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = None if tensor is None else fakes[tensor]


@dataclass
class _Step:
    """One step of a training with tensors that have no data."""

    network: nn.Module
    average: nn.Module
    optimizer: Muon
    run: Callable[[int], Tensor]
    precision: str

    def peak_bytes(self, size: int, *, gradients_stay: bool) -> int:
        """Most bytes alive in a step of ``size`` samples, without the state and the gradients.

        Args:
            size: Samples.
            gradients_stay: Whether the gradients are there before the pass begins: of the part before, or in the
                buckets of several workers.
        """
        if not self.optimizer.state:
            self._take(size)
        parameters = list(self.network.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if gradients_stay else None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = (*self.network.state_dict().values(), *self.average.state_dict().values(), *self.moments())
        with LiveBytes([*states, *gradients]) as live:
            self._take(size)
        return live.peak if gradients_stay else live.peak - _bytes_of(parameters)

    def moments(self) -> list[Tensor]:
        """The optimizer's tensors."""
        return [value for values in self.optimizer.state.values() for value in values.values()]

    def _take(self, size: int) -> None:
        for dropout in dropouts_of(self.network):
            dropout.keys = torch.zeros(size, 2, dtype=torch.int32)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.run(size)
        loss.float().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        update_average(self.average, self.network, 0.9, 1)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _cells(memory: WorkerMemory) -> tuple[str, ...]:
    gradients = memory.gradients + memory.buckets
    parts = (memory.weights, gradients, memory.optimizer, memory.average, memory.clip, memory.work, memory.total)
    gpu = _gb(memory.gpu) if memory.gpu else "not named"
    return (memory.name, str(memory.samples), *map(_gb, parts), gpu)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e7 else f"{count / 1e6:,.3g} MB"

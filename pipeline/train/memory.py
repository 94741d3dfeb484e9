"""The memory of a training worker before anything runs: against its GPU, and what would make it fit.

The network and its optimizer are built as torch's fake tensors, which have shapes, types and lifetimes but no data, and
one step is taken with them. What is alive at the same time is added up, so checkpointing, the copies of autocast and
the optimizer's temporaries count as they are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from models.layers.dropout import dropouts_of
from models.layers.ema import AveragePairs, create_average, update_average
from models.layers.unet import set_checkpointing
from pipeline.clip.model import OpenClip
from pipeline.data.order import Share
from pipeline.networks.contrast import Pairs, contrastive_loss, gradients_of, product, resized
from pipeline.networks.costs import build_clip, largest_share
from pipeline.networks.counting import FusedAttention, backward_in_modes, identity_of
from pipeline.networks.exchange import rows_of_all
from pipeline.networks.table import kind_of
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.recipe.train_sections import TrainConfig
from pipeline.train.muon import Muon
from pipeline.train.sharding import gathered_dtype
from pipeline.train.state import create_optimizer

Json = dict[str, Any]

USABLE = 0.94
"""Share of a GPU's memory that tensors can have: CUDA's context, the kernels' workspaces and gaps between tensors take
the rest. An assumption."""
_gather = partial(rows_of_all, exchanges=False)
_IN_FLOAT32 = frozenset(
    {
        "group_norm",
        "layer_norm",
        "softmax",
        "log_softmax",
        "interpolate",
        "mse_loss",
        "cross_entropy",
        "exp",
        "pow",
        "sum",
    }
)
"""Those of the functions that autocast computes in float32 on a GPU that networks use."""


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
    gathered: int
    """Of a divided state: the layers outside of the network's blocks, whole, and a few blocks on their way."""
    clip: int
    """The frozen CLIP of a network that reads captions, unless the embed step stored their token states."""
    work: int
    """Activations, copies in half precision and temporaries, at their peak in one step."""
    contrast: int
    """Of the work, what a contrastive loss takes however small the parts of a batch are: the features of all samples,
    and the logits of this worker's."""
    gpu: int
    """Memory of the GPU that the recipe names; 0: none."""

    @property
    def state(self) -> int:
        """All that does not depend on the number of samples."""
        own = self.weights + self.gradients + self.optimizer + self.average
        return own + self.buckets + self.gathered + self.clip

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


class GpuAutocast(TorchFunctionMode):
    """Under autocast, compute in float32 what a GPU does in float32: the count has tensors of a CPU, which does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_autocast_enabled("cpu") or getattr(func, "__name__", "") not in _IN_FLOAT32:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_to_float, (args, kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def count_memory(name: str, section: TrainedSection, recipe: Recipe, frozen: OpenClip) -> WorkerMemory:
    """Memory of a worker of one training, in that of its phases which takes most.

    Args:
        name: Its step.
        section: Its section of the recipe.
        recipe: The recipe.
        frozen: The recipe's CLIP, on the meta device.
    """
    counts = [_count_phase(name, section, recipe, frozen, precision) for precision in sorted(section.train.precisions)]
    return max(counts, key=lambda memory: memory.total)


def _count_phase(name: str, section: TrainedSection, recipe: Recipe, frozen: OpenClip, precision: str) -> WorkerMemory:
    """The same while the forward passes are computed in one precision."""
    resources, share = section.resources, largest_share(section)
    samples = share.largest_part(resources.samples_a_pass)
    kind = kind_of(section.model)
    with_images = kind.measures_pictures and not resources.validates_beside
    reads_states = recipe.embed.token_states and kind.takes_token_states
    clip_bytes = 0
    if kind.captions and (with_images or not reads_states):
        clip_bytes = _clip_bytes(frozen, section.train, with_images=with_images, with_text=not reads_states)
    with torch.device("meta"):
        clip = build_clip(recipe) if kind.name == "clip" else frozen
        network: nn.Module = clip.model if kind.name == "clip" else kind.create(section.model, clip.dims)
        average = create_average(network)
        work = None if kind.name == "clip" else kind.work(network, clip)  # CLIP's holds pictures of its own
    functions = GpuAutocast() if resources.accelerator == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(), torch.device("cpu"), FusedAttention(_Attention), functions:
        _make_fake(network)
        _make_fake(average)
        work = work or kind.work(network, clip)
        network.train().requires_grad_(requires_grad=True)
        set_checkpointing(network, enabled=resources.checkpointing)
        contrast = None
        if work.encode is not None:
            contrast = _Contrast(work.encode, share, share.parts(resources.samples_a_pass))
        step = _Step(network, average, create_optimizer(network, section.train), work.run, precision, contrast)
        step.make_moments()
        count = _count_whole if resources.shards == 1 else _count_divided
        parts = count(step, section, samples, kind.blocks(network))
        contrast_bytes = step.contrast_bytes(samples)
    return WorkerMemory(
        name=name,
        samples=samples,
        clip=clip_bytes,
        contrast=contrast_bytes,
        gpu=round(resources.gpu_memory_gb * 1e9),
        **parts,
    )


def _clip_bytes(frozen: OpenClip, config: TrainConfig, *, with_images: bool, with_text: bool) -> int:
    """Of the worker that measures pictures, where one does."""
    tensors = [
        tensor
        for name, tensor in (*frozen.model.named_parameters(), *frozen.model.named_buffers())
        if (with_images if name.startswith("visual.") else with_text or name.startswith("logit_"))
    ]
    if config.clip_precision == "float32":
        return _bytes_of(tensors)
    return sum(tensor.nbytes // 2 if tensor.is_floating_point() else tensor.nbytes for tensor in tensors)


def _count_whole(step: _Step, section: TrainedSection, samples: int, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """The parts of the memory of a worker that has the whole state."""
    del blocks
    share, network = largest_share(section), step.network
    is_divided = samples < share.largest
    has_buckets = section.resources.most_workers > 1
    work = step.peak_bytes(samples, gradients_stay=has_buckets or is_divided)
    weights, gradients = _bytes_of([*network.parameters(), *network.buffers()]), _bytes_of(network.parameters())
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": _bytes_of(step.moments()),
        "average": weights,
        "buckets": gradients if has_buckets and is_divided else 0,
        "gathered": 0,
        "work": max(0, work),
    }


def _count_divided(step: _Step, section: TrainedSection, samples: int, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """The parts of the memory of a worker that divides the state with others.

    While a block runs, the next is gathered: both with their copies on the way (FSDP gathers into one tensor and copies
    out of it), and in the backward pass the gradients of one are sent while those of the next are computed. That is
    counted by FSDP's rules and was never measured: on a CPU it cannot be seen (FSDP frees a block's memory and keeps
    its tensors), and no GPU has run a divided training.
    """
    network, num_shards = step.network, section.resources.shards
    own = sum(_part_bytes(parameter, num_shards) for parameter in network.parameters())
    moments = sum(_part_bytes(moment, num_shards) for moment in step.moments())
    whole, buffers = _bytes_of(network.parameters()), _bytes_of(network.buffers())
    in_blocks: set[Tensor] = {parameter for block in blocks for parameter in block.parameters()}
    largest = max((sum(parameter.numel() for parameter in block.parameters()) for block in blocks), default=0)
    dtype = gathered_dtype(section.train, section.resources.accelerator)
    step.gather_blocks(in_blocks, dtype)
    outside = _bytes_of(parameter for parameter in network.parameters() if parameter.dtype == torch.float32)
    if dtype == torch.float32:
        outside = whole - _bytes_of(in_blocks)
    work = step.divided_peak_bytes(samples)
    return {
        "weights": own + buffers,
        "gradients": own,
        "optimizer": moments,
        "average": own + buffers,
        "buckets": 0,
        "gathered": outside + largest * (3 * dtype.itemsize + 2 * torch.float32.itemsize),
        "work": max(work, whole),  # the first worker gathers the average to publish it
    }


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


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


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
class _Contrast:
    """The contrastive loss of a worker's share, with no other worker there."""

    encode: Callable[[int], Pairs]
    share: Share
    parts: Sequence[slice]
    """Of the share; none is larger than the last."""

    def loss(self) -> Tensor:
        """Of the whole share in one pass."""
        return contrastive_loss(self.encode(len(self.share)), self.share, _gather)

    def gradients(self, pairs: Pairs) -> tuple[list[Pairs], list[Pairs]]:
        """The features of all parts, each of the kind of these, and the gradients by them; see ``make_accumulate``."""
        features = [resized(pairs, part.stop - part.start) for part in self.parts]
        return features, gradients_of(features, self.share, 1.0, _gather)[1]


@dataclass
class _Step:
    """One step of a training with tensors that have no data."""

    network: nn.Module
    average: nn.Module
    optimizer: Muon
    run: Callable[[int], Tensor]
    precision: str
    contrast: _Contrast | None
    """For a kind that contrasts."""

    def peak_bytes(self, size: int, *, gradients_stay: bool) -> int:
        """Most bytes alive in a step of ``size`` samples, without the state and the gradients.

        Args:
            size: Samples.
            gradients_stay: Whether the gradients are there before the pass begins: of the part before, or in the
                buckets of several workers.
        """
        parameters = list(self.network.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if gradients_stay else None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = (*self.network.state_dict().values(), *self.average.state_dict().values(), *self.moments())
        with LiveBytes([*states, *gradients]) as live:
            self.take(size)
        return live.peak if gradients_stay else live.peak - _bytes_of(parameters)

    def make_moments(self) -> None:
        """Let the optimizer make its tensors, for which it needs gradients and no pass."""
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> list[Tensor]:
        """The optimizer's tensors."""
        return [value for values in self.optimizer.state.values() for value in values.values()]

    def gather_blocks(self, parameters: set[Tensor], dtype: torch.dtype) -> None:
        """Give parameters the type in which they are gathered, and free their gradients as soon as they are there."""
        for module in self.network.modules():
            own: Any = module
            for name, parameter in own._parameters.items():
                if parameter in parameters:
                    own._parameters[name] = gathered = nn.Parameter(parameter.detach().to(dtype))
                    gathered.register_post_accumulate_grad_hook(_free_gradient)
            if hasattr(module, "get_cast_dtype"):  # open_clip asks a block; the rows that it has are float32
                own.get_cast_dtype = lambda: torch.float32

    def divided_peak_bytes(self, size: int) -> int:
        """Most bytes alive in the passes of ``size`` samples, without the state."""
        self.optimizer.zero_grad(set_to_none=True)
        with LiveBytes([*self.network.parameters(), *self.network.buffers()]) as live:
            self._pass(size)
        return live.peak

    def take(self, size: int) -> None:
        """One step of ``size`` samples.

        Two copies of a kernel, of one at a time, are not counted: Muon makes them on a GPU alone, where it can skip a
        step that is not finite without the host.
        """
        self._pass(size)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        update_average(AveragePairs.of(self.average, self.network), 0.9, 1)

    def contrast_bytes(self, size: int) -> int:
        """Most bytes of features and logits; of a kind that does not contrast none."""
        if self.contrast is None:
            return 0
        pairs = self._features(self.contrast, size)
        with LiveBytes(pairs[:2]) as live:
            self.contrast.gradients(pairs)
        return live.peak

    def _pass(self, size: int) -> None:
        """The largest part of a share; of a contrastive loss after that of the features of all parts."""
        contrast, parts = self.contrast, None
        if contrast is not None and size < len(contrast.share):
            parts = contrast.gradients(self._features(contrast, size))
        self._set_dropout(size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            if contrast is None:
                loss = self.run(size)
            elif parts is None:
                loss = contrast.loss()
            else:
                _features, gradients = parts
                loss = product(contrast.encode(size), gradients[-1])
        backward_in_modes(loss.float())

    @torch.no_grad()
    def _features(self, contrast: _Contrast, size: int) -> Pairs:
        """Of one part, without a graph."""
        self._set_dropout(size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            return contrast.encode(size)

    def _set_dropout(self, size: int) -> None:
        for dropout in dropouts_of(self.network):
            dropout.keys = torch.zeros(size, 2, dtype=torch.int32)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _part_bytes(tensor: Tensor, num_shards: int) -> int:
    """Bytes of one worker's rows."""
    return tensor.nbytes if tensor.ndim == 0 else -(-len(tensor) // num_shards) * tensor[:1].nbytes


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

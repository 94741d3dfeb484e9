"""The state of a training divided among its workers (FSDP2), applied to a network from outside.

Each worker keeps some rows of every parameter, and of its gradient, average and moments. A block of the network is
gathered when it is run, and freed again. Legend: S workers that share one copy of the state, R copies.
"""

from __future__ import annotations

import copy
import datetime
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # pyright: ignore[reportPrivateUsage]
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.recipe.train_sections import TrainConfig, TrainResources
from pipeline.train.muon import MatrixShards, kernels_of

_REPLICAS, _SHARDS = "replicas", "shards"


@dataclass(frozen=True)
class Sharding:
    """How the state of one training is divided among its workers."""

    mesh: DeviceMesh
    """Workers (R, S)."""
    network: nn.Module
    """The network in training; its parameters are gathered only while they are used."""
    part: nn.Module
    """The same modules with this worker's rows as parameters, and the network's own buffers. It cannot run."""
    shell: nn.Module
    """The same modules, whose parameters have no data."""
    kernels: list[str]
    """The parameters that Muon would move."""
    shapes: dict[str, list[int]]
    """Whole shapes of the parameters that are divided, by name."""

    @property
    def is_first(self) -> bool:
        """Whether this worker has what is gathered."""
        return torch.distributed.get_rank() == 0

    @property
    def matrices(self) -> MatrixShards:
        """How the kernels of this worker's part become whole matrices."""
        num_rows: dict[Tensor, int] = {self.part.get_parameter(name): self.shapes[name][0] for name in self.kernels}
        return MatrixShards(self.mesh[_SHARDS].get_group(), num_rows)

    def clip_gradients(self, largest: float) -> Tensor:
        """Hand the gradients over to ``part``, and scale them to a norm of at most ``largest``.

        Returns:
            Their norm before, over all workers, a number.
        """
        own = list(self._take_gradients())
        squares = nn.utils.get_total_norm(own).square()
        torch.distributed.all_reduce(squares, group=self.mesh[_SHARDS].get_group())
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(self.part.parameters(), largest, norm)
        return norm

    def _take_gradients(self) -> Iterator[Tensor]:
        """Move the gradients; yields those that this worker adds to the norm."""
        for whole, part in zip(self.network.parameters(), self.part.parameters(), strict=True):
            gradient, whole.grad = whole.grad, None
            if gradient is None:
                continue
            if isinstance(gradient, DTensor):
                part.grad = gradient.to_local()
                yield part.grad
                continue
            # FSDP leaves numbers without dimensions to us: every worker has them.
            torch.distributed.all_reduce(gradient)
            part.grad = gradient / torch.distributed.get_world_size()
            if self.mesh[_SHARDS].get_local_rank() == 0:
                yield part.grad

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors of which each worker has the rows of its parameters; every worker calls this.

        Args:
            parts: By the name of the parameter, or of a buffer, which is whole already.

        Returns:
            On the first worker the whole tensors, on the CPU; on the others nothing.
        """
        tensors: dict[str, Tensor] = {}
        for name, part in parts.items():
            tensor = self._gather(part, self.shapes[name][0]) if name in self.shapes else part
            if self.is_first:
                tensors[name] = tensor.cpu()
        return tensors

    def _gather(self, rows: Tensor, num_rows: int) -> Tensor:
        size = self.mesh[_SHARDS].size()
        most = -(-num_rows // size)
        padded = rows.new_zeros(most, *rows.shape[1:])  # a collective wants equal shapes
        padded[: len(rows)] = rows
        whole = rows.new_empty(most * size, *rows.shape[1:])
        torch.distributed.all_gather_single(whole, padded, group=self.mesh[_SHARDS].get_group())
        return whole[:num_rows]

    def gather_network(self, part: nn.Module) -> nn.Module | None:
        """The whole network of which every worker has a part, on the first worker; every worker calls this."""
        tensors = self.gather(part.state_dict())
        if not self.is_first:
            return None
        network = copy.deepcopy(self.shell)
        network.load_state_dict(tensors, assign=True)
        device = next(part.parameters()).device
        return network.to(device).eval().requires_grad_(requires_grad=False)

    @property
    def place(self) -> tuple[int, int]:
        """Which part of the state this worker has, from 0, and how many there are."""
        shards = self.mesh[_SHARDS]
        return shards.get_local_rank(), shards.size()

    @property
    def writes(self) -> bool:
        """Whether this worker's part is written; its copies on other workers are not."""
        return self.mesh[_REPLICAS].get_local_rank() == 0

    def rows(self, name: str) -> slice | None:
        """The rows that this worker has of a divided parameter; None for any other name."""
        if name not in self.shapes:
            return None
        num_rows, (number, num_parts) = self.shapes[name][0], self.place
        most = -(-num_rows // num_parts)
        return slice(min(number * most, num_rows), min((number + 1) * most, num_rows))


def create_mesh(resources: TrainResources, device: torch.device, world_size: int) -> DeviceMesh | None:
    """The workers (R, S) of a training whose state is divided; None if each has all of it.

    Groups of a part of the workers would wait as long as torch's default says (10 min with NCCL, 30 with gloo) for one
    that hangs, whatever the recipe allows.
    """
    shards = resources.shards_of(world_size)
    if shards == 1:
        return None
    copies = (world_size // shards, shards)
    mesh = init_device_mesh(device.type, copies, mesh_dim_names=(_REPLICAS, _SHARDS))
    for name in (_REPLICAS, _SHARDS):
        _set_pg_timeout(datetime.timedelta(seconds=resources.hang_timeout_s), mesh[name].get_group())
    return mesh


def shard(
    objective: nn.Module,
    network: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    config: TrainConfig,
    device: torch.device,
) -> Sharding:
    """Divide a network among workers: the blocks first, then what is left.

    The weights come from the first worker, one parameter after another: nobody else builds them, and no device ever has
    more of them than its rows and one whole parameter.

    Under bfloat16 a GPU gathers the blocks in it, and their gradients are added up in float32. What is outside of them
    (temperatures, positions, the first and the last layer) is gathered in float32.

    Args:
        objective: The loss module around the network: calling it gathers and frees.
        network: On the first worker with its weights, on the CPU; the others' have shapes alone, or are not looked at.
        blocks: Its modules that are gathered one after another; an inner one before the one around it.
        mesh: The workers.
        config: Precision of the forward pass, in all phases.
        device: Where the network is trained.
    """
    _keep_pictures_channels_last(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP has no other memory order
    shell, kernels = _without_data(network), {id(kernel) for kernel in kernels_of(network)}
    names = [name for name, parameter in network.named_parameters() if id(parameter) in kernels]
    tensors = dict(_tensors_of(network)) if torch.distributed.get_rank() == 0 else {}
    network.to("meta")
    numbers = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    own = mesh if mesh.shape[0] > 1 else mesh[_SHARDS]
    policy = MixedPrecisionPolicy(
        param_dtype=gathered_dtype(config, device.type), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A linear layer returns a view; no network of ours changes the output of a block in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=own, mp_policy=policy, ignored_params=numbers)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(objective, mesh=own, mp_policy=whole, ignored_params=numbers)
    objective.to_empty(device=device)
    _hand_out(tensors, network, device)
    shapes = {name: list(whole.shape) for name, whole in network.named_parameters() if isinstance(whole, DTensor)}
    return Sharding(mesh, network, _part(network, shell), shell, names, shapes)


def gathered_dtype(config: TrainConfig, device_type: str) -> torch.dtype:
    """The type in which the blocks of a divided network are gathered: half on a GPU, where every phase computes in it.

    On a CPU autocast leaves norms as they are, and these take no input in float32 with weights in half precision.
    """
    return torch.bfloat16 if config.precisions == {"bfloat16"} and device_type == "cuda" else torch.float32


def is_sharded(objective: nn.Module) -> bool:
    """Whether a loss module gathers its parameters from other workers, so that all must call it equally often."""
    return isinstance(objective, FSDPModule)


def _keep_pictures_channels_last(network: nn.Module) -> None:
    """Let the activations keep the order that kernels give them where these have it: masks of dropout depend on it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_contiguous():
            module.register_forward_pre_hook(_channels_last)


def _channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def _without_data(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters have shapes alone; its buffers are copied."""
    empty = {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in network.parameters()}
    memo: dict[int, object] = dict(empty)
    return copy.deepcopy(network, memo)


def _tensors_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


@torch.no_grad()
def _hand_out(tensors: dict[str, Tensor], network: nn.Module, device: torch.device) -> None:
    """Fill a divided network with the first worker's tensors, which has each whole; frees them one after another."""
    for name, tensor in _tensors_of(network):
        whole = (
            tensors.pop(name).to(device) if tensors else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        )
        torch.distributed.broadcast(whole, src=0)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        _local(tensor).copy_(whole)


def _part(network: nn.Module, shell: nn.Module) -> nn.Module:
    part = copy.deepcopy(shell)
    modules = dict(part.named_modules())
    for name, parameter in network.named_parameters():
        place, _, last = name.rpartition(".")
        setattr(modules[place], last, nn.Parameter(_local(parameter).detach()))
    for name, module in network.named_modules():
        for last, buffer in module.named_buffers(recurse=False):
            setattr(modules[name], last, buffer)
    return part


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

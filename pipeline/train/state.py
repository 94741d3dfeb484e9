"""The state of one training, and its checkpoint: one safetensors file that holds all that a resumed run needs.

Layout of the file (docs/formats.md): ``network.<name>`` and ``ema.<name>`` are weights,
``optimizer.<parameter>.<key>`` the moments, ``report.loss_sum`` the losses since the last log line, ``draws.<name>``
the losses by which loss-aware timesteps are sampled. The header has the step, the format, and the key of the step that
the file belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.diffusion.timesteps import TimestepDraws
from models.layers.ema import create_average
from pipeline.errors import ResumeError
from pipeline.recipe.sections import TrainConfig
from pipeline.train.muon import Muon, kernels_of
from pipeline.workspace.store import LIVE, Artifact

FORMAT = "unclip-checkpoint-1"
CHECKPOINTS = f"{LIVE}checkpoints/"


@dataclass
class TrainState:
    """Everything that changes during a training."""

    network: nn.Module
    """The network in training, float32."""
    ema: nn.Module
    """Its moving average: what is saved and sampled from."""
    optimizer: Muon
    """AdamW, or Muon for the kernels and AdamW for the rest."""
    step: int = 0
    """Optimizer steps done."""
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Sum and number of the losses since the last log line, on the device."""
    bad_step: Tensor = field(default_factory=lambda: torch.full((), -1, dtype=torch.int64))
    """First step (1-based) whose loss or gradient was not finite, -1 if none, on the device: no update after it."""
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Norm of the last gradient before clipping, on the device."""
    draws: TimestepDraws | None = None
    """The distribution of a diffusion objective's timesteps; None for other objectives."""


def create_state(network: nn.Module, config: TrainConfig, device: torch.device) -> TrainState:
    """A state at step 0; weight decay is for matrices and kernels, not for biases, norms and single vectors."""
    network.to(device)
    ema = create_average(network)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kernels = kernels_of(network) if config.optimizer == "muon" else []
    of_muon = set(kernels)
    others = [parameter for parameter in parameters if parameter not in of_muon]
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay, "muon": True},
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay, "muon": False},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "muon": False},
    ]
    optimizer = Muon(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    state = TrainState(network, ema, optimizer)
    state.loss_sum, state.bad_step = state.loss_sum.to(device), state.bad_step.to(device)
    return state


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint inside its artifact."""
    return f"{CHECKPOINTS}{step:08d}.safetensors"


def save_checkpoint(state: TrainState, artifact: Artifact, digest: str, num_kept: int) -> None:
    """Publish the state and drop the oldest checkpoints beyond ``num_kept``.

    Args:
        state: The state.
        artifact: The artifact of the running step.
        digest: Key of the training: seed, configuration and inputs.
        num_kept: Newest checkpoints to keep.
    """
    tensors = {f"network.{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in _optimizer_tensors(state).items()}
    tensors["report.loss_sum"] = state.loss_sum
    if state.draws is not None:
        tensors |= {f"draws.{name}": tensor for name, tensor in state.draws.state_dict().items()}
    header = {"format": FORMAT, "step": str(state.step), "digest": digest}
    with artifact.write(checkpoint_name(state.step)) as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=header)
    for name in _checkpoints(artifact)[:-num_kept]:
        artifact.remove(name)


def load_newest_checkpoint(state: TrainState, artifact: Artifact, digest: str) -> bool:
    """Continue from the newest checkpoint that can be read; False if there is none.

    Raises:
        ResumeError: If it belongs to another configuration or does not fit the network.
    """
    for name in reversed(_checkpoints(artifact)):
        path = artifact.path(name)
        header = _read_header(path)
        if header is None:  # a file that another program cut short; ours are published whole
            continue
        if header.get("format") != FORMAT:
            raise ResumeError(
                f"{path}: format {header.get('format')}, this unclip reads {FORMAT}; remove it to start again"
            )
        if header.get("digest") != digest:
            raise ResumeError(f"{path}: was written under another recipe; remove {artifact.uri} to start again")
        _load(state, path)
        state.step = int(header["step"])
        return True
    return False


def _checkpoints(artifact: Artifact) -> list[str]:
    return [name for name in artifact.names() if name.startswith(CHECKPOINTS) and name.endswith(".safetensors")]


def _read_header(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return None


def _load(state: TrainState, path: Path) -> None:
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}, "report": {}, "draws": {}}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part, _, rest = name.partition(".")
            parts[part][rest] = file.get_tensor(name)
    try:
        state.network.load_state_dict(parts["network"])
        state.ema.load_state_dict(parts["ema"])
    except RuntimeError as error:
        raise ResumeError(f"{path}: does not fit the network: {error}") from error
    _load_optimizer(state, parts["optimizer"])
    state.loss_sum.copy_(parts["report"]["loss_sum"])
    if state.draws is not None:
        state.draws.load_state_dict(parts["draws"])


def _names(state: TrainState) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in state.network.named_parameters()}


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = _names(state)
    return {
        f"{names[parameter]}.{key}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    state.optimizer.state.clear()
    for parameter, name in _names(state).items():
        keys = [key for key in ("exp_avg", "exp_avg_sq", "momentum") if f"{name}.{key}" in tensors]
        # The fused kernel walks parameter and moments in memory order: they must have the same one.
        moments = {key: torch.empty_like(parameter).detach() for key in keys}
        for key, moment in moments.items():
            moment.copy_(tensors[f"{name}.{key}"])
        if f"{name}.step" in tensors:
            moments["step"] = tensors[f"{name}.step"].to(parameter.device, copy=True)
        if moments:
            state.optimizer.state[parameter] = moments

"""Checkpoints of a training: each is one safetensors file that shows by itself whether it is whole.

Layout (docs/formats.md): ``network.<name>`` and ``ema.<name>`` are weights, ``optimizer.<parameter>.<key>`` the
moments, ``report.loss_sum`` the losses since the last log line, ``report.num_bad`` the skipped steps, ``draws.<name>``
the losses by which loss-aware timesteps are sampled. The header has the step, the format, the key of the step that the
file belongs to, the network's configuration, and checksums of the tensors and of the header itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ConfigError, ResumeError
from pipeline.networks.files import network_content
from pipeline.train.state import TrainState
from pipeline.workspace.store import LIVE, Artifact

FORMAT = "unclip-checkpoint-2"
CHECKPOINTS = f"{LIVE}checkpoints/"
KEPT_STATE = "state/"
_EARLIER_FORMAT = "unclip-checkpoint-1"
_BEST = f"{LIVE}best.json"
_NUM_THREADS = 4

Json = dict[str, Any]


class DamagedCheckpointError(Exception):
    """A file that is no whole checkpoint; says why."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay while a training runs."""

    num_newest: int = 2
    """The newest ones, at least one."""
    best_by: str = ""
    """Besides them the best by this measure: of a loss the lowest, of any other measure the highest. Empty: none."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a whole checkpoint."""

    step: int
    digest: str
    """Key of the step that it belongs to."""
    network: Json
    """``config.json`` of its network."""
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors ``<name>.<rest>``, by their rest."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint inside its artifact."""
    return f"{CHECKPOINTS}{step:08d}.safetensors"


def state_name(step: int) -> str:
    """Name of the state that a finished training keeps."""
    return f"{KEPT_STATE}{step:08d}.safetensors"


def checkpoint_steps(artifact: Artifact) -> list[int]:
    """The steps of which an artifact has checkpoints, whole or not, the oldest first."""
    names = [name.removeprefix(CHECKPOINTS) for name in artifact.names() if name.startswith(CHECKPOINTS)]
    return sorted(int(stem) for stem in (name.removesuffix(".safetensors") for name in names) if stem.isdigit())


def save_checkpoint(
    state: TrainState,
    artifact: Artifact,
    digest: str,
    keep: Keep,
    measures: Mapping[str, float] | None = None,
) -> None:
    """Publish the state, and remove the checkpoints that are not to be kept.

    Args:
        state: The state.
        artifact: The artifact of the running step.
        digest: Key of the training: seed, configuration and inputs.
        keep: Which checkpoints stay.
        measures: Validation loss and measures of the state's average.

    Raises:
        ConfigError: If the best is to be kept by a measure that the training does not take.
    """
    write_state(state, artifact, checkpoint_name(state.step), digest)
    best = _note_best(artifact, state.step, keep.best_by, measures or {}) if keep.best_by else None
    earlier = [step for step in checkpoint_steps(artifact) if step <= state.step]  # later ones were found damaged
    steps_to_keep = {best, *earlier[-keep.num_newest :]}
    for step in checkpoint_steps(artifact):
        if step not in steps_to_keep:
            artifact.remove(checkpoint_name(step))


def write_state(state: TrainState, artifact: Artifact, name: str, digest: str) -> None:
    """Publish the state as a file with this name."""
    tensors = {
        f"{part}.{key}": tensor.detach().cpu().contiguous()
        for part, of_part in _state_tensors(state).items()
        for key, tensor in of_part.items()
    }
    header = {
        "format": FORMAT,
        "step": str(state.step),
        "digest": digest,
        "network": json.dumps(network_content(state.network)),
        "checksums": json.dumps(_checksums(tensors)),
    }
    with artifact.write(name) as path:
        save_file(tensors, path, metadata=header | {"seal": _seal(header)})


def load_newest_checkpoint(
    state: TrainState,
    artifact: Artifact,
    digest: str,
    warn: Callable[[str], None] = lambda _: None,
    *,
    last_step: int | None = None,
) -> bool:
    """Continue from the newest whole checkpoint; False if there is none at all.

    Args:
        state: The state to load into.
        artifact: The artifact of the running step, or of the training that it continues.
        digest: Key of that training.
        warn: Receives a sentence about each damaged checkpoint that is passed over.
        last_step: The newest step that may be taken; None: any.

    Raises:
        ResumeError: If a checkpoint belongs to another configuration or does not fit the network, if all of them are
            damaged (the work of days must not start again without a word), or all of them are later than ``last_step``.
    """
    steps, damages = _states(artifact), list[str]()
    for step, name in sorted(steps.items(), reverse=True):
        if last_step is not None and step > last_step:
            continue
        path = artifact.path(name)
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpointError as error:
            damages.append(f"{path}: {error}")
            warn(f"the checkpoint of step {step} is damaged ({error})")
            continue
        if checkpoint.digest != digest:
            raise ResumeError(f"{path}: was written under another recipe; remove {artifact.uri} to start again")
        _restore(state, checkpoint, path)
        return True
    if damages:
        raise ResumeError(
            f"no checkpoint is whole: {'; '.join(damages)}; bring one back from a copy, or remove "
            f"{artifact.uri}/{CHECKPOINTS} to start again"
        )
    if steps:
        raise ResumeError(
            f"{artifact.uri}: its first checkpoint is of step {min(steps)}, later than the phase that begins at step "
            f"{last_step}; let the phase begin there"
        )
    return False


def _states(artifact: Artifact) -> dict[int, str]:
    """The files of a training by their step: its checkpoints, and what a finished one kept."""
    states = [name for name in artifact.names() if name.startswith(KEPT_STATE)]
    names = [*states, *map(checkpoint_name, checkpoint_steps(artifact))]
    return {int(Path(name).stem): name for name in names}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and compare it with its checksums.

    Raises:
        DamagedCheckpointError: If the file is cut short or changed.
        ResumeError: If another release wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"it is cut short or not readable: {error}") from None
    if header.get("format") == _EARLIER_FORMAT:
        raise ResumeError(f"{path}: format {_EARLIER_FORMAT}, this unclip reads {FORMAT}; remove it to start again")
    seal = header.pop("seal", "")
    if seal != _seal(header):
        raise DamagedCheckpointError("its header does not match its checksum")
    if header["format"] != FORMAT:
        raise ResumeError(
            f"{path}: format {header['format']}, this unclip reads {FORMAT}; use the release that wrote it"
        )
    expected, actual = json.loads(header["checksums"]), _checksums(tensors)
    differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if differing:
        raise DamagedCheckpointError(f"{differing[0]} does not match its checksum")
    return Checkpoint(int(header["step"]), header["digest"], json.loads(header["network"]), tensors)


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A checksum of each tensor's bytes, shape and type."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:  # hashing large buffers releases the interpreter's lock
        return dict(zip(tensors, threads.map(_checksum, tensors.values()), strict=True))


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _seal(header: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode()).hexdigest()


def require_measure(name: str, measures: Mapping[str, float]) -> None:
    """Refuse a measure that a training does not take.

    Raises:
        ConfigError: Names those that it takes.
    """
    if name not in measures:
        names = ", ".join(measures) or "none, because there are no validation rows"
        raise ConfigError(f"resources.keep_best = {name!r}: the measures of this training are {names}")


def _note_best(artifact: Artifact, step: int, name: str, measures: Mapping[str, float]) -> int:
    """The step of the best checkpoint so far, this one included."""
    require_measure(name, measures)
    sign = 1 if name.endswith("loss") else -1
    this: Json = {"step": step, "value": measures[name], "by": name}
    if artifact.exists(_BEST):
        best: Json = artifact.read_json(_BEST)
        is_better = best["by"] == name and (math.isnan(this["value"]) or sign * best["value"] <= sign * this["value"])
        if is_better and artifact.exists(checkpoint_name(best["step"])):
            return int(best["step"])
    artifact.write_json(_BEST, this)
    return step


def _state_tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    draws = {} if state.draws is None else state.draws.state_dict()
    return {
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": _optimizer_tensors(state),
        "report": {"loss_sum": state.loss_sum, "num_bad": state.num_bad},
        "draws": draws,
    }


def _restore(state: TrainState, checkpoint: Checkpoint, path: Path) -> None:
    try:
        state.network.load_state_dict(checkpoint.part("network"))
        state.ema.load_state_dict(checkpoint.part("ema"))
    except RuntimeError as error:
        raise ResumeError(f"{path}: does not fit the network: {error}") from error
    _load_optimizer(state, checkpoint.part("optimizer"))
    state.loss_sum.copy_(checkpoint.tensors["report.loss_sum"])
    state.num_bad.copy_(checkpoint.tensors["report.num_bad"])
    if state.draws is not None:
        state.draws.load_state_dict(checkpoint.part("draws"))
    state.step = checkpoint.step


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

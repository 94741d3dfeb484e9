"""One checkpoint of a training: safetensors files that show by themselves whether they are whole.

Layout (docs/formats.md): ``network.<name>`` and ``ema.<name>`` are weights, ``optimizer.<parameter>.<key>`` the
moments, ``report.loss_sum`` the losses since the last log line, ``report.num_bad`` the skipped steps, ``draws.<name>``
the losses by which loss-aware timesteps are sampled. The header has the step, the format, the key of the step that the
file belongs to, the network's configuration, and checksums of the tensors and of the header itself.

A state that is divided among S workers is S files, each with some rows of every parameter. The first file has what is
not divided, and the checksums of the others' headers; it is written last, which makes it the commit of the checkpoint.
The files of one checkpoint alone in a folder are what ``torch.distributed.checkpoint`` reads as a sharded checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.allocator import is_out_of_memory
from pipeline.errors import DataError, ResumeError, StepError
from pipeline.networks.files import network_content
from pipeline.networks.tensor_file import open_tensors, save_tensors
from pipeline.recipe.initial_files import file_name
from pipeline.train.state import TrainState
from pipeline.workspace.store import Artifact

FORMAT = "unclip-checkpoint-2"
_EARLIER_FORMAT = "unclip-checkpoint-1"
_NUM_THREADS = 4
_POLL_S = 0.05

Json = dict[str, Any]
Rows = Callable[[str], "slice | None"]
"""The rows of a tensor that are read, by its name in its part of the state; None: all."""


class DamagedCheckpointError(Exception):
    """A file that is no whole checkpoint; says why."""


@dataclass(frozen=True)
class Snapshot:
    """What one worker writes of a state: copies on the CPU, which the training does not change any more."""

    step: int
    network: Json
    """``config.json`` of the network."""
    tensors: dict[str, Tensor]
    shapes: dict[str, list[int]]
    """Whole shapes of the divided tensors."""
    number: int
    """Which file of the checkpoint it becomes, from 0."""
    num_files: int

    @staticmethod
    def of(state: TrainState) -> Snapshot:
        """Copy what this worker writes."""
        tensors, sharding = _state_tensors(state), state.sharding
        number, num_files, shapes = 0, 1, dict[str, list[int]]()
        if sharding is not None:
            number, num_files = sharding.place
            for name in tensors:
                part, _, rest = name.partition(".")
                parameter = rest if part != "optimizer" else rest.rpartition(".")[0]
                if (
                    part in {"network", "ema", "optimizer"}
                    and parameter in sharding.shapes
                    and rest != f"{parameter}.step"
                ):
                    shapes[name] = sharding.shapes[parameter]
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
            if (name in shapes and tensor.numel()) or (name not in shapes and number == 0)
        }
        return Snapshot(state.step, network_content(state.network), copies, shapes, number, num_files)

    def publish(
        self, artifact: Artifact, name: str, digest: str, attempt: str = "", ends: Callable[[], bool] = lambda: False
    ) -> None:
        """Write this worker's file; the first worker's comes last, when the others' are there.

        Args:
            artifact: Where to write.
            name: Name of the first file.
            digest: Key of the training.
            attempt: What all workers of this start of the training have in common, and those of another have not.
            ends: Whether the training has failed, so that the others' files may never come.

        Raises:
            StepError: If the disk is full, the place cannot be written, or the training has failed.
        """
        header = {
            "format": FORMAT,
            "step": str(self.step),
            "digest": digest,
            "network": json.dumps(self.network),
            "checksums": json.dumps(_checksums(self.tensors)),
        }
        if self.num_files > 1:
            header |= {"shapes": json.dumps(self.shapes), "DCP_SHARDING_INFO": json.dumps(self._offsets())}
            if self.number == 0:
                header["seals"] = json.dumps(
                    [""]
                    + [
                        _wait_for_seal(artifact, file_name(name, number, self.num_files), attempt, ends)
                        for number in range(1, self.num_files)
                    ]
                )
        own, seal = file_name(name, self.number, self.num_files), _seal(header)
        artifact.write_whole(own, lambda path: save_tensors(self.tensors, path, header | {"seal": seal}))
        if self.number > 0:
            artifact.write_json(_record_name(own), {"attempt": attempt, "seal": seal})

    def file_names(self, name: str) -> set[str]:
        """What all workers write of it, by the name of its first file."""
        others = [file_name(name, number, self.num_files) for number in range(1, self.num_files)]
        return {name, *others, *map(_record_name, others)}

    def _offsets(self) -> dict[str, Json]:
        """Where each tensor lies in the whole one, as ``torch.distributed.checkpoint`` writes it."""
        return {
            name: {"saved_offsets": [self._first_row(name), *[0] * (tensor.ndim - 1)][: tensor.ndim]}
            for name, tensor in self.tensors.items()
        }

    def _first_row(self, name: str) -> int:
        return self.number * -(-self.shapes[name][0] // self.num_files) if name in self.shapes else 0


def _record_name(own: str) -> str:
    return own.replace(".safetensors", ".json")


def _wait_for_seal(artifact: Artifact, own: str, attempt: str, ends: Callable[[], bool]) -> str:
    """The checksum of another worker's file, as soon as it is there."""
    while not ends():
        if artifact.exists(_record_name(own)):
            record: Json = artifact.read_json(_record_name(own))
            if record["attempt"] == attempt:
                return str(record["seal"])
        time.sleep(_POLL_S)
    raise StepError(f"{artifact.uri}/{own}: its worker did not write it before the training ended")


class _File:
    """One file of a checkpoint, looked at and opened once: of an object store each look is a request.

    Raises:
        DamagedCheckpointError: If its header is cut short or changed.
        ResumeError: If another release wrote it.
        StepError, MemoryError: If the storage does not give it, or there is no memory for it: that is no damage.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tensors = open_tensors(path)
            header: dict[str, str] = dict(self._tensors.metadata() or {})
        except (FileNotFoundError, SafetensorError, ValueError, RuntimeError) as error:
            raise DamagedCheckpointError(f"it is cut short or not readable: {error}") from None
        self.header = _checked(header, path)
        """Without its checksum."""
        self.checksums: dict[str, str] = json.loads(self.header["checksums"])

    def tensor(self, name: str) -> Tensor:
        """A tensor, compared with its checksum.

        Raises:
            DamagedCheckpointError: If it is cut short or changed.
        """
        try:
            tensor: Tensor = self._tensors.get_tensor(name)
        except (SafetensorError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise DamagedCheckpointError(f"{self._path.name} is cut short or not readable: {error}") from None
        if _checksum(tensor) != self.checksums.get(name):
            raise DamagedCheckpointError(f"{name} does not match its checksum")
        return tensor


class Checkpoint:
    """A checkpoint that is there; its tensors are compared with their checksums when they are read.

    Args:
        artifact: The artifact of the running step.
        name: Name of its first file.

    Raises:
        DamagedCheckpointError: If the header is cut short or changed.
        ResumeError: If another release wrote it.
        StepError, MemoryError: If the storage does not give it, or there is no memory for it: that is no damage.
    """

    def __init__(self, artifact: Artifact, name: str) -> None:
        self._artifact, self._name = artifact, name
        first = _File(artifact.path(name))
        header = first.header
        self.step = int(header["step"])
        self.digest = header["digest"]
        """Key of the step that it belongs to."""
        self.network: Json = json.loads(header["network"])
        """``config.json`` of its network."""
        self._seals: list[str] = json.loads(header.get("seals", '[""]'))
        self._shapes: dict[str, list[int]] = json.loads(header.get("shapes", "{}"))
        self._files: dict[int, _File] = {0: first}
        self._opening = [threading.Lock() for _ in self._seals]

    def read(self, part: str, rows: Rows = lambda _: None) -> dict[str, Tensor]:
        """The tensors ``<part>.<rest>``, by their rest, with the rows that are asked for.

        Raises:
            DamagedCheckpointError: If one of them, or a file, is cut short, changed or missing.
        """
        start = f"{part}."
        names = [name.removeprefix(start) for name in self._files[0].checksums if name.startswith(start)]
        with ThreadPoolExecutor(_NUM_THREADS) as threads:  # hashing large buffers releases the interpreter's lock
            tensors = threads.map(lambda name: self._tensor(start + name, rows(name)), names)
            return dict(zip(names, tensors, strict=True))

    def _tensor(self, name: str, rows: slice | None) -> Tensor:
        if name not in self._shapes:
            whole = self._file(0).tensor(name)
            return whole if rows is None else whole[rows]
        num_rows = self._shapes[name][0]
        most = -(-num_rows // len(self._seals))
        rows = rows or slice(0, num_rows)
        pieces = [
            self._file(number).tensor(name)[max(0, rows.start - number * most) : rows.stop - number * most]
            for number in range(rows.start // most, -(-rows.stop // most))
        ]
        return torch.cat(pieces) if pieces else self._file(0).tensor(name)[:0]

    def _file(self, number: int) -> _File:
        with self._opening[number]:  # of several threads one fetches it
            if number not in self._files:
                self._files[number] = self._opened(number)
            return self._files[number]

    def _opened(self, number: int) -> _File:
        try:
            path = self._artifact.path(file_name(self._name, number, len(self._seals)))
        except DataError:
            raise DamagedCheckpointError(f"file {number + 1} of {len(self._seals)} is missing") from None
        file = _File(path)
        if _seal(file.header) != self._seals[number]:
            raise DamagedCheckpointError(f"{path.name} is of another checkpoint")
        return file


def _checked(header: dict[str, str], path: Path) -> dict[str, str]:
    """The header of a file, compared with its checksum and without it."""
    if header.get("format") == _EARLIER_FORMAT:
        raise ResumeError(f"{path}: format {_EARLIER_FORMAT}, this unclip reads {FORMAT}; move it away to start again")
    if header.pop("seal", "") != _seal(header):
        raise DamagedCheckpointError("its header does not match its checksum")
    if header["format"] != FORMAT:
        raise ResumeError(
            f"{path}: format {header['format']}, this unclip reads {FORMAT}; use the release that wrote it"
        )
    return header


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


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.network.named_parameters()}
    parts: dict[str, Mapping[str, Tensor]] = {
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": {
            f"{names[parameter]}.{key}": value
            for parameter, values in state.optimizer.state.items()
            for key, value in values.items()
        },
        "report": {"loss_sum": state.loss_sum, "num_bad": state.num_bad},
        "draws": {} if state.draws is None else state.draws.state_dict(),
    }
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def restore(state: TrainState, checkpoint: Checkpoint) -> Callable[[], None]:
    """Read what this worker needs of a checkpoint; the returned function puts it into the state.

    Raises:
        DamagedCheckpointError: If a part that is read is not whole.
    """
    rows: Rows = (lambda _: None) if state.sharding is None else state.sharding.rows
    weights = {part: checkpoint.read(part, rows) for part in ("network", "ema")}
    moments = checkpoint.read(
        "optimizer", lambda name: None if name.endswith(".step") else rows(name.rpartition(".")[0])
    )
    report, draws = checkpoint.read("report"), checkpoint.read("draws")

    def put() -> None:
        state.network.load_state_dict(weights["network"])
        state.ema.load_state_dict(weights["ema"])
        _load_optimizer(state, moments)
        state.loss_sum.copy_(report["loss_sum"])
        state.num_bad.copy_(report["num_bad"])
        if state.draws is not None:
            state.draws.load_state_dict(draws)
        state.step = checkpoint.step

    return put


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    state.optimizer.state.clear()
    for name, parameter in state.network.named_parameters():
        keys = [key for key in ("exp_avg", "exp_avg_sq", "momentum") if f"{name}.{key}" in tensors]
        # The fused kernel walks parameter and moments in memory order: they must have the same one.
        moments = {key: torch.empty_like(parameter).detach() for key in keys}
        for key, moment in moments.items():
            moment.copy_(tensors[f"{name}.{key}"])
        if f"{name}.step" in tensors:
            moments["step"] = tensors[f"{name}.step"].to(parameter.device, copy=True)
        if moments:
            state.optimizer.state[parameter] = moments

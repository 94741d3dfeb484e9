"""Checkpoints: damage is found and said, the one before is used; which ones stay."""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader

from pipeline.errors import ConfigError, ResumeError, StepError
from pipeline.networks import tensor_file
from pipeline.recipe.train_sections import TrainConfig
from pipeline.train import checkpoint as checkpoint_module
from pipeline.train import resume
from pipeline.train.checkpoint import Checkpoint, DamagedCheckpointError, Snapshot
from pipeline.train.results import BesideState, write_beside, write_result
from pipeline.train.resume import (
    CheckpointWriter,
    Damage,
    Keep,
    checkpoint_name,
    checkpoint_steps,
    load_newest_checkpoint,
    require_measure,
    save_checkpoint,
)
from pipeline.train.state import TrainState, create_state
from pipeline.workspace import disk
from pipeline.workspace.store import Artifact
from tests.tiny.storage import fail_calls


def _state(step: int = 0) -> TrainState:
    torch.manual_seed(step)
    state = create_state(nn.Linear(3, 2), TrainConfig(), torch.device("cpu"))
    state.network(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.step = step
    return state


def _saved(folder: Path, steps: tuple[int, ...] = (2, 4)) -> Artifact:
    artifact = Artifact(str(folder))
    for step in steps:
        save_checkpoint(_state(step), artifact, "key", Keep(len(steps)))
    return artifact


def _read(artifact: Artifact) -> None:
    checkpoint = Checkpoint(artifact, checkpoint_name(4))
    assert checkpoint.step == 4
    for part in ("network", "ema", "optimizer", "report", "draws"):
        checkpoint.read(part)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    artifact = _saved(tmp_path)
    path = artifact.path(checkpoint_name(4))
    whole = path.read_bytes()
    _read(artifact)
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError):
            _read(artifact)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    artifact = _saved(tmp_path)
    path, warnings = artifact.path(checkpoint_name(4)), list[Damage]()
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"flipped": flipped, "cut": whole[:-9], "empty": b""}[damage])
    state = _state()
    assert load_newest_checkpoint(state, artifact, "key", warnings.append)
    assert state.step == 2
    assert torch.equal(state.network.state_dict()["weight"], _state(2).network.state_dict()["weight"])
    assert [warning.step for warning in warnings] == [4]
    assert warnings[0].text.startswith("the checkpoint of step 4 is damaged (")


_NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", _NO_MEMORY)
@pytest.mark.parametrize("place", ["network", "tensor"])
def test_memory_that_does_not_suffice_for_a_checkpoint_is_no_fault_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    artifact, state, warnings = _saved(tmp_path), _state(), list[Damage]()

    def fail(*_: object) -> None:
        raise error

    if place == "network":
        monkeypatch.setattr(state.network, "load_state_dict", fail)
    else:
        opened = SimpleNamespace(metadata=safe_open(artifact.path(checkpoint_name(4)), "pt").metadata, get_tensor=fail)
        monkeypatch.setattr(checkpoint_module, "open_tensors", lambda _: opened)
    with pytest.raises(type(error)) as raised:
        load_newest_checkpoint(state, artifact, "key", warnings.append)
    assert raised.value is error
    assert warnings == []


def test_a_checkpoint_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    state = create_state(nn.Linear(4, 2), TrainConfig(), torch.device("cpu"))
    with pytest.raises(ResumeError, match="does not fit the network: Error"):
        load_newest_checkpoint(state, _saved(tmp_path), "key")


def test_a_training_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path: Path) -> None:
    artifact = _saved(tmp_path)
    for step in (2, 4):
        path = artifact.path(checkpoint_name(step))
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResumeError, match=r"no checkpoint is whole: .*00000004.*00000002.* to start again"):
        load_newest_checkpoint(_state(), artifact, "key")
    for step in (2, 4):
        artifact.remove(checkpoint_name(step))
    assert not load_newest_checkpoint(_state(), artifact, "key")


def test_a_checkpoint_of_an_earlier_release_is_refused_by_its_format(tmp_path: Path) -> None:
    artifact = _saved(tmp_path)
    path = artifact.path(checkpoint_name(4))
    save_file(load_file(path), path, metadata={"format": "unclip-checkpoint-1", "step": "4", "digest": "key"})
    with pytest.raises(ResumeError, match="format unclip-checkpoint-1, this unclip reads unclip-checkpoint-2"):
        load_newest_checkpoint(_state(), artifact, "key")


@pytest.mark.parametrize(("name", "best"), [("val_loss", 4), ("val_cos_z_image", 2)])
def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path: Path, name: str, best: int) -> None:
    artifact, keep = Artifact(str(tmp_path)), Keep(2, name)
    for step, value in ((2, 0.5), (4, 0.3), (6, 0.4), (8, 0.45), (10, 0.35)):
        _save_validated(artifact, keep, step, {name: value})
    assert checkpoint_steps(artifact) == [best, 8, 10]
    better = 0.1 if name == "val_loss" else 0.9
    for step, value in ((12, better), (14, 0.4), (16, 0.4)):
        _save_validated(artifact, keep, step, {name: value})
    assert checkpoint_steps(artifact) == [12, 14, 16]
    with pytest.raises(ConfigError, match=f"keep_best = 'val_psnr': the measures of this training are {name}"):
        require_measure("val_psnr", {name: value})


def _save_validated(artifact: Artifact, keep: Keep, step: int, measures: dict[str, float]) -> None:
    write_result(artifact, step, measures)
    save_checkpoint(_state(step), artifact, "key", keep)


def test_a_checkpoint_that_is_validated_beside_the_training_stays_until_it_is_known_whether_it_is_the_best(
    tmp_path: Path,
) -> None:
    artifact, keep = Artifact(str(tmp_path)), Keep(1, "val_loss")
    _save_validated(artifact, keep, 2, {"val_loss": 0.5})
    write_beside(artifact, BesideState(running=4))
    for step in (4, 6, 8):
        save_checkpoint(_state(step), artifact, "key", keep)
    assert checkpoint_steps(artifact) == [2, 4, 8]
    write_result(artifact, 4, {"val_loss": 0.4})
    write_beside(artifact, BesideState())
    save_checkpoint(_state(10), artifact, "key", keep)
    assert checkpoint_steps(artifact) == [4, 10]


def test_a_measure_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    artifact, keep = Artifact(str(tmp_path)), Keep(1, "val_loss")
    for step, value in ((2, float("nan")), (4, 0.3), (6, float("nan")), (8, 0.4)):
        _save_validated(artifact, keep, step, {"val_loss": value})
    assert checkpoint_steps(artifact) == [4, 8]


@pytest.mark.parametrize(("next_step", "left"), [(3, [2, 3, 4]), (4, [2, 4]), (5, [2, 5])])
def test_a_checkpoint_that_was_passed_over_stays_until_a_later_one_and_does_not_count_as_the_newest(
    tmp_path: Path, next_step: int, left: list[int]
) -> None:
    artifact, damages, state = _saved(tmp_path), list[Damage](), _state()
    path = artifact.path(checkpoint_name(4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert load_newest_checkpoint(_state(), artifact, "key", damages.append)
    with CheckpointWriter(artifact, "key", Keep(2), [damage.step for damage in damages]) as writer:
        writer.save(_state(next_step))
    assert checkpoint_steps(artifact) == left
    assert load_newest_checkpoint(state, artifact, "key", damages.append)
    assert state.step == next_step
    assert [damage.step for damage in damages] == ([4, 4] if next_step == 3 else [4])
    if next_step == 3:
        path.write_bytes(whole)  # it was the reading machine that was at fault
        assert load_newest_checkpoint(state, artifact, "key")
        assert state.step == 4


def test_a_checkpoint_that_was_passed_over_goes_when_the_training_is_beyond_it(tmp_path: Path) -> None:
    artifact = _saved(tmp_path)
    with CheckpointWriter(artifact, "key", Keep(2), [4]) as writer:
        for step in (3, 5, 7):
            writer.save(_state(step))
    assert checkpoint_steps(artifact) == [5, 7]


_ERRORS: tuple[Exception, ...] = (
    OSError("Stale file handle (os error 116)"),
    FileNotFoundError("No such file or directory: 00000004.safetensors"),
    RuntimeError("unable to open file <4> in read-only mode: Input/output error (5)"),
    SafetensorError("I/O error: Input/output error (os error 5)"),
)


"""What safetensors and torch say where the storage fails."""


@pytest.mark.parametrize("error", _ERRORS)
def test_a_checkpoint_that_storage_does_not_give_is_not_taken_for_a_damaged_one(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, state, calls = _saved(tmp_path), _state(), list[str]()

    def fail(path: Path, *arguments: Any) -> Any:
        calls.append(path.name)
        if len(calls) <= num_failures:
            raise error
        return safe_open(path, *arguments)

    num_failures = 1
    monkeypatch.setattr(tensor_file, "safe_open", fail)
    monkeypatch.setattr(disk, "_FIRST_WAIT_S", 0.01)
    assert load_newest_checkpoint(state, artifact, "key", lambda damage: pytest.fail(damage.text))
    assert state.step == 4
    assert calls == ["00000004.safetensors"] * 2
    num_failures = 99
    monkeypatch.setattr(disk, "_PATIENCE_S", 0.1)
    with pytest.raises(StepError, match=r"00000004\.safetensors: cannot be read: .*see that this storage"):
        load_newest_checkpoint(state, artifact, "key", lambda damage: pytest.fail(damage.text))
    assert checkpoint_steps(artifact) == [2, 4]


def test_a_checkpoint_that_cannot_be_opened_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = _saved(tmp_path)
    for code, words in ((errno.EACCES, "permission denied"), (errno.ESTALE, "Stale file handle: see that")):
        with monkeypatch.context() as patch:
            fail_calls(patch, "open", code=code, times=99, ends=("00000004.safetensors",))
            with pytest.raises(StepError, match=f"cannot be read: {words}"):
                load_newest_checkpoint(_state(), artifact, "key", lambda damage: pytest.fail(damage.text))


def test_no_memory_for_a_checkpoint_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = _saved(tmp_path)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("unable to mmap 512 bytes from file <4>: Cannot allocate memory (12)")

    monkeypatch.setattr(tensor_file, "safe_open", fail)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        load_newest_checkpoint(_state(), artifact, "key", lambda damage: pytest.fail(damage.text))


def test_later_checkpoints_that_were_not_seen_at_the_start_are_not_removed(tmp_path: Path) -> None:
    artifact, state = _saved(tmp_path, (4, 6)), _state()
    save_checkpoint(_state(2), artifact, "key", Keep(1))
    assert checkpoint_steps(artifact) == [2, 4, 6]
    assert load_newest_checkpoint(state, artifact, "key")
    assert state.step == 6


def test_what_a_kill_left_of_a_checkpoint_is_removed_by_the_next_start(tmp_path: Path) -> None:
    artifact = _saved(tmp_path)
    half, other = (tmp_path / place / ".tmp-0123-half" for place in ("live/checkpoints", "live"))
    half.write_bytes(b"half")
    other.write_bytes(b"of a process that may be alive")
    with CheckpointWriter(artifact, "key", Keep(1)):
        assert not half.exists()
    assert other.exists()


def test_workers_wait_until_storage_shows_all_of_them_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, views = _saved(tmp_path), list[str]()

    def gather(value: str) -> list[str]:
        views.append(value)
        return [value, "2"] if len(views) <= num_late else [value, value]

    num_late = 3
    monkeypatch.setattr(resume, "_gathered", gather)
    monkeypatch.setattr(resume, "_WAITS_S", (0.0,) * 4)
    assert load_newest_checkpoint(_state(), artifact, "key")
    assert views[:4] == ["2, 4"] * 4
    num_late = 99
    with pytest.raises(ResumeError, match=r"workers see different checkpoints \(steps 2 and 2, 4\)"):
        load_newest_checkpoint(_state(), artifact, "key")


@pytest.fixture
def divided(tmp_path: Path) -> tuple[Artifact, dict[str, torch.Tensor]]:
    """A checkpoint in three files of a parameter with seven rows, and what is in it."""
    whole = {"network.a": torch.randn(7, 2, 3), "network.b": torch.randn(2), "network.c": torch.tensor(3.0)}
    shapes = {"network.a": [7, 2, 3], "network.b": [2]}
    artifact = Artifact(str(tmp_path / "artifact"))
    for number in (2, 1, 0):
        cuts = {"network.a": slice(3 * number, 3 * number + 3), "network.b": slice(number, number + 1)}
        parts = {name: tensor[cuts[name]] if name in cuts else tensor for name, tensor in whole.items()}
        tensors = {name: part.clone() for name, part in parts.items() if number == 0 or (name in cuts and part.numel())}
        Snapshot(4, {}, tensors, shapes, number, 3).publish(artifact, checkpoint_name(4), "key", "attempt")
        assert checkpoint_steps(artifact) == ([4] if number == 0 else [])  # the first file is the commit
    return artifact, whole


def test_rows_are_read_from_the_files_that_have_them(divided: tuple[Artifact, dict[str, torch.Tensor]]) -> None:
    artifact, whole = divided
    first = checkpoint_name(4)
    for name in ("a", "b", "c"):
        assert torch.equal(Checkpoint(artifact, first).read("network")[name], whole[f"network.{name}"])
    for rows in (slice(0, 2), slice(2, 7), slice(4, 6), slice(7, 7)):
        read = Checkpoint(artifact, first).read("network", lambda name, rows=rows: rows if name == "a" else None)
        assert torch.equal(read["a"], whole["network.a"][rows])
    third = artifact.path(first.replace(".safetensors", ".3-of-3.safetensors"))
    content = third.read_bytes()
    third.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedCheckpointError, match=r"network\.a does not match its checksum"):
        Checkpoint(artifact, first).read("network")
    third.unlink()
    with pytest.raises(DamagedCheckpointError, match="file 3 of 3 is missing"):
        Checkpoint(artifact, first).read("network")


def test_a_file_of_another_attempt_is_not_taken_for_that_of_this_one(
    divided: tuple[Artifact, dict[str, torch.Tensor]],
) -> None:
    artifact, whole = divided
    first = checkpoint_name(4)
    shapes = {"network.a": [7, 2, 3]}
    other = {"network.a": whole["network.a"][3:6] + 1}
    Snapshot(4, {}, other, shapes, 1, 3).publish(artifact, first, "key", "another")
    with pytest.raises(DamagedCheckpointError, match=r"2-of-3\.safetensors is of another checkpoint"):
        Checkpoint(artifact, first).read("network")
    first_part = {"network.a": whole["network.a"][:3]}
    with pytest.raises(StepError, match=r"2-of-3\.safetensors: its worker did not write it"):
        Snapshot(4, {}, first_part, shapes, 0, 3).publish(
            artifact, first, "key", "attempt", iter([False, True]).__next__
        )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads all of it
def test_torch_reads_a_divided_checkpoint(divided: tuple[Artifact, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    artifact, whole = divided
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in artifact.names():
        if name.endswith(".safetensors"):
            (folder / name.rpartition("/")[2]).symlink_to(artifact.path(name))
    state = {name: torch.empty_like(tensor) for name, tensor in whole.items() if tensor.ndim > 0}
    checkpoint.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


def test_a_checkpoint_is_the_state_of_its_step_whatever_the_training_does_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, state, begun, goes_on = Artifact(str(tmp_path)), _state(2), threading.Event(), threading.Event()
    publish = Snapshot.publish

    def slowly(snapshot: Snapshot, *arguments: Any) -> None:
        begun.set()
        assert goes_on.wait(10)
        publish(snapshot, *arguments)

    monkeypatch.setattr(Snapshot, "publish", slowly)
    before = state.network.weight.detach().clone()  # pyright: ignore
    with CheckpointWriter(artifact, "key", Keep(1)) as writer:
        writer.save(state)
        assert begun.wait(10)
        assert not checkpoint_steps(artifact)  # the training goes on meanwhile
        with torch.no_grad():
            state.network.weight.zero_()  # pyright: ignore
        goes_on.set()
    assert checkpoint_steps(artifact) == [2]
    assert torch.equal(Checkpoint(artifact, checkpoint_name(2)).read("network")["weight"], before)


def test_a_checkpoint_that_storage_does_not_take_for_a_moment_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact(str(tmp_path))
    with monkeypatch.context() as patch:
        failed = fail_calls(patch, "fsync", code=errno.EIO, times=2)
        save_checkpoint(_state(4), artifact, "key", Keep(1))
        assert len(failed) == 2
    _read(artifact)
    assert [path.name for path in (tmp_path / "live/checkpoints").iterdir()] == ["00000004.safetensors"]


def test_a_checkpoint_that_cannot_be_written_stops_the_training_at_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise StepError("no space left")

    monkeypatch.setattr(Snapshot, "publish", fail)
    with CheckpointWriter(Artifact(str(tmp_path)), "key", Keep(1)) as writer:
        writer.save(_state(2))
        with pytest.raises(StepError, match="no space left"):
            writer.save(_state(4))

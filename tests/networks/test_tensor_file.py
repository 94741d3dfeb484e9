"""Files that safetensors reads, written tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import StepError
from pipeline.networks.tensor_file import save_tensors
from pipeline.workspace import local_files
from pipeline.workspace.store import Artifact

_TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def _tensors() -> dict[str, torch.Tensor]:
    numbers = torch.arange(12).reshape(3, 4)
    tensors = {f"b.{dtype}": numbers.to(dtype) for dtype in _TYPES}
    return tensors | {"a": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": numbers.float().T}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = _tensors()
    save_tensors(tensors, tmp_path / "a", {"format": "pt", "text": "\u00e9 \n"})
    read = load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", "text": "\u00e9 \n"}
    save_tensors(dict(reversed(tensors.items())), tmp_path / "b", {"format": "pt", "text": "\u00e9 \n"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_of_one_type_are_the_librarys_bytes(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((number, 3), float(number)) for number in range(1, 12)}
    save_tensors(tensors, tmp_path / "ours", {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_weights_are_not_read_for_their_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise AssertionError(f"{path} is read back")

    artifact = Artifact(str(tmp_path))
    with artifact.write("model.safetensors") as path:
        save_tensors(_tensors(), path, {})
    truth = Artifact(str(tmp_path)).describe("model.safetensors")
    monkeypatch.setattr(local_files, "sha256_of", fail)
    assert artifact.describe("model.safetensors") == truth


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))

    def write() -> None:
        with artifact.write("model.safetensors") as path:
            path.symlink_to("/dev/full")
            save_tensors(_tensors(), path, {})

    with pytest.raises(StepError, match="the disk is full"):
        write()
    assert artifact.names() == []

"""The state that a finished training keeps: its files, and what is said of one that is damaged."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.errors import ResumeError
from pipeline.recipe.train_sections import TrainConfig
from pipeline.train import resume
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.resume import CheckpointWriter, Keep, load_newest_checkpoint, state_name
from pipeline.train.state import TrainState, create_state
from pipeline.workspace.store import Artifact

STEP = 6


def _state() -> TrainState:
    state = create_state(nn.Linear(3, 2), TrainConfig(), torch.device("cpu"))
    state.network(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.step = STEP
    return state


def _keep(artifact: Artifact, num_files: int) -> None:
    """As so many workers do that divide the state; the first has all of it, to keep the test short."""
    for number in reversed(range(num_files)):
        state = _state()
        if num_files > 1:
            state.sharding = cast("Any", SimpleNamespace(place=(number, num_files), shapes={}, writes=True))
        CheckpointWriter(artifact, "key", Keep(1)).keep_state(state)


def test_a_state_is_not_committed_with_files_of_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_shared_by_all", lambda _: "attempt")
    artifact = Artifact(str(tmp_path))
    artifact.write_bytes("model.safetensors", b"weights")
    first = state_name(STEP)
    for num_files in (3, 2, 4, 1):
        _keep(artifact, num_files)
        parts = [first.replace(".", f".{number}-of-{num_files}.") for number in range(2, num_files + 1)]
        records = [part.replace(".safetensors", ".json") for part in parts]
        assert artifact.describe_files().keys() == {"model.safetensors", first, *parts, *records}
        assert Checkpoint(artifact, first).read("network").keys() == {"weight", "bias"}


def test_a_damaged_state_is_moved_from_where_it_is(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path / "training"))
    _keep(artifact, 1)  # the training was killed before its commit
    path = artifact.path(state_name(STEP))
    path.write_bytes(path.read_bytes()[:-1])
    words = rf"no checkpoint is whole: {path}: .*, or move {path.parent}/ away to start again"
    with pytest.raises(ResumeError, match=words):
        load_newest_checkpoint(_state(), artifact, "key")
    path.parent.rename(tmp_path / "away")
    assert not load_newest_checkpoint(_state(), artifact, "key")

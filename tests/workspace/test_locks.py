"""Locks of a disk on file systems that have none, or others."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import pytest

from pipeline.errors import StepError
from pipeline.init.doctor import check_workspace
from pipeline.workspace import cache, lock
from pipeline.workspace.lock import holder_of, in_use, locked_workspace, used_artifacts
from pipeline.workspace.store import Workspace

_flock = fcntl.flock


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(str(tmp_path / "workspace"))
    with (
        pytest.raises(StepError, match=rf"{workspace.root}: this file system has no locks \(.*\): mount it with locks"),
        locked_workspace(workspace, pytest.fail),
    ):
        pass
    with pytest.raises(StepError, match="this file system has no locks"):
        holder_of(workspace)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    with pytest.raises(StepError, match=rf"{tmp_path}/.*: this file system has no locks"), cache.temporary_file("a"):
        pass


@pytest.mark.usefixtures("no_locks")
def test_doctor_tries_a_lock(tmp_path: Path) -> None:
    finding = check_workspace(Workspace(str(tmp_path / "workspace")))
    assert (finding.state, "this file system has no locks" in finding.text) == ("problem", True)
    assert list(tmp_path.iterdir()) == []


def test_another_process_holding_a_workspace_is_no_problem_of_it(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    with locked_workspace(workspace, pytest.fail):
        assert check_workspace(workspace).state == "ok"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_on_nfs_uses_are_seen_and_those_of_the_dead_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_nfs(file: IO[str], operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        _flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    workspace = Workspace(str(tmp_path))
    with in_use(workspace, ["prior/one"]):
        assert used_artifacts(workspace).keys() == {"prior/one"}
        assert used_artifacts(workspace).keys() == {"prior/one"}
    assert used_artifacts(workspace) == {}
    assert workspace.keys("_uses") == []


def test_a_use_whose_file_was_removed_before_it_was_locked_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, taken, num_taken = Workspace(str(tmp_path)), lock._taken, 0

    def remove_first(opened: IO[str], where: str) -> bool:
        nonlocal num_taken
        num_taken += 1
        if num_taken == 1:
            assert used_artifacts(workspace) == {}  # gc takes it for one that a dead process left
        return taken(opened, where)

    monkeypatch.setattr(lock, "_taken", remove_first)
    with in_use(workspace, ["prior/0"]):
        assert list(used_artifacts(workspace)) == ["prior/0"]

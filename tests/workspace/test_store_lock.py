"""The lock of a workspace in an object store, on a local S3 server."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import StepError
from pipeline.workspace import lock
from pipeline.workspace.lock import in_use, locked_workspace, used_artifacts
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Workspace


def test_one_run_holds_a_workspace_in_a_store(bucket: str) -> None:
    workspace, warnings = Workspace(f"{bucket}/prefix"), list[str]()
    for _ in range(2):  # it can be taken again after its end
        with locked_workspace(workspace, warnings.append) as held:
            held.check()
            with (
                pytest.raises(StepError, match=r"another run is using this workspace \(process \d+ on .*wait for it"),
                locked_workspace(workspace, warnings.append),
            ):
                pass
    assert warnings == []


def test_of_several_who_take_a_lock_one_gets_it(bucket: str) -> None:
    workspace, everyone_tried = Workspace(f"{bucket}/prefix"), threading.Barrier(4)

    def take(_: int) -> bool:
        try:
            with locked_workspace(workspace, lambda _: None):
                everyone_tried.wait(30)
                return True
        except StepError:
            everyone_tried.wait(30)
            return False

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(take, range(4))) == [False, False, False, True]


def test_a_silent_lock_is_broken_aloud_and_its_owner_stops(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, warnings = Workspace(f"{bucket}/prefix"), list[str]()
    monkeypatch.setattr(lock, "BEAT_S", 1000.0)
    with locked_workspace(workspace, warnings.append) as silent:
        monkeypatch.setattr(lock, "EXPIRY_S", -1.0)  # by the store's clock, whose times are whole seconds
        with locked_workspace(workspace, warnings.append):
            [warning] = warnings
            assert "counts as dead, and its lock is broken" in warning
            with pytest.raises(StepError, match="the other one took over"):
                silent.check()


def test_whoever_stalled_while_others_took_the_lock_gives_up(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"{bucket}/prefix/.lock")
    for _ in range(2):
        with locked_workspace(Workspace(f"{bucket}/prefix"), lambda _: None):
            pass
    monkeypatch.setattr(lock, "_newest", lambda _: (0, "", 0.0))  # what it saw before
    with (
        pytest.raises(StepError, match="taken at this moment"),
        locked_workspace(Workspace(f"{bucket}/prefix"), lambda _: None),
    ):
        pass
    assert [path.rpartition("/")[2] for path in store.find(store.path) if path.endswith(".json")] == ["2.json"]


def test_a_lock_that_is_written_again_does_not_expire(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    store = ObjectStore(f"{bucket}/prefix/.lock")
    with locked_workspace(Workspace(f"{bucket}/prefix"), lambda _: None):
        beats = list[int]()
        for _ in range(2):
            beats.append(json.loads(store.cat_file(f"{store.path}/1.json"))["beats"])
            time.sleep(0.5)
        assert beats[1] > beats[0]


def test_what_a_living_server_reads_is_known_in_a_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(f"{bucket}/prefix")
    assert used_artifacts(workspace) == {}
    with in_use(workspace, ["prior/0"]):
        assert list(used_artifacts(workspace)) == ["prior/0"]
        monkeypatch.setattr(lock, "EXPIRY_S", -1.0)
        assert used_artifacts(workspace) == {}
        assert workspace.keys("uses") == []

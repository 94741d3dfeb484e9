"""What a person reads while storage does not answer."""

import errno
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.workspace import outage
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.outage import Outage, warnings_to
from pipeline.workspace.store import Artifact
from tests.tiny.storage import fail_calls


@pytest.fixture(autouse=True)
def silence_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes before the first warning."""
    monkeypatch.setattr(outage, "_SILENCE_S", 0.0)


def test_storage_that_is_away_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.json").write_text("1")
    with monkeypatch.context() as patch:
        fail_calls(patch, "open", times=2, ends=("a.json",))
        assert Artifact(str(tmp_path)).read_json("a.json") == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}/a.json: no answer for 0 s (Stale file handle)")


def test_an_object_store_that_is_away_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits = list[float]()
    monkeypatch.setattr(outage.time, "sleep", waits.append)

    def answer(*_: object) -> bytes:
        if len(waits) < 3:
            raise OSError(errno.EBUSY, "Service Unavailable")
        return b"1"

    monkeypatch.setattr(MemoryFileSystem, "cat_file", answer)
    assert ObjectStore("memory://away").cat_file("/away/a") == b"1"
    (record,) = caplog.records
    assert record.getMessage().startswith("memory://away: no answer for 0 s (Service Unavailable)")


def test_a_short_moment_is_not_worth_a_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(outage, "_SILENCE_S", 60.0)
    Outage("/mnt").wait(0.0, OSError("away"))
    assert caplog.records == []


def test_a_run_tells_its_observer_and_not_its_log(caplog: pytest.LogCaptureFixture) -> None:
    messages = list[str]()
    with warnings_to(messages.append):
        Outage("/mnt").wait(0.0, OSError("away"))
    assert (messages, caplog.records) == (["/mnt: no answer for 0 s (away); it is asked again for some minutes"], [])
    Outage("/mnt").wait(0.0, TimeoutError())
    assert "(TimeoutError)" in caplog.text

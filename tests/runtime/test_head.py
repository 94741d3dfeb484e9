import socket
import threading
from typing import Any

import pytest

from pipeline.runtime import head


@pytest.fixture
def listener() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Looks come without delay; returns the exit codes of processes that would have ended."""
    codes = list[int]()

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(head, "_LOOK_S", 0.01)
    monkeypatch.setattr(head, "_SAY_AFTER_S", 0.1)
    monkeypatch.setattr(head.os, "_exit", end)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10.5")
    return codes


def _address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_stays_away_ends_the_process_with_a_sentence(listener: Any, quick: list[int]) -> None:
    sentences, ended = list[str](), threading.Event()
    address = _address(listener)
    listener.close()
    with pytest.raises(SystemExit):
        head._watch(address, sentences.append, ended)
    assert quick == [4]
    assert [sentence.partition(address)[0] for sentence in sentences] == [
        "the head of the cluster, ",
        "the cluster went away: its head, ",
    ]
    assert "run the same command again" in sentences[1]


def test_a_head_that_comes_back_is_said_and_ends_nothing(listener: Any, quick: list[int]) -> None:
    sentences, ended, is_said = list[str](), threading.Event(), threading.Event()
    address = _address(listener)
    listener.close()

    def say(sentence: str) -> None:
        sentences.append(sentence)
        is_said.set()

    watch = threading.Thread(target=head._watch, args=(address, say, ended))
    watch.start()
    assert is_said.wait(20)
    is_said.clear()
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert is_said.wait(20)
        ended.set()
        watch.join(20)
    assert quick == []
    assert "does not answer; this command ends in" in sentences[0]
    assert sentences[1].endswith("answers again")

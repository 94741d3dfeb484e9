"""The process that keeps a server's address, with a server that takes no time to start."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from pipeline.recipe.recipe import parse_recipe
from pipeline.serve.keeper import Notes, _Keeper
from tests.ports import free_port
from tests.tiny.command import ROOT

_SERVER = """
import os, signal, sys, threading, time
from starlette.responses import PlainTextResponse
from pipeline.errors import StepError
from pipeline.recipe.recipe import parse_recipe
from pipeline.serve.http_server import HttpServer
from pipeline.serve.keeper import keep

signal.signal(signal.SIGTERM, signal.default_int_handler)
config = parse_recipe({"serve": {"port": int(sys.argv[1])}}).serve

def accompany(kept):
    print(os.getpid(), flush=True)
    try:
        kept.wait_until_keeper_ends()
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("interrupted", flush=True)

try:
    kept = keep(config, lambda line: print(line, flush=True), accompany if sys.argv[2] == "accompanied" else None)
except StepError as error:
    sys.exit(f"error: {error}")
if sys.argv[2] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5)
swaps = []
signal.signal(signal.SIGHUP, lambda *_: swaps.append(1))

async def app(scope, receive, send):
    await PlainTextResponse(f"{os.getpid()} {len(swaps)}")(scope, receive, send)

try:
    with HttpServer(app, kept.listener):
        kept.note_listening()
        print("listens", flush=True)
        while True:
            time.sleep(0.05)
except KeyboardInterrupt:
    sys.exit(7)
"""

Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    processes = list[subprocess.Popen[str]]()

    def begin(mode: str = "lives") -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        command = [sys.executable, "-c", _SERVER, str(port), mode]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        processes.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield begin
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate(timeout=10)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_server_that_is_killed_is_started_again_and_503_is_answered_until_then(start: Start) -> None:
    process, url = start()
    assert line_of(process) == "listens"
    first = int(httpx.get(url).text.split()[0])
    assert first != process.pid
    os.kill(first, signal.SIGKILL)
    assert line_of(process) == ("the server was killed by SIGKILL; it is started again, requests are answered with 503")
    answer = httpx.get(f"{url}/v1/models")  # nothing is refused: it waits for whoever answers next
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["Retry-After"] == "10"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert line_of(process) == "listens"
    deadline = time.monotonic() + 5
    while (answer := httpx.get(url)).status_code == 503:
        assert time.monotonic() < deadline
    second = int(answer.text.split()[0])
    assert second not in {first, process.pid}
    assert {int(httpx.get(url).text.split()[0]) for _ in range(20)} == {second}  # what stood in for it has ended

    process.send_signal(signal.SIGHUP)
    while not httpx.get(url).text.endswith(" 1"):
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    assert process.wait(10) == 7
    assert not psutil.pid_exists(second)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_notes_outlive_who_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    assert notes.read() == {}
    for number in range(3):
        if not (child := os.fork()):
            notes.write({"number": number, "long": "a" * 100_000 if number < 2 else ""})
            os._exit(0)
        os.waitpid(child, 0)
        assert notes.read()["number"] == number
    os.write(notes._file.fileno(), b'\n{"number": 3, "cut')  # killed while it writes
    assert notes.read()["number"] == 2
    notes.write({"number": 4})
    assert notes.read() == {"number": 4}

    def write_half(handle: int, line: bytes) -> int:
        return real(handle, line[: len(line) // 2])

    real = os.write
    monkeypatch.setattr(os, "write", write_half)  # as a disk that is nearly full
    with pytest.raises(OSError, match="No space left"):
        notes.write({"number": 5})
    assert notes.read() == {"number": 4}
    monkeypatch.undo()
    notes.write({"number": 6})
    assert notes.read() == {"number": 6}


def test_a_signal_between_the_end_of_a_server_and_the_keepers_notice_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the server with its own code, though there is nobody left to pass the signal on to."""
    config = parse_recipe({"serve": {"port": free_port()}}).serve
    keeper, real = _Keeper(config, print, None), os.waitpid

    def wait_and_interrupt(pid: int, options: int) -> tuple[int, int]:
        ended = real(pid, options)
        os.kill(os.getpid(), signal.SIGTERM)  # its handler runs before the next line
        return ended

    monkeypatch.setattr(os, "waitpid", wait_and_interrupt)
    with_children(monkeypatch, keeper, [lambda: None])
    with handlers_of_before(keeper), pytest.raises(SystemExit) as ended:
        keeper.run()
    assert ended.value.code == 7


def test_a_signal_while_there_is_no_server_ends_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def announce(line: str) -> None:
        assert line.startswith("the server was killed by SIGKILL")
        os.kill(os.getpid(), signal.SIGTERM)

    keeper = _Keeper(parse_recipe({"serve": {"port": free_port()}}).serve, announce, None)
    with_children(monkeypatch, keeper, [kill_itself, lambda: time.sleep(5), lambda: time.sleep(5)])
    with handlers_of_before(keeper), pytest.raises(SystemExit) as ended:
        keeper.run()
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_swap_that_is_requested_while_a_server_starts_or_there_is_none_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a handler SIGHUP ends a process, and with the server all that it serves."""

    def announce(line: str) -> None:
        assert line.startswith("the server was killed by SIGKILL")
        os.kill(os.getpid(), signal.SIGHUP)

    def swap_and_die() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        if keeper._kept.swap_requests.take():
            kill_itself()

    def end_if_requested() -> None:
        os._exit(5 if keeper._kept.swap_requests.take() and not keeper._kept.swap_requests.take() else 6)

    keeper = _Keeper(parse_recipe({"serve": {"port": free_port()}}).serve, announce, None)
    with_children(monkeypatch, keeper, [swap_and_die, lambda: time.sleep(5), end_if_requested])
    with handlers_of_before(keeper), pytest.raises(SystemExit) as ended:
        keeper.run()
    assert ended.value.code == 5
    assert not keeper._kept.swap_requests.take()  # it was the child's


def with_children(monkeypatch: pytest.MonkeyPatch, keeper: _Keeper, acts: list[Callable[[], object]]) -> None:
    """Let each child of a keeper do one thing, and end."""
    real = keeper._is_child

    def fork(name: str) -> bool:
        act = acts.pop(0)
        if real(name):
            try:
                act()
            finally:
                os._exit(7)  # whatever comes: nothing of this copy of the tests may go on
        return False

    monkeypatch.setattr(keeper, "_is_child", fork)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def handlers_of_before(keeper: _Keeper) -> Iterator[None]:
    """Of this process, which the keeper takes for its own, and its children have: those that a process begins with."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        keeper._kept.listener.close()


def test_a_server_ends_with_its_keeper(start: Start) -> None:
    process, url = start()
    assert line_of(process) == "listens"
    child = psutil.Process(int(httpx.get(url).text.split()[0]))
    process.kill()
    child.wait(10)


def test_a_companion_outlives_a_killed_server_and_is_ended_last(start: Start) -> None:
    process, url = start("accompanied")
    companion = psutil.Process(int(line_of(process)))
    assert line_of(process) == "listens"
    os.kill(int(httpx.get(url).text.split()[0]), signal.SIGKILL)
    assert line_of(process).startswith("the server was killed")
    assert line_of(process) == "listens"
    assert companion.is_running()
    assert companion.status() != psutil.STATUS_ZOMBIE
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "interrupted"
    assert process.wait(10) == 7
    assert not companion.is_running()


def test_a_companion_ends_with_a_keeper_that_is_killed(start: Start) -> None:
    process, _ = start("accompanied")
    companion = psutil.Process(int(line_of(process)))
    process.kill()
    assert not psutil.wait_procs([companion], timeout=10)[1]


def test_a_server_that_is_killed_again_and_again_is_given_up(start: Start) -> None:
    process, _ = start("dies")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert output.count("the server was killed by SIGKILL") == 4
    assert output.endswith("error: serve: the server was killed 5 times by SIGKILL; is memory enough?\n")

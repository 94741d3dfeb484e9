"""Many clients at once, of whom a third leave: the others get their pictures, and nothing of anybody stays behind.

All requests pass what a server's do: keys with limits, the access log, the gate, and the product's own HTTP server.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.front import Front
from pipeline.runtime.served import served_artifacts
from pipeline.serve.engine import Engine
from pipeline.serve.http_server import HttpServer, listen
from pipeline.serve.keys import add_key
from tests.ports import free_port
from tests.serve.conftest import Server
from tests.serve.test_engine import wait_until
from tests.tiny.command import is_proposal, start_unclip
from tests.tiny.workspace import served_workspace

NUM_CLIENTS = 64
LEAVERS = range(0, NUM_CLIENTS, 3)
NUM_STAYING = NUM_CLIENTS - len(LEAVERS)
LIMITS = {"requests": 10**6, "pixels": 10**9, "bytes": 10**12}
"""Of each key, a minute: far above what is asked, so that it is counted and nobody is refused."""


@pytest.fixture
def engine(server: Server) -> Iterator[Engine]:
    engine = Engine(server.cascade, max_batch_size=16, max_waiting=2 * NUM_CLIENTS)
    yield engine
    engine.close()


@pytest.fixture
def secrets(tmp_path: Path) -> list[str]:
    """Four keys of the file keys.json."""
    return [add_key(tmp_path / "keys.json", f"key {number}", **LIMITS) for number in range(4)]


async def _crowd(url: str, seed: int, secrets: list[str]) -> list[int]:
    """Every client requests a picture of some size; returns the statuses of those who stayed."""
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as clients:

        async def ask(number: int) -> int:
            draws = random.Random(f"{seed} {number}")
            side = draws.choice((8, 16, 32))
            body = {
                "prompt": f"picture {number}",
                "size": f"{side}x{side}",
                "n": draws.choice((1, 1, 2)),
                "seed": number,
                "num_inference_steps": draws.randint(2, 7),
                "neighbours": draws.choice((0, 2)),
            }
            headers = _with_key(secrets[number % len(secrets)])
            request = asyncio.create_task(clients.post("/v1/images/generations", json=body, headers=headers))
            if number in LEAVERS:
                await asyncio.sleep(draws.random() / 2)
                request.cancel()
                await asyncio.wait([request])
                return 0
            answer = await request
            assert answer.status_code != 200 or len(answer.json()["data"]) == body["n"]
            return answer.status_code

        statuses = await asyncio.gather(*map(ask, range(NUM_CLIENTS)))
    return [status for number, status in enumerate(statuses) if number not in LEAVERS]


def _with_key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def _counts(url: str, secret: str) -> dict[str, Any]:
    return httpx.get(f"{url}/healthz", headers=_with_key(secret), timeout=60).json()


def _wait_until_idle(url: str, secret: str) -> None:
    end = time.monotonic() + 60
    while (counts := _counts(url, secret))["active"] or counts["waiting"]:
        assert time.monotonic() < end, counts
        time.sleep(0.05)


def _send_crowds(url: str, secrets: list[str], process: psutil.Process, seconds: float) -> int:
    """Crowds, one after the other, of which the server's process keeps neither memory nor files.

    Returns:
        Their number.
    """
    bytes_before, files_before, end, num_crowds = 0, 0, time.monotonic() + seconds, 0
    while num_crowds < 3 or time.monotonic() < end:
        assert asyncio.run(_crowd(url, num_crowds, secrets)) == [200] * NUM_STAYING
        _wait_until_idle(url, secrets[0])
        num_crowds += 1
        if num_crowds == 2:  # what is made once is there
            gc.collect()
            bytes_before, files_before = process.memory_info().rss, process.num_fds()
    wait_until(lambda: process.num_fds() <= files_before + 2)
    gc.collect()
    bytes_after = process.memory_info().rss
    print(f"{num_crowds} crowds, {bytes_before / 1e6:.0f} MB, then {bytes_after / 1e6:.0f} MB")
    assert bytes_after < 1.05 * bytes_before
    return num_crowds


def _check_counts(counts: dict[str, Any], num_crowds: int) -> None:
    assert (counts["waiting"], counts["active"], counts["failed"], counts["refused"]) == (0, 0, 0, 0)
    assert counts["requests"] >= num_crowds * NUM_STAYING
    assert counts["dropped"] > 0


def _check_log(path: Path, num_crowds: int) -> None:
    """Every picture that was sent has a line, and every client that left before has at most one."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if line["path"] == "/v1/images/generations"]
    statuses = Counter(line["status"] for line in asked)
    assert statuses[200] >= num_crowds * NUM_STAYING
    assert num_crowds * NUM_STAYING < len(asked) <= num_crowds * NUM_CLIENTS
    assert statuses.keys() <= {200, 499}
    assert {line["key"] for line in asked} == {f"key {number}" for number in range(4)}


def test_sixty_four_clients_of_whom_a_third_leave(
    server: Server, engine: Engine, secrets: list[str], tmp_path: Path
) -> None:
    """The clients are in the server's process, and so is their memory."""
    front = Front(ServeConfig(keys=str(tmp_path / "keys.json"), access_log=str(tmp_path / "log.jsonl")))
    front.open(server.recipe, served_artifacts(server.recipe)[0], engine)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with HttpServer(front, listener):
        num_crowds = _send_crowds(url, secrets, psutil.Process(), 0)
        wait_until(lambda: engine.idle and not front.gate.num_requests)
    _check_counts(engine.counts(), num_crowds)
    _check_log(tmp_path / "log.jsonl", num_crowds)
    assert len(front.meter._buckets) == len(secrets) * len(LIMITS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_of_its_own_does_not_grow_in_five_minutes(secrets: list[str], tmp_path: Path) -> None:
    served_workspace(tmp_path)
    port = free_port()
    settings = {
        "mode": '"process"',
        "keys": f'"{tmp_path / "keys.json"}"',
        "access_log": f'"{tmp_path / "log.jsonl"}"',
        "max_queued_requests": 2 * NUM_CLIENTS,
    }
    words = [word for name, value in settings.items() for word in ("--set", f"serve.{name}={value}")]
    process = start_unclip("serve", str(tmp_path / "tiny.toml"), "--port", str(port), *words)
    try:
        assert process.stdout is not None
        while is_proposal(line := process.stdout.readline()):
            pass
        assert "is served at" in line, line
        [serving] = psutil.Process(process.pid).children(recursive=True)  # the other one keeps the port
        url = f"http://127.0.0.1:{port}"
        num_crowds = _send_crowds(url, secrets, serving, 300)
        _check_counts(_counts(url, secrets[0]), num_crowds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    _check_log(tmp_path / "log.jsonl", num_crowds)

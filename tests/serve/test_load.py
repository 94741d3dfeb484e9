"""Many clients at once, of whom a third leave: the others get their pictures, and nothing of anybody stays behind."""

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import psutil
import pytest
from fastapi import FastAPI

from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from tests.serve.conftest import Server

NUM_CLIENTS = 64
LEAVERS = range(0, NUM_CLIENTS, 3)


@pytest.fixture
def engine(server: Server) -> Iterator[Engine]:
    engine = Engine(server.cascade, max_batch_size=16, max_waiting=2 * NUM_CLIENTS)
    yield engine
    engine.close()


async def _crowd(url: str, seed: int) -> list[int]:
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
            }
            body["num_inference_steps"] = draws.randint(2, 7)
            request = asyncio.create_task(clients.post("/v1/images/generations", json=body))
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


def _wait_until_idle(engine: Engine) -> None:
    end = time.monotonic() + 60
    while not engine.idle:
        assert time.monotonic() < end, engine.counts()
        time.sleep(0.05)


def _memory_and_files() -> tuple[int, int]:
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds()


@pytest.mark.parametrize("seconds", [0, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_sixty_four_clients_of_whom_a_third_leave(
    server: Server, engine: Engine, serving: Callable[[FastAPI], AbstractContextManager[str]], seconds: int
) -> None:
    card = ModelCard(server.recipe.name, 32, sampling=server.cascade.settings)
    with serving(create_app(engine, None, ApiSettings(card))) as url:
        before, end, rounds = (0, 0), time.monotonic() + seconds, 0
        while rounds < 3 or time.monotonic() < end:
            assert asyncio.run(_crowd(url, rounds)) == [200] * (NUM_CLIENTS - len(LEAVERS))
            _wait_until_idle(engine)
            rounds += 1
            if rounds == 2:  # what is made once is there
                before = _memory_and_files()
        after = _memory_and_files()
    counts = engine.counts()
    assert (counts["waiting"], counts["active"], counts["failed"], counts["refused"]) == (0, 0, 0, 0)
    assert counts["requests"] >= rounds * (NUM_CLIENTS - len(LEAVERS))
    assert counts["dropped"] > 0
    assert after[1] <= before[1] + 2
    assert after[0] < 1.05 * before[0]

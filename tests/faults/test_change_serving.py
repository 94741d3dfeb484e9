"""Changes of a server under load, on a real Ray: another replica starts, other networks are swapped in, nobody sees an error."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.test_kill_serving import started
from tests.tiny.workspace import served_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

_NUM_CLIENTS = 6
_PATIENCE_S = 120.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_replica_that_is_added_and_networks_that_are_swapped_cost_no_request(tmp_path: Path) -> None:
    served_workspace(tmp_path)
    recipe, answers, is_over = tmp_path / "tiny.toml", list[tuple[int, int, str]](), threading.Event()
    changes = ("serve.replicas=[1, 2]", "serve.target_requests=2", "serve.cpus_per_replica=0.5")
    with started(recipe, *changes) as (server, process):

        def ask_on(number: int) -> None:
            with httpx.Client(timeout=_PATIENCE_S) as client:
                while not is_over.is_set():
                    body = {"prompt": "a", "seed": number, "n": 2}
                    answer = client.post(f"{server.url}/v1/images/generations", json=body)
                    answers.append((number, answer.status_code, answer.text))

        clients = [threading.Thread(target=ask_on, args=(number,)) for number in range(_NUM_CLIENTS)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: 'unclip_replicas{part="networks"} 2.0' in server.metrics())
            text = recipe.read_text()
            recipe.write_text(text.replace("num_steps = 3", "num_steps = 4"))
            assert recipe.read_text() != text
            [front] = [child for child in psutil.Process(process.pid).children() if not child.children()]
            front.send_signal(signal.SIGHUP)
            wait_until(lambda: "other networks are served\n" in server.lines)
            num_swapped = len(answers)
            wait_until(lambda: len(answers) > num_swapped + 4 * _NUM_CLIENTS)
        finally:
            is_over.set()
            for client in clients:
                client.join()
        assert [status for _, status, _ in answers if status != 200] == []
        steps = [json.loads(text)["usage"]["steps"] for _, _, text in answers]
        assert len({*steps}) == 2  # before and after the swap
        print(f"{len(answers)} requests")

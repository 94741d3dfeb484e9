"""``serve.mode = "process"``: the command without Ray, with the networks in the process that speaks HTTP."""

import base64
import concurrent.futures
import contextlib
import gc
import os
import re
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from fastapi import FastAPI

import pipeline.runtime.serve_here as here_module
from pipeline.errors import StepError
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.runtime.front import Front
from pipeline.runtime.serve_here import _Networks
from pipeline.runtime.served import Served, served_by
from pipeline.serve.keeper import SwapRequests
from pipeline.workspace.store import Artifact
from tests.ports import free_port
from tests.runtime.test_served import ALIAS, measured, promote
from tests.serve.test_engine import wait_until
from tests.tiny.command import is_proposal, start_unclip
from tests.tiny.shards import pixels

SLOW = "decoder.model.sampler.num_steps=300"
QUICK = "decoder.model.sampler.num_steps=5"


@dataclass(frozen=True)
class Server:
    recipe: Recipe
    """Its champion; the other cascade is quick."""
    folder: Path
    url: str
    process: subprocess.Popen[str]
    seconds: float
    """From the command to the line that says that it serves."""

    def line(self) -> str:
        """The next line, but for proposed commands."""
        assert self.process.stdout is not None
        while is_proposal(line := self.process.stdout.readline()):
            pass
        return line

    def ask(self, **fields: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json={"prompt": "a"} | fields, timeout=60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    recipe = measured(tmp_path, SLOW)
    promote(recipe)
    port, begun_s = free_port(), time.monotonic()
    words = ("--set", ALIAS[0], "--set", 'serve.mode="process"', "--port", str(port))
    process = start_unclip("serve", str(tmp_path / "tiny.toml"), *words)
    try:
        server = Server(recipe, tmp_path, f"http://127.0.0.1:{port}", process, 0.0)
        line = server.line()
        assert f"tiny is served at {server.url}" in line, line + (process.stdout.read() if process.stdout else "")
        yield Server(recipe, tmp_path, server.url, process, time.monotonic() - begun_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)


def test_a_laptop_serves_swaps_to_a_new_champion_and_drains_without_ray(server: Server) -> None:
    print(f"served after {server.seconds:.1f} s")
    assert "champion is version 1 of the tracker's model" in server.line()
    [serving] = psutil.Process(server.process.pid).children(recursive=True)  # the other one keeps the port
    assert not [library.path for library in serving.memory_maps() if "/ray/" in library.path]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    answer = client.images.generate(prompt="a red circle", extra_body={"seed": 7, "neighbours": 2}).data or []
    cascade = load_cascade(served_by(server.recipe).artifacts, "cpu", network_configs(server.recipe))
    expected = cascade.sample(["a red circle"], [7]).images[0].numpy()
    assert np.abs(pixels(base64.b64decode(answer[0].b64_json or "")).astype(int) - expected).mean() < 0.1
    assert len((answer[0].model_extra or {})["neighbours"]) == 2
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'unclip_replicas{part="networks"} 1.0' in metrics
    assert 'unclip_pictures_total{replica=""} 1.0' in metrics

    answers, is_over = list[httpx.Response](), threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            answers.append(server.ask())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_on) for _ in range(3)]
        try:
            promote(measured(server.folder, QUICK))
            server.process.send_signal(signal.SIGHUP)
            assert server.line() == "loading other networks\n"
            assert server.line() == "other networks are served\n"
            assert "champion is version 2" in server.line()
            wait_until(lambda: any(f'"steps":{5 + 3 * 3}' in one.text for one in answers))
            server.process.send_signal(signal.SIGHUP)
            assert server.line() == "nothing to swap: these networks are served already\n"
            (server.folder / "workspace/mlflow.db").write_bytes(b"no database any more" * 100)
            server.process.send_signal(signal.SIGHUP)
            assert "not swapped, the networks of before go on: " in (line := server.line()), line
            assert "does not answer" in line
        finally:
            is_over.set()
            for client_ in clients:
                client_.result()
        assert {one.status_code for one in answers} == {200}
        steps = [one.json()["usage"]["steps"] for one in answers]
        assert {*steps} == {300 + 3 * 3, 5 + 3 * 3}

        under_way = pool.submit(server.ask, num_inference_steps=900)
        while not httpx.get(f"{server.url}/healthz").json()["active"]:
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code != 503:
            time.sleep(0.01)
        assert server.ask().status_code == 503
        assert under_way.result().status_code == 200
    output, _ = server.process.communicate(timeout=60)
    # The probe of the line before may still be counted.
    is_said = re.search(r"stopping; requests under way: [12]", output) is not None
    assert (server.process.returncode, is_said) == (0, True), output


def test_a_swap_that_fails_in_whatever_way_ends_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a manifest that this user may not read; the networks of before go on."""
    engine, lines = SimpleNamespace(alive=True), list[str]()

    def reload() -> Recipe:
        requests.note()
        engine.alive = len(lines) < 1
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(here_module, "_WATCH_EVERY_S", 0.01)
    networks, requests = _Networks(Front(ServeConfig()), lines.append, None), SwapRequests()
    networks._now = SimpleNamespace(engine=engine)  # pyright: ignore[reportAttributeAccessIssue]
    requests.note()
    with pytest.raises(StepError, match="the engine has ended"):
        networks.watch(reload, requests)
    assert lines == ["not swapped, the networks of before go on: PermissionError: [Errno 13] Permission denied"] * 2


def test_a_swap_that_loses_the_index_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, lines = parse_recipe({}), list[str]()
    now: Any = SimpleNamespace(served=Served(recipe, {}))
    coming = Served(recipe, {"prior": Artifact("prior/0")}, "champion is version 2", "without neighbours: no index")
    monkeypatch.setattr(here_module, "served_anew", lambda *_: coming)
    monkeypatch.setattr(_Networks, "load", lambda *_: None)
    _Networks(Front(ServeConfig()), lines.append, None)._swap(recipe, now)
    assert lines == ["loading other networks", "other networks are served", coming.version, coming.lacks]


def test_networks_of_before_leave_the_memory_with_their_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        alive, idle = True, False

        def close(self) -> None:
            self.alive = False

    monkeypatch.setattr(here_module, "_IDLE_POLL_S", 0.01)
    monkeypatch.setattr(here_module, "_load", lambda *_: Engine())
    monkeypatch.setattr(Front, "build", lambda *_: FastAPI())
    served: Any = SimpleNamespace(
        recipe=None, artifacts={}, tables={}, remember=lambda *_: None, in_use=lambda _: contextlib.nullcontext()
    )

    def now() -> weakref.ref[Any]:
        assert networks._now is not None
        return weakref.ref(networks._now.engine)

    def is_gone() -> bool:
        gc.collect()
        return before() is None

    with _Networks(Front(ServeConfig()), str, None) as networks:
        networks.load(served)
        before = now()
        networks.load(served)
        assert not is_gone()  # a request is under way
        before().idle = True
        wait_until(is_gone)
        assert now()().alive


def test_a_process_that_is_killed_is_started_again(server: Server) -> None:
    assert "champion is version 1" in server.line()
    [serving] = psutil.Process(server.process.pid).children()
    serving.kill()
    assert "the server was killed by SIGKILL; it is started again" in server.line()
    assert "tiny is served at" in server.line()
    assert server.ask(num_inference_steps=1).status_code == 200

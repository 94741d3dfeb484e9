"""A chain of deployments on a real Ray, as `unclip serve` starts it: pictures, the time of requests, a swap under load."""

import base64
import concurrent.futures
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
import torch

from models.request import SampleRequest
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.parts import digest_of, write_tables
from pipeline.runtime.replicas import Hop, ModelReplica
from tests.faults.test_kill_serving import Server, named_steps, started
from tests.serve.test_metrics import values
from tests.tiny.shards import pixels
from tests.tiny.workspace import served_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

_PARTS = ("prior", "decoder", "upsampler_1", "upsampler_2", "neighbours")
_CHAIN = ('serve.mode="chain"', *(f"serve.{part}.cpus_per_replica=0.25" for part in _PARTS))
_PATIENCE_S = 120.0
_LONG = 1000
"""Steps of a request that takes seconds."""


@dataclass(frozen=True)
class Chain:
    recipe: Recipe
    path: Path
    server: Server
    process: subprocess.Popen[str]

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"prompt": "a red circle", **fields}
        return httpx.post(f"{self.server.url}/v1/images/generations", json=body, timeout=_PATIENCE_S)

    def wait_until(self, **counts: int) -> None:
        """Wait until the sums over all parts are these."""
        deadline = time.monotonic() + 20
        while {name: (health := self.server.health())[name] for name in counts} != counts:
            assert time.monotonic() < deadline, health
            time.sleep(0.02)

    def of_part(self, stage: str) -> dict[tuple[str, ...], float]:
        """What the replica with the network of a stage measures, without its name."""
        numbers = values(self.server.metrics())
        [replica] = [key[1] for key in numbers if key[0] == "unclip_step_seconds_count" and key[2] == stage]
        return {
            tuple(word for word in key if word != replica): count for key, count in numbers.items() if replica in key
        }

    def refusals(self) -> float:
        return values(self.server.metrics()).get(("unclip_refusals_total", "deadline"), 0.0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chain")
    recipe = served_workspace(folder)
    with started(folder / "tiny.toml", *_CHAIN) as (server, process):
        yield Chain(recipe, folder / "tiny.toml", server, process)


def test_pictures_and_their_neighbours_come_from_five_deployments(chain: Chain) -> None:
    [image] = chain.ask(seed=7, neighbours=2).json()["data"]
    cascade = load_cascade(finished_artifacts(chain.recipe, CASCADE_STEPS))
    expected = cascade.sample(["a red circle"], [7]).images[0].numpy()
    assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - expected).mean() < 0.1
    assert len(image["neighbours"]) == 2
    deadline = time.monotonic() + 20
    while not all(f'unclip_replicas{{part="{part}"}} 1.0' in chain.server.metrics() for part in _PARTS):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.usefixtures("local_ray")
def test_what_is_left_of_a_large_request_goes_through_the_object_store(tmp_path: Path) -> None:
    """Over a real Ray: two parts in processes of their own, without Ray Serve, so that the way between them is seen."""

    class Part(ModelReplica):
        async def _announce(self, served: str) -> str:  # to Ray Serve's router
            return served

    recipe = served_workspace(tmp_path)
    artifacts = finished_artifacts(recipe, CASCADE_STEPS)
    tables, actor = write_tables(recipe, artifacts), ray.remote(num_cpus=0)(Part)
    first, last = actor.remote(), actor.remote()
    steps = {"prior": ["clip", "prior", "decoder", "upsampler_1"], "upsampler_2": ["upsampler_2"]}
    ray.get(
        [
            replica.reconfigure.remote({**tables, "part": part, "steps": steps[part]})
            for replica, part in ((first, "prior"), (last, "upsampler_2"))
        ]
    )
    for count, kind in ((1, bytes), (24, ray.ObjectRef)):  # 24 pictures of 16 px take 74 KB
        request = SampleRequest("a red circle", tuple(range(count)))
        hop = ray.get(first.sample.remote(digest_of(tables), request))
        assert isinstance(hop, Hop)
        assert isinstance(hop.work, kind)
        images = ray.get(last.sample.remote(digest_of(tables), request, "", hop)).images
        expected = load_cascade(artifacts).sample(["a red circle"] * count, list(request.seeds)).images.numpy()
        assert np.abs(images.astype(int) - expected).mean() < 0.1


def test_a_request_whose_time_ends_in_the_middle_of_the_chain_leaves_at_the_next_step(chain: Chain) -> None:
    chain.ask()  # every part has measured
    before, refusals = chain.of_part("decoder"), chain.refusals()
    late: dict[str, Any] = {"num_inference_steps": _LONG, "timeout": 0.5}
    started_s = time.monotonic()
    answer = chain.ask(**late)
    assert time.monotonic() - started_s < 3
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert answer.headers["X-Should-Retry"] == "false"
    stream = chain.ask(**late, stream=True).text
    assert "event: error" in stream
    assert '"code": "deadline_exceeded"' in stream
    chain.wait_until(active=0, waiting=0, expired=2)
    after = chain.of_part("decoder")
    wasted = {key: after[key] - before.get(key, 0) for key in after}["unclip_wasted_steps_total", "expired"]
    assert after["unclip_requests_total", "expired"] == 2  # all of them, and none in another part
    assert 2 * 3 < wasted < _LONG  # those of the prior, too
    assert chain.refusals() == refusals + 1  # the status of the stream had been sent


def test_what_the_parts_cannot_do_in_time_is_refused_at_once(chain: Chain) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = [pool.submit(chain.ask, n=6, num_inference_steps=_LONG) for _ in range(2)]
        chain.wait_until(active=12, waiting=0)
        never = {"num_inference_steps": _LONG, "timeout": 2}
        first = chain.ask(**never)  # it may be taken: the parts are asked because it came
        refusals, requests = chain.refusals(), chain.server.health()["requests"]
        started_s = time.monotonic()
        refused = chain.ask(**never)
        taken_s = time.monotonic() - started_s
        print(f"refused after {1000 * taken_s:.0f} ms")
        assert first.status_code in {429, 504}
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        needed = re.search(r"timeout: 2 s are less than the (\S+) s", refused.json()["error"]["message"])
        assert needed
        assert int(refused.headers["Retry-After"]) == pytest.approx(float(needed[1]) - 2, rel=0.02, abs=1)
        assert taken_s < 1
        assert chain.refusals() == refusals + 1
        assert chain.server.health()["requests"] == requests
        assert chain.ask(timeout=60).status_code == 200  # it joins the steps of the others
        assert [request.result().status_code for request in long] == [200, 200]


def test_networks_of_a_chain_are_swapped_under_load_without_an_error(chain: Chain) -> None:
    answers, is_over = list[httpx.Response](), threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            answers.append(chain.ask(n=2))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask_on) for _ in range(3)]
        try:
            text = chain.path.read_text()
            chain.path.write_text(text.replace("num_steps = 3", "num_steps = 4"))
            [front] = [one for one in psutil.Process(chain.process.pid).children() if not one.children()]
            front.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + _PATIENCE_S
            while "other networks are served\n" not in chain.server.lines:
                assert time.monotonic() < deadline, chain.server.lines
                time.sleep(0.1)
            num_swapped = len(answers)
            while len(answers) < num_swapped + 6:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    steps = [answer.json()["usage"]["steps"] for answer in answers]
    assert [named_steps(answer) for answer in answers] == steps
    assert {*steps} == {2 * 4 * 3, 2 * 4 * 4}
    print(f"{len(answers)} requests")

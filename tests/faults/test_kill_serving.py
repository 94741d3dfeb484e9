"""``kill -9`` of what serves, while requests are under way: each is answered, or 503 in the API's form, and none hangs.

Two servers are taken through their kills: `unclip serve` on a Ray of its own (a replica, Ray Serve's controller, both, the
server's process, the one that holds Ray), and the file of `--config-only` behind Ray Serve's proxies (the HTTP process, a
proxy, the controller).
"""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipeline.errors import StepError
from pipeline.runtime.serve_file import PROXY_ENVIRONMENT
from tests.ports import free_port
from tests.ray_head import ray_head
from tests.serve.test_metrics import values
from tests.tiny.command import ROOT, start_unclip, unclip
from tests.tiny.workspace import served_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

_NUM_CLIENTS = 3
_PATIENCE_S = 60.0
_BACK_S = 10.0
"""Longest time until pictures are sampled again, on a machine that does nothing else."""
_ENDED_S = 12.0
"""Longest time until a server has ended whose Ray is gone."""
_SLOW = ("decoder.model.sampler.num_steps=400",)  # a second or more: it is killed in the middle


@dataclass
class Server:
    """A server that is killed in parts."""

    url: str
    root: psutil.Process
    """The process that all of it descends from."""
    lines: list[str] = field(default_factory=list[str])
    """What it has said."""

    def find(self, title: str) -> psutil.Process:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            for process in self.root.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                        return process
            time.sleep(0.1)
        raise AssertionError(f"no process {title}")

    def health(self) -> Any:
        return httpx.get(f"{self.url}/healthz", timeout=10).json()

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=10).text


def ask(server: Server, body: dict[str, Any]) -> httpx.Response | None:
    """None: the connection was closed, as it is when the process at its other end is killed."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=_PATIENCE_S)
    return None


def kill_in_the_middle(
    server: Server, kill: Callable[[], None], *, num_others: int = 0, num_steps: int = 400, comes_back: bool = True
) -> list[httpx.Response | None]:
    """Kill while clients, and some others, wait for pictures; their answers, the last one's a stream."""
    body: dict[str, Any] = {"prompt": "a", "num_inference_steps": num_steps}
    bodies = [{**body, "seed": number} for number in range(_NUM_CLIENTS)]
    bodies.append({**body, "seed": 9, "stream": True, "partial_images": 2})
    with concurrent.futures.ThreadPoolExecutor(len(bodies) + 1) as pool:
        answers = [pool.submit(ask, server, body) for body in bodies]
        deadline = time.monotonic() + 20
        while server.health().get("active", 0) < len(bodies) + num_others:
            assert time.monotonic() < deadline, server.health()
            time.sleep(0.02)
        kill()
        killed_s = time.monotonic()
        back = pool.submit(require_back_soon, server) if comes_back else None
        results = [answer.result() for answer in answers]
        print(f"under way: ended after {time.monotonic() - killed_s:.1f} s")
        if back is not None:
            back.result()
        return results


def require_back_soon(server: Server) -> None:
    """Pictures are sampled again within 10 s; later by as much as the machine has more to do than it has processors."""
    seconds, load = seconds_until_back(server), os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"back after {seconds:.1f} s, at a load of {load:.1f} for each processor")
    assert seconds < _BACK_S * max(1.0, load)


@contextlib.contextmanager
def retrying_client(server: Server) -> Generator[None]:
    """OpenAI's client asks beside the others; it comes back by itself, and has its picture in the end."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=6)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.images.generate, prompt="a", extra_body={"seed": 5})
        yield
        assert len(answer.result().data or []) == 1


def require_answered(answers: list[httpx.Response | None]) -> None:
    """All pictures are there, those of the stream too."""
    statuses = [answer.status_code if answer is not None else 0 for answer in answers]
    assert statuses == [200] * len(answers), [answer.text[:200] for answer in answers if answer is not None]
    *_, stream = answers
    assert stream is not None
    kinds = [line.rpartition(".")[2] for line in stream.text.splitlines() if line.startswith("event: ")]
    assert kinds == ["partial_image", "partial_image", "completed"], kinds


def named_steps(answer: httpx.Response) -> int:
    """Network steps of the pictures of an answer, as their files name them."""
    steps = 0
    for picture in answer.json()["data"]:
        with Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))) as file:
            assert isinstance(file, PngImageFile)
            sampling = json.loads(file.text["unclip"])["sampling"]
        steps += sum(settings["num_steps"] for settings in sampling.values())
    return steps


def seconds_until_back(server: Server) -> float:
    """How long the server does not sample pictures; whatever it answers until then is 503 in the API's form."""
    started_s = time.monotonic()
    while time.monotonic() < started_s + _PATIENCE_S:
        answer = ask(server, {"prompt": "a", "seed": 1, "num_inference_steps": 1})
        if answer is not None and answer.status_code == 200:
            return time.monotonic() - started_s
        if answer is not None:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert answer.headers["Retry-After"]
        time.sleep(0.1)
    raise AssertionError(f"not back after {_PATIENCE_S} s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    served_workspace(folder, overrides=_SLOW)
    return folder


@contextlib.contextmanager
def started(recipe: Path, *changes: str) -> Generator[tuple[Server, subprocess.Popen[str]]]:
    """`unclip serve` with a Ray of its own."""
    port = free_port()
    settings = [part for change in changes for part in ("--set", change)]
    process = start_unclip("serve", str(recipe), "--port", str(port), *settings)
    assert process.stdout is not None
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
    try:
        while "is served at" not in (line := process.stdout.readline()):
            assert line, process.wait(10)
        output = process.stdout
        threading.Thread(target=lambda: server.lines.extend(iter(output.readline, "")), daemon=True).start()
        yield server, process
        process.terminate()
        process.wait(60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in server.root.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[Server]:
    with started(folder / "tiny.toml", *_SLOW) as (server, _):
        yield server


def test_a_replica_that_is_killed_costs_no_request_and_is_started_again_in_the_spare_process(own: Server) -> None:
    spare = own.find("ray::IDLE")
    require_answered(kill_in_the_middle(own, own.find("ray::ServeReplica").kill))
    assert own.find("ray::ServeReplica").pid == spare.pid
    assert "a replica has died (networks), another one is started\n" in own.lines
    metrics = own.metrics()
    assert 'unclip_replica_deaths_total{part="networks"} 1.0' in metrics
    assert values(metrics)["unclip_begun_again_total",] >= _NUM_CLIENTS + 1


def test_a_controller_that_is_killed_costs_no_request_and_replaces_replicas_when_it_is_back(own: Server) -> None:
    require_answered(kill_in_the_middle(own, own.find("ray::ServeController").kill))
    assert httpx.get(f"{own.url}/readyz").status_code == 200

    def kill_both() -> None:
        own.find("ray::ServeController").kill()
        own.find("ray::ServeReplica").kill()

    require_answered(kill_in_the_middle(own, kill_both))


def test_a_server_whose_process_is_killed_answers_503_until_it_is_back(own: Server) -> None:
    [server] = [child for child in own.root.children() if not child.children()]  # the other one holds Ray
    replica = own.find("ray::ServeReplica")
    with retrying_client(own):
        answers = kill_in_the_middle(own, server.kill, num_others=1, num_steps=900)  # not done before it is back
        assert answers == [None] * len(answers)  # nobody else holds their connections
    assert any(line.startswith("the server was killed by SIGKILL") for line in own.lines)
    assert not server.is_running()
    assert own.find("ray::ServeReplica") == replica  # the networks were not loaded again
    deadline = time.monotonic() + 10
    while own.health()["dropped"] < len(answers):  # nobody waits for these pictures any more
        assert time.monotonic() < deadline, json.dumps(own.health())
        time.sleep(0.2)


def test_a_server_that_is_killed_after_a_swap_comes_back_with_the_networks_that_it_served(folder: Path) -> None:
    recipe = folder / "swapped.toml"
    recipe.write_text((folder / "tiny.toml").read_text())
    with started(recipe, *_SLOW) as (server, _):

        def steps() -> int:
            answer = ask(server, {"prompt": "a", "seed": 1})
            assert answer is not None
            assert answer.status_code == 200, answer.text
            assert named_steps(answer) == answer.json()["usage"]["steps"]
            return answer.json()["usage"]["steps"]

        assert steps() == 400 + 3 * 3
        recipe.write_text(recipe.read_text().replace("num_steps = 3", "num_steps = 4"))
        [serving] = [child for child in server.root.children() if not child.children()]
        serving.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + _PATIENCE_S
        while "other networks are served\n" not in server.lines:
            assert time.monotonic() < deadline, server.lines
            time.sleep(0.1)
        assert steps() == 400 + 3 * 4
        replica = server.find("ray::ServeReplica")
        serving.kill()
        seconds_until_back(server)
        assert steps() == 400 + 3 * 4
        assert server.find("ray::ServeReplica") == replica


def test_a_server_whose_ray_is_killed_answers_503_and_ends(folder: Path) -> None:
    with started(folder / "tiny.toml", *_SLOW) as (server, process):
        [holder] = [child for child in server.root.children() if child.children()]
        left = holder.children(recursive=True)
        killed_s: list[float] = []

        def kill() -> None:
            killed_s.append(time.monotonic())
            holder.kill()

        try:
            answers = kill_in_the_middle(server, kill, comes_back=False)
            print(f"Ray: answered after {time.monotonic() - killed_s[0]:.1f} s")
            *whole, stream = answers
            for answer in whole:
                assert answer is not None
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready"), answer.text
            assert stream is not None
            assert '"code": "not_ready"' in stream.text, stream.text
            assert process.wait(60) == StepError.exit_code
            taken_s = time.monotonic() - killed_s[0]
            print(f"Ray: the server has ended after {taken_s:.1f} s")
            assert taken_s < _ENDED_S
            assert any("Ray on this machine has ended" in line for line in server.lines), server.lines
        finally:
            for one in left:  # Ray's own agents end after a minute and a half
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


@pytest.fixture(scope="module")
def deployed(folder: Path) -> Iterator[Server]:
    """The file of `--config-only`, by Ray Serve alone."""
    port = free_port()
    done = unclip("serve", str(folder / "tiny.toml"), "--config-only", "--port", str(port), "--set", _SLOW[0], cwd=ROOT)
    (folder / "serve.yaml").write_text(done.stdout)
    with ray_head(environment={"PYTHONPATH": str(ROOT), **PROXY_ENVIRONMENT}) as head:
        serve = str(Path(sys.executable).with_name("serve"))
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        subprocess.run(
            [serve, "deploy", "--address", head.dashboard, str(folder / "serve.yaml")], check=True, env=environment
        )
        server = Server(f"http://127.0.0.1:{port}", psutil.Process(head.pid))
        seconds_until_back(server)
        yield server


def test_an_http_process_behind_proxies_that_is_killed_costs_no_request(deployed: Server) -> None:
    answers = kill_in_the_middle(deployed, deployed.find("ray::ServeReplica:tiny:http").kill)
    *whole, stream = answers
    assert [answer.status_code if answer else 0 for answer in whole] == [200] * _NUM_CLIENTS, answers
    assert stream is not None
    assert "event: image_generation.completed" in stream.text or '"code": "not_ready"' in stream.text


def test_a_replica_behind_proxies_that_is_killed_costs_no_request(deployed: Server) -> None:
    require_answered(kill_in_the_middle(deployed, deployed.find("ray::ServeReplica:tiny:networks").kill))
    metrics = deployed.metrics()
    assert 'unclip_replica_deaths_total{part="networks"} 1.0' in metrics
    assert 'unclip_replicas{part="networks"} 1.0' in metrics


def test_a_proxy_that_is_killed_is_back_soon(deployed: Server) -> None:
    with retrying_client(deployed):
        answers = kill_in_the_middle(deployed, deployed.find("ray::ProxyActor").kill, num_others=1)
        assert answers == [None] * len(answers)  # nobody else holds their connections


def test_a_controller_behind_proxies_that_is_killed_costs_no_request(deployed: Server) -> None:
    require_answered(kill_in_the_middle(deployed, deployed.find("ray::ServeController").kill))

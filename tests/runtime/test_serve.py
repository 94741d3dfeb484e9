import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import ray
import torch
from PIL import Image

import pipeline.runtime.front as front_module
import pipeline.runtime.serve as serve_module
from pipeline.errors import ConfigError, StepError
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.draining import finishing
from pipeline.runtime.front import Front
from pipeline.runtime.serve import serve_recipe
from tests.ports import free_port, free_ports
from tests.ray_head import ray_head
from tests.readme import python_blocks
from tests.tiny.cluster import cluster_without_cpus
from tests.tiny.collector import Collector, collecting
from tests.tiny.command import ROOT, is_proposal, start_unclip, unclip
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import served_workspace

pytestmark = pytest.mark.ray
SLOW = ("--set", "decoder.model.sampler.num_steps=100")  # long enough to leave before the end
_LONG = {"prompt": "a", "num_inference_steps": 900}  # long enough to be counted by two looks of /healthz


@dataclass(frozen=True)
class Served:
    recipe: Recipe
    url: str
    process: subprocess.Popen[str]
    collector: Collector


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("served")
    recipe = served_workspace(folder, overrides=SLOW[1:])
    port = free_port()
    limits = ("--set", "serve.max_batch_size=4", "--set", "serve.max_queued_requests=2")
    with collecting() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        traces = ("--set", f"serve.traces={collector.url}")
        process = start_unclip("serve", str(folder / "tiny.toml"), "--port", str(port), *SLOW, *limits, *traces)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert f"tiny is served at http://127.0.0.1:{port}" in line, line + process.stdout.read()
            yield Served(recipe, f"http://127.0.0.1:{port}", process, collector)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def health(served: Served) -> Any:
    return httpx.get(f"{served.url}/healthz", timeout=30).json()


def test_served_pictures_are_those_of_the_cascade(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    answer = client.images.generate(prompt="a red circle", n=2, model="tiny", extra_body={"seed": 7})
    expected = (
        load_cascade(finished_artifacts(served.recipe, CASCADE_STEPS))
        .sample(["a red circle"] * 2, [7, 8])
        .images.numpy()
    )
    for image, picture in zip(answer.data or [], expected, strict=True):
        difference = np.abs(pixels(base64.b64decode(image.b64_json or "")).astype(int) - picture)
        assert difference.mean() < 0.1


def test_a_served_request_is_one_trace_of_two_processes(served: Served) -> None:
    trace_id = "1" * 32
    headers = {"traceparent": f"00-{trace_id}-{'2' * 16}-01"}
    httpx.post(f"{served.url}/v1/images/generations", json={"prompt": "a"}, headers=headers, timeout=60)
    stages = {"prior", "decoder", "upsampler_1", "upsampler_2"}
    spans = served.collector.wait_for(trace_id, 7)
    root = spans.pop("POST /v1/images/generations")
    assert spans.keys() == {"queue", "encode", *stages}
    assert {one.parent_id for one in spans.values()} == {root.span_id}
    places = {one.name: one.resource["service.instance.id"] for one in spans.values()}
    assert places["encode"] == root.resource["service.instance.id"] != places["queue"]
    assert {places[name] for name in stages} == {places["queue"]}


def test_readme_client_gets_its_picture(served: Served) -> None:
    [block] = python_blocks()
    assert served.recipe.upsampler_2 is not None
    size = served.recipe.upsampler_2.model.image_px
    for original, here in (("http://127.0.0.1:8000", served.url), ("128x128", f"{size}x{size}")):
        assert block.count(original) == 1
        block = block.replace(original, here)
    names: dict[str, Any] = {}
    exec(block, names)
    assert pixels(base64.b64decode(names["picture"].data[0].b64_json)).shape == (size, size, 3)


def test_served_neighbours_come_with_their_pictures(served: Served) -> None:
    body = {
        "image": base64.b64encode(plain_picture("blue")).decode(),
        "modality": "image",
        "num_images": 2,
        "indice_name": "tiny",
    }
    rows = httpx.post(f"{served.url}/knn-service", content=json.dumps(body), timeout=30).json()
    assert rows[0]["caption"] == "a blue picture"
    assert base64.b64decode(rows[0]["image"]).startswith(b"\xff\xd8")
    assert "<title>unclip</title>" in httpx.get(served.url).text


def test_served_errors_pass_through_ray_in_their_form(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/images/generations", json={"prompt": "a", "size": "1x1"}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")


def test_serving_listens_on_loopback_alone(served: Served) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    listening = [
        one.laddr.ip for one in psutil.net_connections("tcp") if one.laddr.port == port and one.status == "LISTEN"
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_a_client_that_leaves_is_dropped_by_the_replica(served: Served) -> None:
    before = health(served)
    host, port = served.url.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "n": 10}'
    with contextlib.closing(socket.create_connection((host, int(port)))) as link:
        link.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        while health(served)["requests"] == before["requests"]:
            time.sleep(0.01)
    deadline = time.monotonic() + 30
    while (now := health(served))["active"] or now["waiting"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    assert now["dropped"] == before["dropped"] + 1
    assert now["pictures"] < before["pictures"] + 10


def test_streams_and_files_pass_through_ray(served: Served) -> None:
    body = {"prompt": "a", "stream": True, "partial_images": 1, "n": 2}
    with httpx.stream("POST", f"{served.url}/v1/images/generations", json=body, timeout=120) as answer:
        kinds = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"] * 2
    refused = httpx.post(f"{served.url}/v1/images/generations", json={"prompt": "a", "guidance_scale": 1e3})
    assert refused.status_code == 400
    body = {"prompt": "a", "seed": 1, "response_format": "file"}
    file = httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=120).content
    with Image.open(io.BytesIO(file)) as picture:
        everything = json.loads(picture.text["unclip"])
    assert {"prior", "decoder", "clip"} <= everything["networks"].keys()
    assert all(len(key) == 16 for key in everything["networks"].values())
    assert everything["sampling"]["decoder"]["num_steps"] >= 1


def test_pictures_and_errors_of_edits_pass_through_ray(served: Served) -> None:
    route, files = f"{served.url}/v1/images/text-diffs", {"image": plain_picture("red")}
    fields = {"source": "a red circle", "target": "a blue star", "num_inference_steps": "3", "neighbours": "2"}
    answer = httpx.post(route, data=fields | {"n": "2"}, files=files, timeout=120).json()
    assert [frame["theta"] for frame in answer["data"]] == [0.0, 0.4]
    assert [len(frame["neighbours"]) for frame in answer["data"]] == [2, 2]
    refused = httpx.post(route, data=fields | {"target": "A RED circle"}, files=files, timeout=120)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert "no direction" in refused.json()["error"]["message"]
    vectors = httpx.post(f"{served.url}/v1/embeddings", json={"input": ["a", "b"], "model": "tiny"}, timeout=60).json()
    assert len({len(entry["embedding"]) for entry in vectors["data"]}) == 1


def test_overload_of_the_replica_is_429(served: Served) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: ask(served.url, {"prompt": f"{number}", "n": 10}), range(12)))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["message"] == "2 requests are waiting already; try again later"


def test_ctrl_c_finishes_what_is_under_way_and_ends_everything_it_started(served: Served) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert len(family) > 3
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask, served.url, _LONG)
        while not health(served)["active"]:
            time.sleep(0.01)
        os.killpg(served.process.pid, signal.SIGINT)
        while httpx.get(f"{served.url}/readyz").status_code != 503:
            time.sleep(0.01)
        refused = ask(served.url, {"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert under_way.result().status_code == 200
    output, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 0, output
    [line] = said(output)  # the probe of a line before may still be counted
    assert re.fullmatch(r"stopping; requests under way: [12] - Ctrl-C again ends them at once", line)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (KeyboardInterrupt(), ["stopping; requests under way: 1", "not finished within 0.01 s (serve.drain_s): 1"]),
        (StepError("Ray has ended"), []),  # nobody works on it: it is answered with 503
    ],
)
def test_what_is_under_way_is_waited_for_as_long_as_somebody_works_on_it(
    end: BaseException, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "_END_S", 0.01)
    front, lines = Front(ServeConfig()), list[str]()
    front.gate._count(front, 1)
    with pytest.raises(type(end)), finishing(front, 0.01, lines.append):
        raise end
    assert [line.partition(" - ")[0] for line in lines] == said
    assert front.gate.reason
    assert front.upkeep.has_ended == (not said)


def test_serving_an_unfinished_recipe_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clip is not finished under this recipe; first: unclip run"):
        serve_recipe(parse_recipe({"workspace": str(tmp_path)}))


@pytest.mark.slow
def test_servers_share_a_cluster_whose_machines_come_later(tmp_path: Path) -> None:
    cascade, ports = make_cascade(), free_ports(2)
    save_cascade(cascade, tmp_path / "mine")
    served_workspace(tmp_path)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with cluster_without_cpus() as cluster:

        def start(recipe: str, port: int, *words: str) -> subprocess.Popen[str]:
            address = ("--address", cluster.address, "--port", str(port), *SLOW)
            return start_unclip("serve", str(tmp_path / recipe), *address, *words)

        processes = [start("mine", ports[0])]
        try:
            assert "waiting: a replica needs a machine with 1 CPU" in line_of(processes[0])
            assert httpx.get(f"{urls[0]}/livez").status_code == 200
            refused = ask(urls[0], {"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
            assert "the cluster was asked for one" in refused.json()["error"]["message"]
            cluster.add_node(num_cpus=2)
            assert f"mine is served at {urls[0]}" in line_of(processes[0])
            assert line_of(processes[0]).startswith("without neighbours: download is not finished")

            processes.append(start("tiny.toml", ports[1], "--name", "other"))
            assert f"other is served at {urls[1]}" in line_of(processes[1])
            assert httpx.get(f"{urls[1]}/v1/models").json()["data"][0]["id"] == "other"
            second = start("mine", free_port())
            output, _ = second.communicate(timeout=60)
            assert second.returncode == 4
            assert "'mine' is served on this cluster already; give this server another name (--name)" in output

            served_workspace(tmp_path, overrides=("seed=11",))
            (tmp_path / "tiny.toml").write_text("seed = 11\n" + (tmp_path / "tiny.toml").read_text())
            assert swapped_under_load(processes[1], urls[1]) == {200}

            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                under_way = pool.submit(ask, urls[1], _LONG)
                while not httpx.get(f"{urls[1]}/healthz", timeout=30).json()["active"]:
                    time.sleep(0.01)
                processes[1].terminate()
                assert under_way.result().status_code == 200
            processes[1].communicate(timeout=60)
            assert processes[1].returncode == 0

            [image] = ask(urls[0], {"prompt": "a red circle", "seed": 7}).json()["data"]
            answer = httpx.post(f"{urls[0]}/knn-service", json={"text": "a", "modality": "image", "num_images": 1})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "index_not_found")
            processes[0].terminate()
            output, _ = processes[0].communicate(timeout=60)
            assert (processes[0].returncode, said(output)) == (0, ["stopping"])
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    recipe = load_recipe(tmp_path / "mine", SLOW[1::2])
    networks = load_cascade(finished_artifacts(recipe, CASCADE_STEPS), "cpu", network_configs(recipe))
    expected = networks.sample(["a red circle"], [7]).images[0].numpy()
    assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - expected).mean() < 0.1


@pytest.mark.slow
def test_a_cluster_that_wants_its_token_is_served_on_without_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cluster.yaml makes it: the token of the machine is in ``~/.ray/auth_token``."""
    served_workspace(tmp_path)
    kept, port = tmp_path / "home" / ".ray" / "auth_token", free_port()
    kept.parent.mkdir(parents=True)
    kept.write_text("0123456789abcdef0123456789abcdef")
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    cluster = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(kept), "PYTHONPATH": str(ROOT)}
    with ray_head(environment=cluster) as head:
        command = ("serve", str(tmp_path / "tiny.toml"), "--address", head.address, "--port", str(port))
        stranger = unclip(*command, environment={"HOME": str(tmp_path)})
        assert stranger.returncode == 4
        sentence = f"error: the cluster at {head.address} asks for its token: put it into ~/.ray/auth_token"
        assert stranger.stdout.startswith(sentence)

        process = start_unclip(*command, environment={"HOME": str(kept.parents[1])})
        try:
            assert f"tiny is served at http://127.0.0.1:{port}" in line_of(process)
            assert ask(f"http://127.0.0.1:{port}", {"prompt": "a red circle"}).status_code == 200
            process.terminate()
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def swapped_under_load(process: subprocess.Popen[str], url: str) -> set[int]:
    """Swap the networks while clients ask for pictures; the statuses of their answers."""
    body, answers = {"prompt": "a", "seed": 3}, list[httpx.Response]()
    before, is_over = ask(url, body).content, threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            answers.append(ask(url, body))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask_on) for _ in range(3)]
        process.send_signal(signal.SIGHUP)
        try:
            assert line_of(process) == "loading other networks\n"
            assert line_of(process) == "other networks are served\n"
        finally:
            is_over.set()
        for client in clients:
            client.result()
    pictures = [json.loads(answer)["data"][0]["b64_json"] for answer in (before, ask(url, body).content)]
    assert pictures[0] != pictures[1]
    assert httpx.get(f"{url}/healthz", timeout=30).json()["pictures"] >= 1
    return {answer.status_code for answer in answers}


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    while is_proposal(line := process.stdout.readline()):
        pass
    return line or f"ended: {process.wait(10)}"


def said(output: str) -> list[str]:
    """Lines without the proposed commands."""
    return [line for line in output.strip().splitlines() if not is_proposal(line)]


def ask(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)


def test_a_server_for_other_machines_without_a_key_is_refused(served: Served) -> None:
    recipe = dataclasses.replace(served.recipe, serve=dataclasses.replace(served.recipe.serve, host="0.0.0.0"))
    with pytest.raises(ConfigError, match=r"serve\.host: 0\.0\.0\.0 is open to other machines.*unclip keys add"):
        serve_recipe(recipe)


def test_serving_on_a_taken_port_says_so_before_ray_starts(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        recipe = dataclasses.replace(served.recipe, serve=dataclasses.replace(served.recipe.serve, port=port))
        with pytest.raises(StepError, match=rf"127\.0\.0\.1:{port} cannot be listened on"):
            serve_recipe(recipe)
        assert not ray.is_initialized()


def test_a_ray_serve_that_cannot_start_is_one_message(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_options: object) -> None:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(serve_module, "connect", lambda _address: contextlib.nullcontext())  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(serve_module, "_require_room", lambda _config: None)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(serve_module.serve, "start", start)
    recipe = dataclasses.replace(served.recipe, serve=dataclasses.replace(served.recipe.serve, port=free_port()))
    with pytest.raises(StepError, match=r"Ray Serve could not start \(ActorDiedError\)"):
        serve_recipe(recipe)

import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
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

import pipeline.runtime.serve as serve_module
from pipeline.errors import ConfigError, StepError
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.serve import serve_recipe
from tests.ports import free_port
from tests.readme import python_blocks
from tests.tiny.command import start_unclip
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import served_workspace

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Served:
    recipe: Recipe
    url: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("served")
    slow = "decoder.model.sampler.num_steps=100"  # long enough to leave before the end
    recipe = served_workspace(folder, overrides=(slow,))
    port = free_port()
    settings = (slow, f"serve.port={port}", "serve.max_batch_size=4", "serve.max_queued_requests=2")
    arguments = [word for setting in settings for word in ("--set", setting)]
    process = start_unclip("serve", str(folder / "tiny.toml"), *arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"tiny is served at http://127.0.0.1:{port}" in line, line + process.stdout.read()
        yield Served(recipe, f"http://127.0.0.1:{port}", process)
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
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
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


def test_overload_of_the_replica_is_429(served: Served) -> None:
    def ask(number: int) -> httpx.Response:
        body = {"prompt": f"{number}", "n": 10}
        return httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["message"] == "2 requests are waiting already; try again later"


def test_ctrl_c_ends_the_server_and_everything_it_started(served: Served) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert len(family) > 3
    os.killpg(served.process.pid, signal.SIGINT)
    output, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 0, output
    assert output.strip() == "stopping"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


def test_serving_an_unfinished_recipe_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clip is not finished under this recipe; first: unclip run"):
        serve_recipe(parse_recipe({"workspace": str(tmp_path)}))


def test_a_folder_of_networks_is_served_without_an_index(tmp_path: Path) -> None:
    cascade, port = make_cascade(), free_port()
    save_cascade(cascade, tmp_path / "mine")
    url = f"http://127.0.0.1:{port}"
    process = start_unclip("serve", str(tmp_path / "mine"), "--set", f"serve.port={port}")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"mine is served at {url}" in line, line + process.stdout.read()
        assert process.stdout.readline().startswith("without neighbours: download is not finished")
        body = {"prompt": "a red circle", "seed": 7}
        [image] = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()["data"]
        expected = cascade.sample(["a red circle"], [7]).images[0].numpy()
        assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - expected).mean() < 0.1
        answer = httpx.post(f"{url}/knn-service", json={"text": "a", "modality": "image", "num_images": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "index_not_found")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


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

    monkeypatch.delenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", raising=False)
    monkeypatch.setattr(serve_module, "connect", lambda _address: contextlib.nullcontext())  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(serve_module, "_require_room", lambda _config: None)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(serve_module.serve, "start", start)
    recipe = dataclasses.replace(served.recipe, serve=dataclasses.replace(served.recipe.serve, port=free_port()))
    with pytest.raises(StepError, match=r"Ray Serve could not start \(ActorDiedError\)"):
        serve_recipe(recipe)
    assert (
        float(os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= 60
    )  # Ray's own 5 s are too few on a busy machine

"""A server whose networks are swapped for others, with Ray Serve in its local mode."""

import base64
import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

import pipeline.runtime.lookout as lookout_module
import pipeline.runtime.serve as serve_module
import pipeline.runtime.watch as watch_module
from pipeline.errors import StepError, UnclipError
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.runtime.deployments import networks_application
from pipeline.runtime.front import Front
from pipeline.runtime.lookout import Lookout
from pipeline.runtime.neighbours import remote_parts
from pipeline.runtime.parts import digest_of
from pipeline.runtime.serve import serve_recipe
from pipeline.runtime.served import Served, served_artifacts
from pipeline.runtime.watch import Watch
from pipeline.serve.http_server import listen
from pipeline.serve.keeper import Notes, SwapRequests
from pipeline.serve.protocols import Images
from tests.models.tiny_models import randomise
from tests.ports import free_port
from tests.serve.test_engine import wait_until
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.shards import pixels


def test_ray_serve_loads_a_recipe_and_swaps_it_for_another(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Ray Serve's local mode: its own code around the replica, in this process."""
    save_other(tmp_path / "mine")
    served = Served(recipe, served_artifacts(recipe)[0])
    handle = local_handle(served)
    deployed, during = list[Any](), list[Any]()

    def deploy(targets: list[Any], **_: object) -> None:
        """The replicas have loaded the new networks, and the server has yet to turn to them."""
        deployed.extend(targets)
        during.append(picture())

    monkeypatch.setattr(serve_module.serve, "run_many", deploy)
    front, lines = Front(recipe.serve), list[str]()
    front.open(recipe, served.artifacts, *remote_parts(served.tables, {"networks": handle}, front.upkeep))
    watch = Watch(served, front, {"networks": handle}, lines.append, ExitStack(), SwapRequests())
    client = TestClient(front, base_url="http://127.0.0.1")

    def picture() -> tuple[Images, dict[str, str]]:
        """A picture, and the networks that its file names."""
        [image] = client.post("/v1/images/generations", json={"prompt": "a", "seed": 3}).json()["data"]
        file = base64.b64decode(image["b64_json"])
        with Image.open(io.BytesIO(file)) as opened:
            return pixels(file).astype(int), json.loads(opened.text["unclip"])["networks"]  # pyright: ignore[reportAttributeAccessIssue]

    before, named = picture()
    assert client.get("/healthz").json()["pictures"] == 1
    watch.swap(recipe)
    assert (lines, front.upkeep.served) == (["nothing to swap: these networks are served already"], "")
    watch.swap(load_recipe(tmp_path / "mine"))
    assert front.upkeep.served == digest_of(watch._served.tables) != digest_of(served.tables)
    assert lines[1:3] == ["loading other networks", "other networks are served"]
    [_, _, _, lacks] = lines
    assert lacks.startswith("without neighbours")
    assert (during[0][0] == before).all()
    assert during[0][1] == named
    expected = load_cascade(served_artifacts(load_recipe(tmp_path / "mine"))[0]).sample(["a"], [3]).images[0].numpy()
    assert np.abs(picture()[0] - expected).mean() < 0.1
    assert np.abs(before - expected).mean() > 1
    [target] = deployed  # for replicas that start later
    assert target.target._bound_deployment.user_config["artifacts"]["prior"] == str(tmp_path / "mine/prior")
    with pytest.raises(UnclipError):
        watch.swap(recipe_of_nothing(tmp_path))
    assert np.abs(picture()[0] - expected).mean() < 0.1

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("RuntimeError: the controller is gone")

    monkeypatch.setattr(serve_module.serve, "run_many", fail)
    with pytest.raises(StepError, match="the controller is gone"):
        watch.swap(recipe)
    assert np.abs(picture()[0] - expected).mean() < 0.1  # the replicas have gone back
    monkeypatch.setattr(front, "build", fail)
    with pytest.raises(RuntimeError):
        watch.swap(recipe)
    assert np.abs(picture()[0] - expected).mean() < 0.1


def test_a_swap_to_a_smaller_cascade_refuses_nothing_while_it_loads(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests ask by default for the side of the cascade that the server's page names."""
    cascade = make_cascade()
    cascade.stages = cascade.stages[:-1]
    save_cascade(cascade, tmp_path / "small")
    served = Served(recipe, served_artifacts(recipe)[0])
    handle, front, sides = local_handle(served), Front(recipe.serve), list[int]()
    front.open(recipe, served.artifacts, *remote_parts(served.tables, {"networks": handle}, front.upkeep))
    client = TestClient(front, base_url="http://127.0.0.1")

    def ask(*_: object, **__: object) -> None:
        answer = client.post("/v1/images/generations", json={"prompt": "a", "size": "auto"})
        assert answer.status_code == 200, answer.text
        sides.append(pixels(base64.b64decode(answer.json()["data"][0]["b64_json"])).shape[0])

    monkeypatch.setattr(serve_module.serve, "run_many", ask)
    ask()
    Watch(served, front, {"networks": handle}, lambda _: None, ExitStack(), SwapRequests()).swap(
        load_recipe(tmp_path / "small")
    )
    ask()
    assert sides == [32, 32, 16]
    chain = replace(recipe, serve=replace(recipe.serve, mode="chain"))
    with pytest.raises(StepError, match="other parts than the chain"):  # its deployments are there already
        Watch(Served(chain, {}), front, {}, lambda _: None, ExitStack(), SwapRequests()).swap(
            load_recipe(tmp_path / "small")
        )


def local_handle(served: Served) -> Any:
    """Of a replica in Ray Serve's local mode that has loaded its networks."""
    application = networks_application(served.recipe, served.artifacts)
    handle = serve.run(application, name="local", route_prefix=None, _local_testing_mode=True)
    while handle.broadcast("reconfigure", served.tables).results() != [None]:
        pass
    return handle


def test_what_is_served_is_in_use_and_nothing_else(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[str]()

    @contextmanager
    def note(one: Served, _: object = None) -> Iterator[None]:
        used.append(one.recipe.workspace)
        try:
            yield
        finally:
            used.remove(one.recipe.workspace)

    answers: list[Any] = [None]

    def results(**_: object) -> list[Any]:
        if not answers:
            raise DeploymentUnavailableError(DeploymentID("networks"))
        return answers

    def broadcast(method: str, *_: object) -> Any:
        return SimpleNamespace(results=results if method == "prepare" else lambda **_: [True])

    handle: Any = SimpleNamespace(broadcast=broadcast)
    monkeypatch.setattr(Served, "in_use", note)
    monkeypatch.setattr(serve_module.serve, "run_many", lambda *_, **__: None)
    other = load_recipe(save_other(tmp_path / "others"))
    front = Front(recipe.serve)
    front.gate.open(app := PlainTextResponse("before"))
    with ExitStack() as uses:
        served = Served(recipe, served_artifacts(recipe)[0])
        uses.enter_context(note(served))
        watch = Watch(served, front, {"networks": handle}, lambda _: None, uses, SwapRequests())
        watch.swap(recipe)
        answers[0] = OSError("OSError: no such file")
        with pytest.raises(StepError, match="no such file"):
            watch.swap(other)
        answers.clear()
        with pytest.raises(StepError, match="no replica is running"):
            watch.swap(other)
        assert used == [recipe.workspace]
        answers.append(None)
        front.gate._count(app, 1)
        watch.swap(other)
        watch._turns.look()
        assert used == [recipe.workspace, other.workspace]  # a request of before is under way
        front.gate._count(app, -1)
        watch._turns.look()
        wait_until(lambda: used == [other.workspace])
    assert used == []


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), StepError("of ours"), MemoryError()])
def test_a_swap_that_fails_in_whatever_way_ends_no_server(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As a manifest that this user may not read; the networks of before go on."""
    lines, looks = list[str](), list[int]()

    def look(_lookout: Lookout) -> None:
        looks.append(len(lines))
        if len(looks) > 200 or lines:
            raise KeyboardInterrupt

    def reload() -> Recipe:
        raise error

    monkeypatch.setattr(Lookout, "look", look)
    monkeypatch.setattr(watch_module, "_WATCH_EVERY_S", 0.01)
    requests = SwapRequests()
    requests.note()
    watch = Watch(Served(recipe, {}), Front(recipe.serve), {}, lines.append, ExitStack(), requests)
    with pytest.raises(KeyboardInterrupt):
        watch.run(reload, [])
    name = "" if isinstance(error, UnclipError) else f"{type(error).__name__}: "
    assert lines == [f"not swapped, the networks of before go on: {name}{error}"]


def save_other(folder: Path) -> Path:
    """Other networks than the fixture's."""
    other = make_cascade()
    for stage in other.stages:
        randomise(stage.network)
    save_cascade(other, folder)
    return folder


def recipe_of_nothing(folder: Path) -> Recipe:
    """A recipe whose networks are not finished."""
    return parse_recipe({"workspace": str(folder / "empty")})


def test_a_server_answers_swaps_at_sighup_and_ends_at_ctrl_c(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of ``serve_recipe``, with Ray Serve in its local mode."""
    save_other(tmp_path / "others")
    running = SimpleNamespace(
        status="RUNNING",
        deployments={"networks": SimpleNamespace(replica_states={"RUNNING": 1}, status="HEALTHY")},
    )
    handles, names = list[Any](), list[str]()

    def run_many(targets: Any, **_: object) -> list[Any]:
        [target] = targets
        names.append(target.name)
        if not handles:
            tables = target.target._bound_deployment.user_config
            handle = serve.run(target.target, name="here", route_prefix=None, _local_testing_mode=True)
            while handle.broadcast("reconfigure", tables).results() != [None]:
                pass
            handles.append(handle)
        return handles

    monkeypatch.setattr(serve_module, "connect", lambda _address: nullcontext())
    monkeypatch.setattr(serve_module, "_require_room", lambda _config: None)
    monkeypatch.setattr(serve_module, "application_state", lambda _application: running)
    monkeypatch.setattr(lookout_module, "application_state", lambda _application: running)
    monkeypatch.setattr(watch_module, "_WATCH_EVERY_S", 0.05)
    monkeypatch.setattr(serve_module.serve, "start", lambda **_: None)
    monkeypatch.setattr(serve_module.serve, "run_many", run_many)
    lines, pictures, before = list[str](), list[str](), signal.getsignal(signal.SIGHUP)
    served, notes = replace(recipe, serve=replace(recipe.serve, port=free_port())), Notes()
    url = f"http://127.0.0.1:{served.serve.port}/v1/images/generations"

    def kept() -> Any:
        return SimpleNamespace(
            listener=listen("127.0.0.1", served.serve.port),
            notes=notes,
            swap_requests=SwapRequests(),
            note_listening=lambda: os.kill(os.getpid(), signal.SIGHUP),  # long before the networks are loaded
        )

    def ask() -> None:
        pictures.append(httpx.post(url, json={"prompt": "a", "seed": 3}, timeout=60).json()["data"][0]["b64_json"])

    def announce(line: str) -> None:
        lines.append(line)
        if line.startswith("without neighbours") and not pictures:
            ask()  # of the networks that it started with
        if line == "other networks are served":
            threading.Thread(target=lambda: (ask(), os.kill(os.getpid(), signal.SIGINT))).start()

    def announce_again(line: str) -> None:
        lines.append(line)
        if line.startswith("without neighbours"):
            threading.Thread(target=lambda: (ask(), os.kill(os.getpid(), signal.SIGINT))).start()

    try:
        serve_recipe(served, reload=lambda: load_recipe(tmp_path / "others"), announce=announce, kept=kept())
        serve_recipe(served, announce=announce_again, kept=kept())  # as after a kill
    finally:
        signal.signal(signal.SIGHUP, before)
    words = [line.split()[0] for line in lines]
    swap = ["serve.name", "serve.port", "loading", "other", "without"]
    assert words == ["mine", "without", *swap, "stopping", "mine", "without", "stopping"]
    first, second, third = pictures
    assert first != second == third
    assert names == ["unclip-mine"] * 3  # another application would have been another name

import asyncio
import base64
import os
import signal
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from ray import serve
from starlette.testclient import TestClient

import pipeline.runtime.replicas as replicas_module
import pipeline.runtime.serve as serve_module
from models.request import SampleRequest
from pipeline.errors import ConfigError, UnclipError
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.runtime.front import Front, FrontReplica, served_artifacts
from pipeline.runtime.replicas import ModelReplica, networks_application, networks_options, read_tables, write_tables
from pipeline.runtime.serve import _Watch, serve_recipe
from pipeline.runtime.serve_file import application, serve_file
from pipeline.serve.protocols import Images, NotServing, SampledPictures
from tests.models.tiny_models import randomise
from tests.ports import free_port
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.shards import pixels


class FakeEngine:
    """Answers with its own number once it may."""

    alive = True

    def __init__(self, number: int) -> None:
        self.number = number
        self.may_answer = asyncio.Event()
        self.num_active = 0
        self.is_closed = False

    async def sample(self, _request: SampleRequest, _client: str) -> SampledPictures:
        self.num_active += 1
        await self.may_answer.wait()
        self.num_active -= 1
        return SampledPictures(np.full((1, 1, 1, 3), self.number, np.uint8), None)

    def counts(self) -> dict[str, int]:
        return {"waiting": 0, "active": self.num_active}

    def close(self) -> None:
        assert not self.num_active
        self.is_closed = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[int, FakeEngine]:
    """The engines that were loaded, by the number in their tables."""
    loaded: dict[int, FakeEngine] = {}

    def load(tables: Any) -> FakeEngine:
        if tables["number"] < 0:
            raise OSError("no such file")
        loaded[tables["number"]] = FakeEngine(tables["number"])
        return loaded[tables["number"]]

    monkeypatch.setattr(replicas_module, "_load_engine", load)
    monkeypatch.setattr(replicas_module, "_IDLE_POLL_S", 0.01)
    return loaded


def test_a_request_ends_with_the_networks_that_it_began_with(engines: dict[int, FakeEngine]) -> None:
    async def swap() -> tuple[SampledPictures, SampledPictures]:
        replica, request = ModelReplica(), SampleRequest("a", (1,))
        with pytest.raises(NotServing, match="are loading"):
            await replica.sample(request)
        await replica.reconfigure({"number": 1})
        first = asyncio.ensure_future(replica.sample(request))
        await asyncio.sleep(0.01)
        await replica.reconfigure({"number": 2})
        second = asyncio.ensure_future(replica.sample(request))
        engines[2].may_answer.set()
        answer = await second
        assert not engines[1].is_closed
        engines[1].may_answer.set()
        pictures = await first
        while not engines[1].is_closed:
            await asyncio.sleep(0.01)
        assert not engines[2].is_closed
        return pictures, answer

    first, second = asyncio.run(asyncio.wait_for(swap(), 30))
    assert (first.images.max(), second.images.max()) == (1, 2)


def test_networks_that_cannot_be_loaded_leave_the_old_ones_and_the_same_are_not_loaded_again(
    engines: dict[int, FakeEngine],
) -> None:
    async def swap() -> None:
        replica = ModelReplica()
        await replica.reconfigure({"number": 1})
        loaded = engines[1]
        await replica.reconfigure({"number": 1})
        assert engines[1] is loaded
        with pytest.raises(OSError, match="no such file"):
            await replica.reconfigure({"number": -1})
        loaded.may_answer.set()
        assert (await replica.sample(SampleRequest("a", (1,)))).images.max() == 1

    asyncio.run(swap())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("networks") / "mine"
    save_cascade(make_cascade(), folder)
    return load_recipe(folder)


def test_tables_hold_a_recipe_and_where_its_artifacts_are(recipe: Recipe) -> None:
    artifacts, reason = served_artifacts(recipe)
    assert reason.startswith("without neighbours")
    tables = yaml.safe_load(yaml.safe_dump(write_tables(recipe, artifacts)))
    read, places = read_tables(tables)
    assert read == recipe
    assert {name: place.uri for name, place in places.items()} == {name: one.uri for name, one in artifacts.items()}
    assert all(Path(place.uri).is_absolute() for place in places.values())


def test_replicas_are_a_number_or_scale_between_two() -> None:
    fixed = networks_options(parse_recipe({"serve": {"replicas": [2, 2], "accelerator": "cuda"}}).serve)
    assert fixed["num_replicas"] == 2
    assert fixed["ray_actor_options"]["num_gpus"] == 1
    scaled = networks_options(parse_recipe({"serve": {"replicas": [1, 4], "target_requests": 3}}).serve)
    scaling = scaled["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 3)
    assert "num_replicas" not in scaled
    for impossible in ([0, 1], [2, 1], [1]):
        with pytest.raises(ConfigError, match=r"serve\.?.*replicas"):
            parse_recipe({"serve": {"replicas": impossible}})


def test_the_file_for_serve_deploy_names_what_it_imports(recipe: Recipe) -> None:
    file = yaml.safe_load(serve_file(recipe))
    [served] = file["applications"]
    assert served["name"] == "mine"
    assert served["import_path"] == "pipeline.runtime.serve_file:application"
    assert file["http_options"] == {"host": "127.0.0.1", "port": 8000}
    names = {deployment["name"] for deployment in served["deployments"]}
    bound = application._bound_deployment
    assert names == {bound.name, bound.init_args[0]._bound_deployment.name}
    open_to_all = parse_recipe({"serve": {"host": "0.0.0.0"}})
    with pytest.raises(ConfigError, match=r"serve\.host: 0\.0\.0\.0 is open"):
        serve_file(open_to_all)


def test_the_http_interface_of_serve_deploy_opens_with_its_recipe(recipe: Recipe) -> None:
    front = FrontReplica(object())  # pyright: ignore[reportArgumentType]
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")
    assert client.get("/readyz").status_code == 503
    no_message: Any = None
    asyncio.run(front.__serve_build_asgi_app__()({"type": "lifespan"}, no_message, no_message))
    front.reconfigure(write_tables(recipe, served_artifacts(recipe)[0]))
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert "X-Request-Id" not in ready.headers  # Ray Serve's proxy adds it
    assert client.get("/v1/models").json()["data"][0]["id"] == "mine"


def test_ray_serve_loads_a_recipe_and_swaps_it_for_another(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Ray Serve's local mode: its own code around the replica, in this process."""
    other = make_cascade()
    for stage in other.stages:
        randomise(stage.network)
    save_cascade(other, tmp_path / "mine")
    artifacts, _ = served_artifacts(recipe)
    handle = serve.run(
        networks_application(recipe, artifacts), name="local", route_prefix=None, _local_testing_mode=True
    )
    deployed: list[Any] = []
    monkeypatch.setattr(serve_module.serve, "run_many", lambda targets, **_: deployed.extend(targets))
    front, lines = Front(recipe.serve), list[str]()
    watch = _Watch(recipe, artifacts, front, handle, lines.append, ExitStack())
    while handle.broadcast("reconfigure", write_tables(recipe, artifacts)).results() != [None]:
        pass
    front.open(recipe, artifacts, handle)
    client = TestClient(front, base_url="http://127.0.0.1")

    def picture() -> Images:
        [image] = client.post("/v1/images/generations", json={"prompt": "a", "seed": 3}).json()["data"]
        return pixels(base64.b64decode(image["b64_json"])).astype(int)

    before = picture()
    assert client.get("/healthz").json()["pictures"] == 1
    watch.swap(recipe)
    assert lines == ["nothing to swap: these networks are served already"]
    watch.swap(load_recipe(tmp_path / "mine"))
    assert lines[1:] == ["loading other networks", "other networks are served"]
    expected = load_cascade(served_artifacts(load_recipe(tmp_path / "mine"))[0]).sample(["a"], [3]).images[0].numpy()
    assert np.abs(picture() - expected).mean() < 0.1
    assert np.abs(before - expected).mean() > 1
    [target] = deployed  # for replicas that start later
    assert target.target._bound_deployment.user_config["artifacts"]["prior"] == str(tmp_path / "mine/prior")
    with pytest.raises(UnclipError):
        watch.swap(recipe_of_nothing(tmp_path))
    assert np.abs(picture() - expected).mean() < 0.1


def recipe_of_nothing(folder: Path) -> Recipe:
    """A recipe whose networks are not finished."""
    return parse_recipe({"workspace": str(folder / "empty")})


def test_a_server_answers_swaps_at_sighup_and_ends_at_ctrl_c(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of ``serve_recipe``, with Ray Serve in its local mode."""
    other = make_cascade()
    for stage in other.stages:
        randomise(stage.network)
    save_cascade(other, tmp_path / "mine")
    running = SimpleNamespace(
        status="RUNNING", deployments={"networks": SimpleNamespace(replica_states={"RUNNING": 1})}
    )
    handles: list[Any] = []

    def run_many(targets: Any, **_: object) -> list[Any]:
        [target] = targets
        if not handles:
            tables = target.target._bound_deployment.user_config
            handle = serve.run(target.target, name="here", route_prefix=None, _local_testing_mode=True)
            while handle.broadcast("reconfigure", tables).results() != [None]:
                pass
            handles.append(handle)
        return handles

    monkeypatch.setattr(serve_module, "connect", lambda _address: nullcontext())
    monkeypatch.setattr(serve_module, "_require_room", lambda _config: None)
    monkeypatch.setattr(serve_module, "_application", lambda _recipe: running)
    monkeypatch.setattr(serve_module, "_WATCH_EVERY_S", 0.05)
    monkeypatch.setattr(serve_module.serve, "start", lambda **_: None)
    monkeypatch.setattr(serve_module.serve, "run_many", run_many)
    lines, pictures, before = list[str](), list[str](), signal.getsignal(signal.SIGHUP)
    served = replace(recipe, serve=replace(recipe.serve, port=free_port()))
    url = f"http://127.0.0.1:{served.serve.port}/v1/images/generations"

    def ask() -> None:
        pictures.append(httpx.post(url, json={"prompt": "a", "seed": 3}, timeout=60).json()["data"][0]["b64_json"])

    def announce(line: str) -> None:
        lines.append(line)
        if line.startswith("without neighbours"):
            threading.Thread(target=lambda: (ask(), os.kill(os.getpid(), signal.SIGHUP))).start()
        if line == "other networks are served":
            threading.Thread(target=lambda: (ask(), os.kill(os.getpid(), signal.SIGINT))).start()

    try:
        serve_recipe(served, reload=lambda: load_recipe(tmp_path / "mine"), announce=announce)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [line.split()[0] for line in lines] == ["mine", "without", "loading", "other", "stopping"]
    assert len(set(pictures)) == 2

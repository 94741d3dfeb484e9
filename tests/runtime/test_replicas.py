import asyncio
import base64
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import ray.exceptions
import yaml
from ray import serve
from ray.serve.handle import DeploymentBroadcastResponse
from starlette.testclient import TestClient

import pipeline.runtime.replicas as replicas_module
import pipeline.runtime.serve as serve_module
from models.request import SampleRequest
from pipeline.errors import ConfigError, StepError, UnclipError
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.runtime.front import Front, FrontReplica, served_artifacts
from pipeline.runtime.replicas import (
    ModelReplica,
    RemoteModel,
    networks_application,
    networks_options,
    part_tables,
    parts_of,
    read_tables,
    write_tables,
)
from pipeline.runtime.serve import _Watch, serve_recipe
from pipeline.runtime.serve_file import application, serve_file
from pipeline.serve.protocols import Images, NotServing, Overloaded, SampledPictures
from tests.models.tiny_models import randomise
from tests.ports import free_port
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.shards import pixels, plain_picture


class FakeEngine:
    """Answers with its own number once it may."""

    alive = True

    def __init__(self, number: int) -> None:
        self.number = number
        self.may_answer = asyncio.Event()
        self.num_active = 0
        self.is_closed = False

    async def sample(self, _request: SampleRequest, _client: str, _work: None) -> SampledPictures:
        self.num_active += 1
        await self.may_answer.wait()
        self.num_active -= 1
        return SampledPictures(np.full((1, 1, 1, 3), self.number, np.uint8), None)

    @property
    def idle(self) -> bool:
        return not self.num_active

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
    assert read == with_absolute_paths(recipe)
    assert {name: place.uri for name, place in places.items()} == {name: one.uri for name, one in artifacts.items()}
    assert all(Path(place.uri).is_absolute() for place in places.values())


def test_tables_hold_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = parse_recipe({"workspace": "work", "serve": {"keys": "keys.json", "access_log": "log"}})
    tables = write_tables(relative, {})["recipe"]
    assert tables["workspace"] == str(tmp_path / "work")
    assert (tables["serve"]["keys"], tables["serve"]["access_log"]) == (
        str(tmp_path / "keys.json"),
        str(tmp_path / "log"),
    )


def chained(recipe: Recipe) -> Recipe:
    return replace(recipe, serve=replace(recipe.serve, mode="chain"))


def test_a_chain_of_deployments_samples_what_the_cascade_does(recipe: Recipe) -> None:
    """In Ray Serve's local mode; each part has the weights of its own networks alone."""
    artifacts, _ = served_artifacts(recipe)
    chain, handles = chained(recipe), dict[str, Any]()
    tables = write_tables(chain, artifacts)
    assert parts_of(chain) == {"prior": ("clip", "prior"), "decoder": ("decoder",), "upsampler_1": ("upsampler_1",)}
    for part in parts_of(chain):
        deployment: Any = serve.deployment(ModelReplica, name=part, user_config=part_tables(chain, tables, part))
        handles[part] = serve.run(deployment.bind(), name=part, route_prefix=None, _local_testing_mode=True)
        while handles[part].broadcast("reconfigure", part_tables(chain, tables, part)).results() != [None]:
            pass
    front = Front(chain.serve)
    front.open(chain, artifacts, handles)
    client = TestClient(front, base_url="http://127.0.0.1")
    body = {"prompt": "a", "seed": 3, "n": 2}
    data = client.post("/v1/images/generations", json=body).json()["data"]
    expected = load_cascade(artifacts).sample(["a", "a"], [3, 4]).images.numpy()
    for image, picture in zip(data, expected, strict=True):
        assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - picture).mean() < 0.1
    lines = client.post("/v1/images/generations", json=body | {"stream": True, "partial_images": 2}).text.splitlines()
    kinds = [line.removeprefix("event: image_generation.") for line in lines if line.startswith("event: ")]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    files = {"image": plain_picture("red")}
    answer = client.post("/v1/images/text-diffs", data={"source": "a red circle", "target": "a star"}, files=files)
    assert answer.status_code == 200, answer.text
    small = client.post("/v1/images/generations", json=body | {"size": "16x16"}).json()
    assert pixels(base64.b64decode(small["data"][0]["b64_json"])).shape == (16, 16, 3)
    stats = client.get("/healthz").json()
    assert (stats["requests"], stats["active"], stats["waiting"]) == (4, 0, 0)
    stale: Any = {**tables, "artifacts": {**tables["artifacts"], "embed": "elsewhere"}}
    handles["decoder"].broadcast("reconfigure", {**stale, "part": "decoder", "steps": ["decoder"]}).results()
    assert client.post("/v1/images/generations", json=body).status_code == 200  # the older engine ends what it began


def test_a_chain_places_each_part_by_its_own_table() -> None:
    decoder = {"replicas": [1, 3], "gpus_per_replica": 0.5, "memory_gb_per_replica": 2, "label_selector": {"b": "2"}}
    tables = {"mode": "chain", "accelerator": "cuda", "label_selector": {"a": "1"}, "decoder": decoder}
    config = parse_recipe({"serve": tables}).serve
    options = networks_options(config, "decoder")
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert options["ray_actor_options"] == {
        "num_cpus": 1.0, "num_gpus": 0.5, "memory": 2 * 10**9, "label_selector": {"a": "1", "b": "2"},
    }  # fmt: skip
    assert networks_options(config, "prior")["ray_actor_options"]["num_gpus"] == 1
    with pytest.raises(ConfigError, match=r'serve\.decoder: only read with serve\.mode = "chain"'):
        parse_recipe({"serve": {"decoder": decoder}})


def test_a_chain_refuses_more_requests_than_it_may_hold(recipe: Recipe) -> None:
    never = SimpleNamespace(sample=SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future()))
    model = RemoteModel({"prior": never}, most=1)  # pyright: ignore[reportArgumentType]

    async def ask() -> None:
        first = asyncio.ensure_future(model.sample(SampleRequest("a", (1,))))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="1 requests are under way"):
            await model.sample(SampleRequest("b", (1,)))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not model._num_open

    asyncio.run(ask())


def test_a_request_whose_replica_dies_is_begun_once_more() -> None:
    pictures, calls = SampledPictures(np.zeros((1, 1, 1, 3), np.uint8), None), list[str]()

    async def answer(outcomes: list[Any]) -> SampledPictures:
        def remote(request: SampleRequest, *_: object) -> asyncio.Future[Any]:
            calls.append(request.prompt)
            future = asyncio.get_running_loop().create_future()
            outcome = outcomes.pop(0)
            (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)
            return future

        handle: Any = SimpleNamespace(sample=SimpleNamespace(remote=remote))
        return await RemoteModel({"networks": handle}).sample(SampleRequest("a", (1,)))

    died = [ray.exceptions.ActorDiedError() for _ in range(2)]
    assert asyncio.run(answer([died[0], pictures])) is pictures
    with pytest.raises(NotServing, match="no replica is ready"):
        asyncio.run(answer(list(died)))
    assert calls == ["a"] * 4


class Answer:
    """What Ray Serve holds of one replica's answer; ``None`` never comes."""

    def __init__(self, value: dict[str, int] | None) -> None:
        self.value = value

    def get(self, timeout_s: float) -> dict[str, int]:
        if self.value is None:
            time.sleep(timeout_s)
            raise TimeoutError
        return self.value

    async def get_async(self) -> dict[str, int]:
        return await asyncio.to_thread(self.get, 0.5)


def test_one_slow_replica_hides_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "_STATS_TIMEOUT_S", 0.05)

    async def answers() -> Any:
        return [Answer({"requests": 1}), Answer(None), Answer({"requests": 2})]

    handle: Any = SimpleNamespace(broadcast=lambda _method: DeploymentBroadcastResponse(answers(), None))
    assert asyncio.run(RemoteModel({"networks": handle}).stats()) == {"requests": 3}


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
    bound = application(served["args"])._bound_deployment
    assert names == {bound.name, bound.init_kwargs["networks"]._bound_deployment.name}
    names = [one["name"] for one in yaml.safe_load(serve_file(chained(recipe)))["applications"][0]["deployments"]]
    assert names == ["http", "prior", "decoder", "upsampler_1"]
    open_to_all = parse_recipe({"serve": {"host": "0.0.0.0"}})
    with pytest.raises(ConfigError, match=r"serve\.host: 0\.0\.0\.0 is open"):
        serve_file(open_to_all)


def test_the_http_interface_of_serve_deploy_opens_with_its_recipe(recipe: Recipe) -> None:
    front = FrontReplica(networks=object())  # pyright: ignore[reportArgumentType]
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
    save_other(tmp_path / "mine")
    artifacts, _ = served_artifacts(recipe)
    handle = serve.run(
        networks_application(recipe, artifacts), name="local", route_prefix=None, _local_testing_mode=True
    )
    deployed: list[Any] = []
    monkeypatch.setattr(serve_module.serve, "run_many", lambda targets, **_: deployed.extend(targets))
    front, lines = Front(recipe.serve), list[str]()
    watch = _Watch(recipe, artifacts, front, {"networks": handle}, lines.append, ExitStack())
    while handle.broadcast("reconfigure", write_tables(recipe, artifacts)).results() != [None]:
        pass
    front.open(recipe, artifacts, {"networks": handle})
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

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("RuntimeError: the controller is gone")

    monkeypatch.setattr(serve_module.serve, "run_many", fail)
    with pytest.raises(StepError, match="the controller is gone"):
        watch.swap(recipe)
    assert np.abs(picture() - expected).mean() < 0.1  # the replicas have gone back
    monkeypatch.setattr(front, "build", fail)
    with pytest.raises(RuntimeError):
        watch.swap(recipe)
    assert np.abs(picture() - expected).mean() < 0.1


def test_what_is_served_is_in_use_and_nothing_else(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[str]()

    @contextmanager
    def note(one: Recipe) -> Iterator[None]:
        used.append(one.workspace)
        try:
            yield
        finally:
            used.remove(one.workspace)

    answers: list[Any] = [None]
    broadcast = SimpleNamespace(results=lambda **_: answers)
    handle: Any = SimpleNamespace(broadcast=lambda *_: broadcast)
    monkeypatch.setattr(serve_module, "_in_use", note)
    monkeypatch.setattr(serve_module.serve, "run_many", lambda *_, **__: None)
    other = load_recipe(save_other(tmp_path / "others"))
    with ExitStack() as uses:
        uses.enter_context(note(recipe))
        watch = _Watch(
            recipe, served_artifacts(recipe)[0], Front(recipe.serve), {"networks": handle}, lambda _: None, uses
        )
        watch.swap(recipe)
        answers[0] = OSError("OSError: no such file")
        with pytest.raises(StepError, match="no such file"):
            watch.swap(other)
        assert used == [recipe.workspace]
        answers[0] = None
        watch.swap(other)
        assert used == [other.workspace]
    assert used == []


def test_the_gate_reopens_with_the_interface_that_it_had(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"RUNNING": 0}
    state = SimpleNamespace(deployments={"networks": SimpleNamespace(replica_states=states)})
    monkeypatch.setattr(serve_module, "_application", lambda _recipe: state)
    handle: Any = object()
    artifacts, lines = served_artifacts(recipe)[0], list[str]()
    front = Front(recipe.serve)
    front.open(recipe, artifacts, {"networks": handle})
    app = front.gate._app
    watch = _Watch(recipe, artifacts, front, {"networks": handle}, lines.append, ExitStack())
    watch._look()
    assert front.gate.reason
    states["RUNNING"] = 1
    watch._look()
    assert (front.gate.reason, front.gate._app is app, lines[-1]) == ("", True, "served again")


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
        status="RUNNING", deployments={"networks": SimpleNamespace(replica_states={"RUNNING": 1})}
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
        serve_recipe(served, reload=lambda: load_recipe(tmp_path / "others"), announce=announce)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [line.split()[0] for line in lines] == ["mine", "without", "loading", "other", "stopping"]
    assert len(set(pictures)) == 2
    assert names == ["unclip-mine"] * 2  # another application would have been another name

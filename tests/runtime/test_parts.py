"""The parts of the networks as Ray Serve places them: tables, needs, and the files that name them."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from prometheus_client import generate_latest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.testclient import TestClient
from typer.testing import CliRunner

import pipeline.runtime.front_replica as front_module
import pipeline.runtime.lookout as lookout_module
from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.front import Front
from pipeline.runtime.front_replica import FrontReplica
from pipeline.runtime.parts import digest_of, networks_options, read_tables, write_tables
from pipeline.runtime.serve import missing_machine
from pipeline.runtime.serve_file import application, serve_file
from pipeline.runtime.served import served_artifacts, served_by
from pipeline.serve.keys import add_key
from pipeline.workspace.lock import used_artifacts
from pipeline.workspace.store import Workspace
from tests.serve.test_engine import wait_until
from tests.tiny.networks import make_cascade, save_cascade
from tests.tiny.workspace import served_workspace


def test_tables_hold_a_recipe_and_where_its_artifacts_are(recipe: Recipe) -> None:
    artifacts, reason = served_artifacts(recipe)
    assert reason.startswith("without neighbours")
    tables = yaml.safe_load(yaml.safe_dump(write_tables(recipe, artifacts)))
    read, places = read_tables(tables)
    assert read == with_absolute_paths(recipe)
    assert {name: place.uri for name, place in places.items()} == {name: one.uri for name, one in artifacts.items()}
    assert all(Path(place.uri).is_absolute() for place in places.values())
    assert digest_of(write_tables(read, places)) == digest_of(write_tables(recipe, artifacts))


def test_tables_hold_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = parse_recipe({"workspace": "work", "serve": {"keys": "keys.json", "access_log": "log"}})
    tables = write_tables(relative, {})["recipe"]
    assert tables["workspace"] == str(tmp_path / "work")
    assert (tables["serve"]["keys"], tables["serve"]["access_log"]) == (
        str(tmp_path / "keys.json"),
        str(tmp_path / "log"),
    )


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


@pytest.mark.parametrize("mode", ["replica", "process"])
def test_copies_of_everything_share_a_gpu_as_those_of_a_part_do(mode: str) -> None:
    table = {"mode": mode, "accelerator": "cuda", "gpus_per_replica": 0.25, "memory_gb_per_replica": 3}
    config = parse_recipe({"serve": table}).serve
    options = networks_options(config)["ray_actor_options"]
    assert options == {"num_cpus": 1.0, "num_gpus": 0.25, "memory": 3 * 10**9, "label_selector": {}}
    of_part = {"gpus_per_replica": 0.25, "memory_gb_per_replica": 3}
    chain = parse_recipe({"serve": {"mode": "chain", "accelerator": "cuda", "decoder": of_part}}).serve
    assert networks_options(chain, "decoder")["ray_actor_options"] == options


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
    lines = list[str]()
    file = yaml.safe_load(serve_file(recipe, lines.append))
    [line] = lines
    assert line.startswith("without neighbours")
    [served] = file["applications"]
    assert served["name"] == "mine"
    assert served["import_path"] == "pipeline.runtime.serve_file:application"
    assert file["http_options"] == {"host": "127.0.0.1", "port": 8000}
    names = {deployment["name"] for deployment in served["deployments"]}
    bound = application(served["args"])._bound_deployment
    assert names == {bound.name, bound.init_kwargs["networks"]._bound_deployment.name}
    chain = replace(recipe, serve=replace(recipe.serve, mode="chain"))
    names = [one["name"] for one in yaml.safe_load(serve_file(chain, lines.append))["applications"][0]["deployments"]]
    assert names == ["http", "prior", "decoder", "upsampler_1"]
    open_to_all = parse_recipe({"serve": {"host": "0.0.0.0"}})
    with pytest.raises(ConfigError, match=r"serve\.host: 0\.0\.0\.0 is open"):
        serve_file(open_to_all, lines.append)


def test_the_file_for_serve_deploy_reserves_memory_for_the_process_that_reads_the_index(recipe: Recipe) -> None:
    gateway = replace(recipe.serve.gateway, memory_gb_per_replica=2.5)
    file = yaml.safe_load(serve_file(replace(recipe, serve=replace(recipe.serve, gateway=gateway)), lambda _: None))
    http = file["applications"][0]["deployments"][0]
    assert (http["name"], http["ray_actor_options"]["memory"]) == ("http", 2_500_000_000)
    usual = yaml.safe_load(serve_file(recipe, lambda _: None))["applications"][0]["deployments"][0]
    assert "memory" not in usual["ray_actor_options"]


def test_the_file_for_serve_deploy_says_what_ends_at_its_deployment(recipe: Recipe) -> None:
    words = " ".join(line for line in serve_file(recipe, lambda _: None).splitlines() if line.startswith("#"))
    assert "`serve deploy` ends the servers of the file before" in words
    assert "`serve shutdown`" in words


@pytest.mark.parametrize("words", [("--config-only",), ("--manifest", "IMAGE")])
def test_the_command_says_what_its_file_lacks(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard error: the file is on standard output."""
    save_cascade(make_cascade(), tmp_path / "mine")
    add_key(tmp_path / "keys.json", "alice")
    monkeypatch.setattr("pipeline.runtime.kuberay._require_bucket", lambda _: None)
    settings = ("--host", "0.0.0.0", "--set", f"serve.keys={tmp_path / 'keys.json'}")
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "mine"), *settings, *words])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("without neighbours")
    assert yaml.safe_load(done.stdout)


def test_a_machine_is_large_enough_if_ray_selects_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 4.0}, "Labels": {"gpu": "H200", "zone": "a"}}
    monkeypatch.setattr("pipeline.runtime.serve.ray.nodes", lambda: [node])

    def missing(**selector: str) -> str:
        return missing_machine(parse_recipe({"serve": {"label_selector": selector}}))

    assert missing(gpu="in(H100,H200)", zone="!b") == ""
    assert missing(gpu="in(H100,L4)").startswith("a replica needs a machine with 1 CPU and gpu=in(H100,L4)")
    node["Alive"] = False
    assert missing(zone="a")


class Parts:
    """Stands for the handle of a part, and for what Ray Serve says of its replicas."""

    def __init__(self) -> None:
        self.replicas: list[set[str]] = []
        """What each of those that take requests has, by digest."""
        self.turns = list[str]()
        self.kept = set[str]()
        """What is still needed, by digest."""
        self.is_healthy = True
        self.num_fronts = 0
        """Other HTTP processes that take requests."""

    def broadcast(self, method: str, *arguments: str) -> Any:
        if not self.replicas:
            raise DeploymentUnavailableError(DeploymentID("networks"))
        if method == "turn_to":
            self.turns += arguments
        if method == "keep":
            self.kept |= {*arguments}
        answers = [bool({*arguments} & networks) for networks in self.replicas]
        return SimpleNamespace(results=lambda **_: answers)

    def state(self, application: str) -> Any:
        assert application == "mine"
        one = SimpleNamespace(
            replica_states={"RUNNING": len(self.replicas)}, status="HEALTHY" if self.is_healthy else "UNHEALTHY"
        )
        return SimpleNamespace(
            deployments={"networks": one, "http": SimpleNamespace(replica_states={"RUNNING": self.num_fronts})}
        )


@pytest.fixture
def networks() -> Parts:
    return Parts()


@pytest.fixture
def front(networks: Parts, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrontReplica]:
    monkeypatch.setattr(lookout_module, "application_state", networks.state)
    monkeypatch.setattr(front_module, "application_state", networks.state)
    context = SimpleNamespace(app_name="mine", deployment="http")
    monkeypatch.setattr(front_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(front_module, "_FIRST_LOOK_S", 0.2)
    monkeypatch.setattr(front_module, "_WATCH_EVERY_S", 0.02)
    front = FrontReplica(networks=networks)  # pyright: ignore[reportArgumentType]
    yield front
    front.close()


def test_the_http_interface_of_serve_deploy_opens_when_its_networks_are_loaded(
    recipe: Recipe, networks: Parts, front: FrontReplica
) -> None:
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")
    assert client.get("/readyz").status_code == 503
    no_message: Any = None
    asyncio.run(front.__serve_build_asgi_app__()({"type": "lifespan"}, no_message, no_message))
    first = write_tables(recipe, served_artifacts(recipe)[0])
    asyncio.run(front.reconfigure(first))
    assert client.get("/readyz").json()["error"]["message"].startswith("not ready: the networks are loading")
    networks.replicas = [{digest_of(first)}]
    wait_until(lambda: client.get("/readyz").status_code == 200)
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert "X-Request-Id" not in ready.headers  # Ray Serve's proxy adds it
    assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
    wait_until(lambda: front._front.upkeep.served == digest_of(first))


def test_an_http_process_that_starts_beside_others_takes_no_request_before_its_networks_are_loaded(
    recipe: Recipe, networks: Parts, front: FrontReplica
) -> None:
    """Ray Serve sends it none until its ``reconfigure`` is over; alone, it says 503 after a moment."""
    networks.num_fronts = 1
    tables = write_tables(recipe, served_artifacts(recipe)[0])
    with ThreadPoolExecutor() as threads:
        configured = threads.submit(lambda: asyncio.run(front.reconfigure(tables)))
        try:
            with pytest.raises(TimeoutError):
                configured.result(timeout=5 * 0.2)
        finally:
            networks.replicas = [{digest_of(tables)}]
        configured.result(timeout=60)
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")
    assert client.get("/readyz").status_code == 200


def test_the_http_interface_of_serve_deploy_swaps_when_all_replicas_have_the_other_networks(
    recipe: Recipe, networks: Parts, front: FrontReplica
) -> None:
    """Until then requests go to those of before, which the replicas keep."""
    first = write_tables(recipe, served_artifacts(recipe)[0])
    other = renamed(recipe, "other")
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")

    def name() -> str:
        return client.get("/v1/models").json()["data"][0]["id"]

    networks.replicas = [{digest_of(first)}, {digest_of(first)}]
    asyncio.run(front.reconfigure(first))
    assert client.get("/readyz").status_code == 200  # at once: beside other HTTP processes it must not say 503
    assert (name(), networks.turns) == ("mine", [digest_of(first)])
    asyncio.run(front.reconfigure(other))
    networks.replicas[0].add(digest_of(other))
    time.sleep(0.3)
    assert (name(), len(networks.turns)) == ("mine", 1)
    networks.replicas[1].add(digest_of(other))
    wait_until(lambda: name() == "other")
    assert networks.turns[1:] == [digest_of(other)]


def renamed(recipe: Recipe, name: str, **changes: Any) -> dict[str, Any]:
    """The tables of the same networks under another name."""
    serving = replace(recipe.serve, name=name, **changes)
    return write_tables(replace(recipe, serve=serving), served_artifacts(recipe)[0])


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Front]:
    """The HTTP interfaces that were closed."""
    fronts, real = list[Front](), Front.close

    def note(front: Front) -> None:
        fronts.append(front)
        real(front)

    monkeypatch.setattr(Front, "close", note)
    return fronts


def test_what_an_http_process_of_serve_deploy_serves_is_in_use(
    networks: Parts, front: FrontReplica, closed: list[Front], tmp_path: Path
) -> None:
    """Also while requests of before a swap are under way, and while other networks load."""
    changes = ("serve.drain_s=0", "serve.timeout_s=600")
    recipes = [
        served_workspace(tmp_path, overrides=(*changes, f"prior.model.diffusion.num_timesteps={number}"))
        for number in (200, 300, 400)
    ]
    tables = [served_by(recipe).tables for recipe in recipes]
    first, refused, second = (served_by(recipe).artifacts["prior"].key for recipe in recipes)
    workspace = Workspace(recipes[0].workspace)

    def used() -> set[str]:
        names = [name.partition("/") for name in used_artifacts(workspace)]
        assert {step for step, _, _ in names} >= {"decoder", "index", "embed", "download"}
        return {key for step, _, key in names if step == "prior"}

    networks.replicas = [{digest_of(tables[0]), digest_of(tables[2])}]
    asyncio.run(front.reconfigure(tables[0]))
    assert used() == {first}
    served = front._front
    under_way = served.gate.app
    assert under_way is not None
    served.gate._count(under_way, 1)
    asyncio.run(front.reconfigure(tables[1]))
    assert used() == {first, refused}
    asyncio.run(front.reconfigure(tables[2]))
    wait_until(lambda: networks.turns[-1] == digest_of(tables[2]))
    front.look()
    assert (used(), served in closed) == ({first, second}, False)
    served.gate._count(under_way, -1)
    wait_until(lambda: used() == {second})
    assert served in closed
    front.close()
    assert used_artifacts(workspace) == {}


def test_what_keys_have_used_and_what_was_measured_outlives_serve_deploy(
    recipe: Recipe, networks: Parts, front: FrontReplica, closed: list[Front], tmp_path: Path
) -> None:
    """With traces, whose spans are measured too."""
    secret = add_key(tmp_path / "keys.json", "alice", requests=2)
    settings: dict[str, Any] = {"keys": str(tmp_path / "keys.json"), "traces": "http://127.0.0.1:9", "drain_s": 0.0}
    tables = [renamed(recipe, f"number-{number}", **settings) for number in range(3)]
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")

    def get() -> int:
        return client.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code

    networks.replicas = [{digest_of(tables[0]), digest_of(tables[2])}]
    front._ledger = Mock(**{"exchange.remote.return_value.result.return_value": {}})
    asyncio.run(front.reconfigure(tables[0]))
    exchange, first = front._exchange, front._front
    assert exchange is not None
    assert [get() for _ in range(3)] == [200, 200, 429]
    asyncio.run(front.reconfigure(tables[1]))
    given_up = front._next
    asyncio.run(front.reconfigure(tables[2]))
    wait_until(lambda: networks.turns[-1] == digest_of(tables[2]))
    assert front._front is not first
    assert get() == 429
    measured = generate_latest(front._front.metrics.registry).decode()
    assert 'unclip_http_seconds_count{route="/v1/models",status="200"} 2.0' in measured
    wait_until(lambda: first in closed)
    assert given_up is not None
    assert closed == [given_up.front, first]
    assert front._exchange is exchange  # under another name, others would charge its uses once more
    wait_until(lambda: exchange.keys is front._front.keys)
    exchange.close()


def test_a_second_file_before_the_first_one_is_served_is_the_one_that_is(
    recipe: Recipe, networks: Parts, front: FrontReplica, closed: list[Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the replicas are asked for the first one's networks."""
    first, second = (renamed(recipe, name, drain_s=0.0) for name in ("first", "second"))
    networks.replicas = [{digest_of(first), digest_of(second)}]
    expected = list[Front]()

    def ask(*_: object) -> bool:
        if not expected:
            expected.append(front._front)
            front._expect(front._prepare(second))
            expected.append(front._front)
        return True

    monkeypatch.setattr(front_module, "are_served", ask)
    asyncio.run(front.reconfigure(first))
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert client.get("/v1/models").json()["data"][0]["id"] == "second"
    wait_until(lambda: bool(networks.turns))
    assert networks.turns == [digest_of(second)]
    time.sleep(0.1)
    assert (closed, front._front) == ([expected[0]], expected[1])


def test_a_file_of_serve_deploy_that_an_http_process_cannot_serve_leaves_what_is_served(
    recipe: Recipe, networks: Parts, front: FrontReplica, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Serve would end a process whose ``reconfigure`` raises, and start one that cannot serve the file either."""
    keys, first = str(tmp_path / "keys.json"), write_tables(recipe, served_artifacts(recipe)[0])
    bad = renamed(recipe, "bad", keys=keys)
    with pytest.raises(ConfigError, match="no such file of keys"):
        asyncio.run(front.reconfigure(bad))  # nothing is served yet
    networks.replicas = [{digest_of(first), digest_of(bad)}]
    asyncio.run(front.reconfigure(first))
    asyncio.run(front.reconfigure(bad))
    assert f"not swapped, what was served before goes on: {keys}: no such file of keys" in caplog.text
    time.sleep(5 * 0.02)
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")
    assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
    assert digest_of(bad) not in networks.turns
    assert networks.kept == {digest_of(first)}  # other processes may have turned to the other ones


def test_the_http_interface_of_serve_deploy_says_that_no_replica_runs(
    recipe: Recipe, networks: Parts, front: FrontReplica
) -> None:
    tables = write_tables(recipe, served_artifacts(recipe)[0])
    client = TestClient(front.__serve_build_asgi_app__(), base_url="http://127.0.0.1")
    networks.replicas = [{digest_of(tables)}]
    asyncio.run(front.reconfigure(tables))
    networks.replicas, networks.is_healthy = [], False
    wait_until(lambda: client.get("/readyz").status_code == 503)
    assert "no replica is running" in client.get("/readyz").json()["error"]["message"]
    upkeep = front._front.upkeep
    wait_until(lambda: upkeep.absent_s("networks") > 0.1)  # the requests that wait learn it by this
    networks.replicas = [{digest_of(tables)}]
    wait_until(lambda: client.get("/readyz").status_code == 200)
    metrics = generate_latest(front._front.metrics.registry).decode()
    assert 'unclip_replica_deaths_total{part="networks"} 1.0' in metrics
    assert 'unclip_replicas{part="networks"} 1.0' in metrics
    assert client.get("/readyz").json()["note"] == "a replica has died: networks"

"""Several HTTP processes of one server: what their keys have used, and what they measure, is that of all of them."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from pipeline.errors import ConfigError
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime import ledger as ledger_module
from pipeline.runtime.ledger import Exchange, Ledger
from pipeline.runtime.serve_file import application, serve_file
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.keys import KeyRing, Meter, add_key
from pipeline.serve.metrics import HttpMetrics
from tests.serve.test_engine import wait_until
from tests.serve.test_metrics import values


class Handle:
    """Stands for Ray's handle of a ledger, which may be started anew."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.is_down = False
        self.num_calls = 0

    @property
    def exchange(self) -> Any:
        return self

    def remote(self, *arguments: Any) -> "Handle":
        self.num_calls += 1
        self.answer = asyncio.run(self.ledger.exchange(*arguments))
        return self

    def result(self, timeout_s: float) -> Any:
        assert timeout_s
        if self.is_down:
            raise TimeoutError
        return self.answer


def test_a_limit_holds_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_EVERY_S", 0.01)
    path, handle = tmp_path / "keys.json", Handle()
    add_key(path, "alice", requests=10, pixels=100)
    add_key(path, "free")
    ring = KeyRing(path)
    alice = next(key for key in map(ring.of_digest, ring._keys) if key is not None and key.name == "alice")
    meters = [Meter(clock=lambda: 0.0) for _ in range(3)]
    exchanges = [Exchange(handle, meter, ring) for meter in meters]  # pyright: ignore[reportArgumentType]

    def rests() -> list[int]:
        return [meter.rest(alice, "requests") for meter in meters]

    wait_until(lambda: handle.num_calls > 20)  # all have been heard
    for _ in range(4):
        meters[0].use(alice, "requests", 1)
    meters[1].use(alice, "requests", 3)
    wait_until(lambda: rests() == [3, 3, 3])
    meters[0].use(alice, "pixels", 80)
    meters[0].use(alice, "pixels", -30)  # paid back
    wait_until(lambda: [meter.rest(alice, "pixels") for meter in meters] == [50, 50, 50])
    handle.ledger = Ledger()  # as after its death
    meters[2].use(alice, "requests", 1)
    wait_until(lambda: rests() == [2, 2, 2])
    handle.is_down = True
    meters[2].use(alice, "requests", 1)
    calls = handle.num_calls
    wait_until(lambda: handle.num_calls > calls + 6)
    assert rests() == [2, 2, 1]
    handle.is_down = False
    wait_until(lambda: rests() == [1, 1, 1])
    assert meters[0].wait_s(alice, "requests", 2) > 0
    late = Meter(clock=lambda: 0.0)
    calls = handle.num_calls
    exchanges.append(Exchange(handle, late, ring))  # pyright: ignore[reportArgumentType]
    wait_until(lambda: handle.num_calls > calls + 20)
    assert late.rest(alice, "requests") == 10  # what others used before it started may be of hours ago
    meters[0].use(alice, "requests", 1)
    wait_until(lambda: late.rest(alice, "requests") == 9)
    for exchange in exchanges:
        exchange.close()


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    add_key(tmp_path / "keys.json", "alice", requests=10)
    return KeyRing(tmp_path / "keys.json")


def test_what_others_used_before_they_were_heard_is_not_charged_whenever_they_come(ring: KeyRing) -> None:
    handle, meter = Handle(), Meter(clock=lambda: 0.0)
    handle.is_down = True  # what it hears is said here
    exchange = Exchange(handle, meter, ring)  # pyright: ignore[reportArgumentType]
    [alice] = ring._keys.values()
    rests = list[int]()
    for used in (None, 1000, 1003, 1003, 1004):
        exchange.hear({} if used is None else {"older": {(alice.sha256, "requests"): float(used)}})
        rests.append(meter.rest(alice, "requests"))
    exchange.close()
    assert rests == [10, 10, 7, 7, 6]


def test_a_process_is_heard_before_anything_is_used_there(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_EVERY_S", 1000.0)
    handle = Handle()
    exchange = Exchange(handle, Meter(), ring)  # pyright: ignore[reportArgumentType]
    wait_until(lambda: list(handle.ledger._uses) == [exchange._who])
    exchange.close()


def test_every_process_shows_what_all_of_them_measure() -> None:
    mine, other = HttpMetrics(), HttpMetrics()
    mine.note("/", 200, 0.1, "")
    for _ in range(2):
        other.note("/", 200, 0.1, "")

    async def of_all() -> dict[str, str]:
        return {"http#1": mine.own_text(), "http#2": other.own_text()}

    class Model:
        async def metrics(self) -> dict[str, str]:
            return {}

    settings = ApiSettings(ModelCard("tiny", 32), metrics=mine, http_metrics=of_all)
    client = TestClient(create_app(Model(), None, settings))  # pyright: ignore[reportArgumentType]
    numbers = values(client.get("/metrics").text)
    counts = {key: value for key, value in numbers.items() if key[0] == "unclip_http_seconds_count"}
    assert {frozenset(key[1:]): value for key, value in counts.items()} == {
        frozenset({"/", "200", "http#1"}): 1,
        frozenset({"/", "200", "http#2"}): 2,
    }


def test_a_file_is_not_written_for_keys_with_a_mistake(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": [{"name": "alice", "sha256": "a", "request": 5}]}')
    served = parse_recipe({"workspace": str(tmp_path / "none"), "serve": {"keys": str(keys)}})
    with pytest.raises(ConfigError, match="the key 'alice': unknown word 'request'"):
        serve_file(served, pytest.fail)
    keys.unlink()  # it may be on the machines of the cluster alone
    with pytest.raises(ConfigError, match="is not finished"):
        serve_file(served, pytest.fail)


def test_the_file_scales_the_http_processes_and_shares_their_limits(recipe: Recipe) -> None:
    def written(**gateway: Any) -> tuple[Any, Any]:
        tables = {"serve": {"gateway": gateway}}
        changed = parse_recipe(tables).serve.gateway
        served = dataclasses.replace(recipe, serve=dataclasses.replace(recipe.serve, gateway=changed))
        [one] = yaml.safe_load(serve_file(served, lambda _: None))["applications"]
        return one, application(one["args"])._bound_deployment

    one, bound = written()
    assert (one["deployments"][0]["num_replicas"], "ledger" in bound.init_kwargs) == (1, False)
    scaled, bound = written(replicas=[1, 3], target_requests=20, cpus_per_replica=0.5, scale_down_after_s=30)
    assert scaled["deployments"][0]["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 20.0, "upscale_delay_s": 10.0,
        "downscale_delay_s": 30.0,
    }  # fmt: skip
    assert scaled["deployments"][0]["ray_actor_options"]["num_cpus"] == 0.5
    names = [deployment["name"] for deployment in scaled["deployments"]]
    assert names == ["http", "networks", "ledger"]
    assert bound.init_kwargs["ledger"]._bound_deployment.name == "ledger"
    with pytest.raises(ConfigError, match="the fewest"):
        parse_recipe({"serve": {"gateway": {"replicas": [3, 1]}}})

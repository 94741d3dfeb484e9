"""The look at Ray Serve each second: replicas that died, an index that is away, a controller that is silent."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

import pipeline.runtime.lookout as lookout_module
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.front import Front
from pipeline.runtime.lookout import Lookout
from pipeline.runtime.parts import NEIGHBOURS


def test_the_gate_reopens_with_the_interface_that_it_had(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"RUNNING": 0}
    state = SimpleNamespace(deployments={"networks": SimpleNamespace(replica_states=states, status="UNHEALTHY")})
    monkeypatch.setattr(lookout_module, "application_state", lambda _application: state)
    front, lines = Front(recipe.serve), list[str]()
    front.gate.open(PlainTextResponse("here"))
    app = front.gate._app
    lookout = Lookout("unclip-mine", ["networks"], front, lines.append)
    lookout.look()
    assert front.gate.reason
    assert lines[0] == "a replica has died (networks), another one is started"
    states["RECOVERING"] = 1  # what a controller that was restarted finds
    lookout.look()
    assert (front.gate.reason, front.gate._app is app, lines[-1]) == ("", True, "served again")
    assert len(lines) == 3
    client = TestClient(front, base_url="http://127.0.0.1")
    assert client.get("/readyz").json() == {"status": "ok", "note": "a replica has died: networks"}
    state.deployments["networks"].status = "HEALTHY"
    lookout.look()
    assert client.get("/readyz").json() == {"status": "ok"}
    metrics = generate_latest(front.metrics.registry).decode()
    assert 'unclip_replica_deaths_total{part="networks"} 1.0' in metrics
    assert 'unclip_replicas{part="networks"} 1.0' in metrics


def test_an_index_that_is_away_closes_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture needs it; a search then fails by itself."""
    index = SimpleNamespace(replica_states={"RUNNING": 0}, status="HEALTHY")
    networks = SimpleNamespace(replica_states={"RUNNING": 1}, status="HEALTHY")
    state = SimpleNamespace(deployments={"prior": networks, NEIGHBOURS: index})
    monkeypatch.setattr(lookout_module, "application_state", lambda _application: state)
    front, lines = Front(recipe.serve), list[str]()
    front.gate.open(PlainTextResponse("here"))
    lookout = Lookout("unclip-mine", ["prior", NEIGHBOURS], front, lines.append)
    client = TestClient(front, base_url="http://127.0.0.1")
    lookout.look()
    assert client.get("/readyz").json()["note"].startswith("no replica of the index is running")
    assert front.upkeep.absent_s(NEIGHBOURS) > 0
    assert front.upkeep.absent_s("prior") == 0
    index.replica_states["RUNNING"] = 1
    lookout.look()
    assert client.get("/readyz").json() == {"status": "ok"}
    assert (lines, front.upkeep.absent_s(NEIGHBOURS)) == ([], 0)


def test_a_controller_that_does_not_answer_is_said_and_ends_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_answer = threading.Event()
    state = SimpleNamespace(deployments={"networks": SimpleNamespace(replica_states={"RUNNING": 1}, status="HEALTHY")})

    def ask(_application: str) -> Any:
        may_answer.wait(10)
        return state

    monkeypatch.setattr(lookout_module, "application_state", ask)
    monkeypatch.setattr(lookout_module, "_CONTROLLER_ANSWERS_S", 0.05)
    front, lines = Front(recipe.serve), list[str]()
    lookout = Lookout("unclip-mine", ["networks"], front, lines.append)
    front.gate.open(PlainTextResponse("here"))
    client = TestClient(front, base_url="http://127.0.0.1")
    lookout.look()
    lookout.look()
    assert client.get("/readyz").json()["note"].startswith("Ray Serve's controller does not answer")
    assert client.get("/").text == "here"
    may_answer.set()
    while "note" in client.get("/readyz").json():
        lookout.look()
    [silent, back] = lines
    assert silent.endswith("until it has started again; requests are answered")
    assert back == "Ray Serve's controller answers again"

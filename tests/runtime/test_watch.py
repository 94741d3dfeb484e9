"""The replicas of a server before, during and after a swap: all are told what is served, whenever they start."""

import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.responses import PlainTextResponse

import pipeline.runtime.lookout as lookout_module
import pipeline.runtime.serve as serve_module
import pipeline.runtime.watch as watch_module
from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.serve_sections import ServeStageConfig
from pipeline.runtime.front import Front
from pipeline.runtime.lookout import Lookout
from pipeline.runtime.parts import NEIGHBOURS, digest_of, parts_of
from pipeline.runtime.served import Served, served_artifacts
from pipeline.runtime.watch import Watch
from pipeline.serve.keeper import SwapRequests
from tests.runtime.test_swap import save_other


def test_networks_are_swapped_although_the_index_is_away(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = replace(recipe, serve=replace(recipe.serve, mode="chain", neighbours=ServeStageConfig()))
    served = Served(chain, served_artifacts(chain)[0])
    handles: Any = {part: Replicas(digest_of(served.tables)) for part in parts_of(chain)}
    handles[NEIGHBOURS].replicas.clear()
    lines, front = list[str](), Front(chain.serve)
    monkeypatch.setattr(serve_module.serve, "run_many", lambda *_, **__: None)
    Watch(served, front, handles, lines.append, ExitStack(), SwapRequests()).swap(
        replace(load_recipe(save_other(tmp_path / "others")), name=chain.name, serve=chain.serve)
    )
    assert lines[:2] == ["loading other networks", "other networks are served"]
    assert front.gate.app is not None


def test_replicas_are_looked_after_while_others_load(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that loads for minutes, or without end."""
    states, is_loading, may_end = {"RUNNING": 1}, threading.Event(), threading.Event()
    looks, waited_in_vain = list[str](), list[bool]()
    state = SimpleNamespace(deployments={"networks": SimpleNamespace(replica_states=states, status="HEALTHY")})
    front, lines = Front(recipe.serve), list[str]()
    front.gate.open(PlainTextResponse("here"))

    def ask(_application: str) -> Any:
        looks.append(front.gate.reason)
        if is_loading.is_set():
            states["RUNNING"] = 0
        if len(looks) > 20:
            raise KeyboardInterrupt
        return state

    def swap(_watch: Watch, _recipe: Recipe) -> None:
        is_loading.set()
        waited_in_vain.append(not may_end.wait(10))

    monkeypatch.setattr(lookout_module, "application_state", ask)
    monkeypatch.setattr(watch_module, "_WATCH_EVERY_S", 0.01)
    monkeypatch.setattr(Watch, "swap", swap)
    handle: Any = object()
    watch = Watch(Served(recipe, {}), front, {"networks": handle}, lines.append, ExitStack(), SwapRequests())
    watch._swap_requests.note()
    try:
        with pytest.raises(KeyboardInterrupt):
            watch.run(lambda: recipe, [])
        assert not waited_in_vain
    finally:
        may_end.set()
    assert "no replica is running; requests are answered with 503 until others have started" in lines


class Replicas:
    """Stands for the handle of a part whose replicas load at once."""

    def __init__(self, *digests: str) -> None:
        self.replicas = [{digest} for digest in digests]
        """What each has that takes requests."""
        self.prepared_digests = list[str]()

    def broadcast(self, method: str, argument: Any = None) -> Any:
        return SimpleNamespace(results=lambda **_: self._answers(method, argument))

    def _answers(self, method: str, argument: Any) -> list[Any]:
        if not self.replicas:
            raise DeploymentUnavailableError(DeploymentID("networks"))
        if method == "prepare":
            self.prepared_digests.append(digest_of(argument))
            for replica in self.replicas:
                replica.add(digest_of(argument))
        if method == "serves":
            return [argument in replica for replica in self.replicas]
        return [None for _ in self.replicas]


def test_replicas_that_start_during_a_swap_have_the_networks_before_requests_mean_them(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start with the networks of before, and Ray Serve updates none while others start."""
    served = Served(recipe, served_artifacts(recipe)[0])
    old, front = digest_of(served.tables), Front(recipe.serve)
    handle: Any = Replicas(old)
    front.gate.open(before := PlainTextResponse("before"))
    watch = Watch(served, front, {"networks": handle}, lambda _: None, ExitStack(), SwapRequests())

    def deploy(*_: object, **__: object) -> None:
        handle.replicas.append({old})
        assert front.gate.app is before

    opened = list[bool]()
    monkeypatch.setattr(serve_module.serve, "run_many", deploy)
    monkeypatch.setattr(front.gate, "open", lambda _app: opened.append(all(len(one) == 2 for one in handle.replicas)))
    watch.swap(load_recipe(save_other(tmp_path / "others")))
    assert (opened, len(handle.replicas)) == ([True], 2)
    new = handle.prepared_digests[-1]
    handle.replicas.append({old})  # another one, after the swap
    states = {"RUNNING": 3}
    deployment = SimpleNamespace(replica_states=states, status="UPDATING")
    state = SimpleNamespace(deployments={"networks": deployment})
    monkeypatch.setattr(lookout_module, "application_state", lambda _application: state)
    watch._must_tell = False
    look(watch)
    assert new in handle.replicas[-1]
    deployment.status = "HEALTHY"
    num_prepared = len(handle.prepared_digests)
    look(watch)
    assert len(handle.prepared_digests) == num_prepared


def look(watch: Watch) -> None:
    """Look once, and wait for what that begins."""
    watch._lookout.look()
    watch._work(None)
    if watch._working is not None:
        watch._working.result(10)
        watch._work(None)


def test_the_way_back_reaches_all_parts_though_one_has_no_replica(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = replace(recipe, serve=replace(recipe.serve, mode="chain"))
    served = Served(chain, served_artifacts(chain)[0])
    old = digest_of(served.tables)
    handles: Any = {part: Replicas(old) for part in parts_of(chain)}

    def fail(*_: object, **__: object) -> None:
        handles["prior"].replicas.clear()
        raise RuntimeError("RuntimeError: the controller is gone")

    monkeypatch.setattr(serve_module.serve, "run_many", fail)
    watch = Watch(served, Front(chain.serve), handles, lambda _: None, ExitStack(), SwapRequests())
    with pytest.raises(StepError, match="the controller is gone"):
        watch.swap(load_recipe(save_other(tmp_path / "others")))
    assert [handles[part].prepared_digests[-1] == old for part in parts_of(chain)] == [False, True, True]


def test_a_server_that_comes_after_one_that_was_killed_in_a_swap_tells_its_replicas_what_is_served(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they keep what the other one has let them load beside it."""
    served = Served(recipe, served_artifacts(recipe)[0])
    deployment = SimpleNamespace(replica_states={"RUNNING": 1}, status="HEALTHY")
    state = SimpleNamespace(deployments={"networks": deployment})
    monkeypatch.setattr(lookout_module, "application_state", lambda _application: state)
    handle: Any = Replicas(digest_of(served.tables))
    watch = Watch(served, Front(recipe.serve), {"networks": handle}, lambda _: None, ExitStack(), SwapRequests())
    for _ in range(3):
        look(watch)
    assert handle.prepared_digests == [digest_of(served.tables)]


def test_replicas_that_cannot_be_told_what_is_served_are_told_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(recipe, served_artifacts(recipe)[0])
    handle: Any = Replicas(digest_of(served.tables))
    real, errors, lines = handle.broadcast, [OSError("busy"), OSError("busy")], list[str]()

    def broadcast(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return real(*arguments)

    monkeypatch.setattr(handle, "broadcast", broadcast)
    monkeypatch.setattr(Lookout, "look", lambda _: None)
    watch = Watch(served, Front(recipe.serve), {"networks": handle}, lines.append, ExitStack(), SwapRequests())
    for _ in range(4):
        look(watch)
    assert handle.prepared_digests == [digest_of(served.tables)]
    assert lines == ["new replicas cannot be told what is served; it is tried again: OSError: busy"]

"""A real `mlflow server` that is killed, hung, slow or broken in the middle of a run: the run does not notice."""

import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking.run import Tracking, send_waiting
from pipeline.workspace.store import Workspace
from tests.tiny.tracking_server import TrackingServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_NUM_POINTS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.close()


Change = Callable[[TrackingServer], None]


def _kill(server: TrackingServer) -> None:
    server.signal(signal.SIGKILL)


def _hang(server: TrackingServer) -> None:
    server.signal(signal.SIGSTOP)


def _go_on(server: TrackingServer) -> None:
    server.signal(signal.SIGCONT)


def _slow_down(server: TrackingServer) -> None:
    server.delay_s = 9.0


def _break(server: TrackingServer) -> None:
    server.is_broken = True


def _mend(server: TrackingServer) -> None:
    server.delay_s, server.is_broken = 0.0, False


def _write_rows(context: StepContext, num_rows: int) -> None:
    rows = "".join(f'{{"step": {step}, "time": {1000 + step}, "loss": {step}}}\n' for step in range(num_rows))
    context.output.write_bytes("metrics.jsonl", rows.encode())


def _quickly(action: Callable[[], Any]) -> Any:
    begun = time.monotonic()
    result = action()
    assert time.monotonic() - begun < 1.5
    return result


def _recipe(server: TrackingServer, name: str) -> Recipe:
    return parse_recipe({"name": name, "tracking": {"uri": server.uri}})


@pytest.mark.parametrize(
    ("name", "fail", "mend"),
    [
        ("killed", _kill, TrackingServer.start),
        ("hung", _hang, _go_on),
        ("slow", _slow_down, _mend),
        ("broken", _break, _mend),
    ],
)
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_run_does_not_notice_and_nothing_is_lost_or_doubled(
    name: str, fail: Change, mend: Change, when: str, server: TrackingServer, tmp_path: Path
) -> None:
    recipe, warnings = _recipe(server, f"{name}-{when}"), list[str]()
    context = StepContext(recipe, Step("prior", 1, {"train": {"num_steps": 9}}, {}), str(tmp_path))
    if when == "before":
        fail(server)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        tracking.started(context)
        _write_rows(context, 50)
        if when == "between":
            assert tracking.run_id(context, 120)
            fail(server)
        _quickly(lambda: tracking.forward(context))
        _write_rows(context, _NUM_POINTS)
        _quickly(lambda: tracking.forward(context))
        _quickly(lambda: tracking.finished(context, StepResult({"in": 1, "ok": 1})))
        begun = time.monotonic()
    assert time.monotonic() - begun < 90  # of it mlflow's import; a slow server is waited for while it takes records
    mend(server)
    (waiting,) = (tmp_path / "tracking").glob("*/outbox.jsonl")
    deadline = time.monotonic() + 120
    while waiting.read_bytes() and time.monotonic() < deadline:  # a server that has just started is slow
        send_waiting(recipe, Workspace(str(tmp_path)), warnings.append)
    if name in {"killed", "broken"}:
        assert [warning for warning in warnings if "does not answer" in warning]
        assert [warning for warning in warnings if "records wait in" in warning]

    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(server.uri)
    runs = client.search_runs([client.get_experiment_by_name(recipe.name).experiment_id])
    by_step = {run.data.tags["unclip.step"]: run for run in runs}
    assert len(runs) == len(by_step) == 2
    child = by_step["prior"]
    points = client.get_metric_history(child.info.run_id, "loss")
    assert sorted((p.step, p.value, p.timestamp) for p in points) == [
        (step, float(step), 1000 * (1000 + step)) for step in range(_NUM_POINTS)
    ]
    assert child.data.tags["mlflow.parentRunId"] == by_step["pipeline"].info.run_id
    assert {child.info.status, by_step["pipeline"].info.status} == {"FINISHED"}
    assert child.data.metrics["final.rows.ok"] == 1
    assert len(client.search_logged_models([child.info.experiment_id])) == 1


def test_two_people_with_one_recipe_and_one_server_have_two_runs(server: TrackingServer, tmp_path: Path) -> None:
    recipe = _recipe(server, "two-people")
    for name in ("one", "two"):
        context = StepContext(recipe, Step("prior", 1, {}, {}), str(tmp_path / name))
        with Tracking(recipe, Workspace(f"{tmp_path}/{name}"), pytest.fail) as tracking:
            tracking.started(context)
            assert tracking.run_id(context, 60)
            tracking.finished(context, StepResult(metrics={"who": 1.0 if name == "one" else 2.0}))

    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(server.uri)
    runs = client.search_runs([client.get_experiment_by_name(recipe.name).experiment_id])
    children = [run for run in runs if run.data.tags["unclip.step"] == "prior"]
    assert sorted(run.data.metrics["final.who"] for run in children) == [1.0, 2.0]

"""Tracking on a real sqlite store, and trackers that fail."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking import Tracking
from pipeline.workspace.store import Workspace
from tests.ports import free_port


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def _recipe(uri: str) -> Recipe:
    return parse_recipe({"name": "tracked", "tracking": {"uri": uri}})


def _context(recipe: Recipe, root: Path, key_field: int = 1) -> StepContext:
    return StepContext(recipe, Step("prior", 1, {"train": {"num_steps": key_field}}, {"embed": "abc"}), str(root))


def _write_rows(context: StepContext, num_rows: int) -> None:
    lines = "".join(f'{{"step": {step}, "loss": {1 / (step + 1)}}}\n' for step in range(num_rows))
    context.output.write_bytes("metrics.jsonl", lines.encode())


def _history(uri: str, run_id: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    points: Any = MlflowClient(tracking_uri=uri).get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in points)


def test_tracking_continues_the_run_of_a_continued_step_without_doubles(database: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    recipe = _recipe(database)
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context)
        _write_rows(context, 3)
        tracking.forward(context)
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context)
        _write_rows(context, 5)
        result = StepResult(
            counts={"in": 2, "ok": 2}, metrics={"quality": {"colour": 0.5}, "failures": {"<urlopen [Errno 111]>": 3}}
        )
        run_id = tracking.finished(context, result)
    assert _history(database, run_id) == [(step, 1 / (step + 1)) for step in range(5)]
    run: Any = MlflowClient(tracking_uri=database).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final.quality.colour"] == 0.5
    assert run.data.metrics["final.rows.ok"] == 2
    assert run.data.metrics["final.failures._urlopen _Errno 111__"] == 3
    assert run.data.params["train.num_steps"] == "1"
    assert run.data.tags["input.embed"] == "abc"


def test_tracking_failed_step_is_marked(database: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    recipe = _recipe(database)
    context = _context(recipe, tmp_path, key_field=2)
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context)
        tracking.failed(context)
    client: Any = MlflowClient(tracking_uri=database)
    experiment = client.get_experiment_by_name("tracked")
    runs = client.search_runs([experiment.experiment_id], filter_string=f"tags.`unclip.key` = '{context.step.key}'")
    assert [run.info.status for run in runs] == ["FAILED"]


def test_tracking_unreachable_server_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = _recipe(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"tracking\.uri=off"), Tracking(recipe, Workspace(str(tmp_path)), print):
        pytest.fail("entered")


def test_tracking_that_breaks_later_is_one_warning(tmp_path: Path) -> None:
    recipe = _recipe(f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    (tmp_path / "no").write_text("a file where a folder should be")
    warnings: list[str] = []
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        tracking.started(context)
        _write_rows(context, 2)
        tracking.forward(context)
        assert tracking.finished(context, StepResult()) == ""
    assert len(warnings) == 1
    assert "metrics.jsonl" in warnings[0]


def test_tracking_off_never_imports_mlflow(tmp_path: Path) -> None:
    recipe = _recipe("off")
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context)
        assert tracking.finished(context, StepResult()) == ""
    assert not list(tmp_path.glob("*.db"))

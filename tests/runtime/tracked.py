"""Runs that are tracked, and what their tracker has of them."""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StepError
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.tracking.run import Tracking
from pipeline.workspace.store import Workspace


def recipe_of(uri: str, experiment: str = "") -> Recipe:
    return parse_recipe({"name": "tracked", "tracking": {"uri": uri, "experiment": experiment}})


def context_of(recipe: Recipe, root: Path, name: str = "prior", inputs: dict[str, str] | None = None) -> StepContext:
    return StepContext(recipe, Step(name, 1, {"train": {"num_steps": 1}}, inputs or {}), str(root))


def write_rows(context: StepContext, num_rows: int, *, begun: int = 1000) -> None:
    rows = [{"step": step, "time": begun + step, "loss": 1 / (step + 1)} for step in range(num_rows)]
    rows[0]["begun"] = begun
    context.output.write_bytes("metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def client_of(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs_of(uri: str, experiment: str = "tracked") -> list[Any]:
    client = client_of(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history_of(uri: str, run_id: str) -> list[tuple[int, float, int]]:
    return sorted((p.step, p.value, p.timestamp) for p in client_of(uri).get_metric_history(run_id, "loss"))


@contextlib.contextmanager
def stopped_run(recipe: Recipe, workspace: Workspace) -> Generator[Tracking]:
    """A run that stops with an error at the end of the block."""
    tracking = Tracking(recipe, workspace, pytest.fail)
    yield tracking.__enter__()
    tracking.__exit__(StepError, StepError("stopped"), None)

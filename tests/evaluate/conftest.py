"""A tiny recipe that is evaluated once for all files of a process."""

from typing import Any

import pytest

from pipeline.evaluate.evaluate import finish, make_runner, plan_work
from pipeline.evaluate.work import Work
from pipeline.recipe.plan import inputs_of
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.workspace import evaluate_step


def evaluate_inputs(recipe: Recipe) -> dict[str, Artifact]:
    """What the evaluation of a recipe reads, by step."""
    return inputs_of(Workspace(recipe.workspace), evaluate_step(recipe))


def run_evaluate(recipe: Recipe, output: Artifact) -> tuple[Work, dict[str, Any]]:
    """Evaluate a recipe in this process: its work and its metrics."""
    work = plan_work(recipe, evaluate_inputs(recipe))
    runner = make_runner(recipe, evaluate_inputs(recipe), output, work)
    for part in work.parts:
        runner.run(part)
    return work, finish(recipe, evaluate_inputs(recipe), output, work)


@pytest.fixture(scope="session")
def evaluated(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Work, dict[str, Any]]:
    """The evaluation of the tiny recipe: its files, its work and its metrics."""
    output = Artifact(str(tmp_path_factory.mktemp("evaluated")))
    return (output, *run_evaluate(tiny, output))

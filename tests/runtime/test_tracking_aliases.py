"""The registered model: a version for each evaluation, and the aliases of the candidate and the champion."""

from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.recipe.champion import Promotion
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking.records import version_record
from pipeline.runtime.tracking.run import Tracking, send_champion, send_waiting
from pipeline.workspace.store import Workspace
from tests.runtime.tracked import client_of, context_of


def _choose(recipe: Recipe, step: Step) -> None:
    """The step's evaluation is the recipe's champion."""
    choice = Promotion(step.key, {}, {}, {}, "", "", 0.0)
    home = Workspace(recipe.workspace).artifact("recipes", recipe.name)
    home.write_json("champion.json", {"promotions": [asdict(choice)]})


def _evaluation(prior: str) -> Step:
    return Step("evaluate", 1, {"train": {"num_steps": 1}}, {"prior": prior})


def test_an_evaluation_is_a_version_of_the_registered_model(database: str, tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "registry", "workspace": str(tmp_path), "tracking": {"uri": database}})
    for key in ("a", "b"):
        context = context_of(recipe, tmp_path, "evaluate", {"prior": key})
        with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
            tracking.started(context)
            tracking.finished(context, StepResult())
    _choose(recipe, _evaluation("a"))
    send_champion(recipe, _evaluation("a"), "it is sharper", pytest.fail)
    client = client_of(database)
    version = client.get_model_version_by_alias("registry", "candidate")
    assert version.tags["unclip.prior"] == "b"
    assert version.version == 2
    champion = client.get_model_version_by_alias("registry", "champion")
    assert (champion.version, champion.description) == (1, "it is sharper")


def test_the_alias_stays_where_a_later_choice_has_put_it(database: str, tmp_path: Path) -> None:
    """Each machine has an outbox of its own: one that has waited is delivered after a later one of another machine."""
    recipe = parse_recipe({"name": "stale", "workspace": str(tmp_path), "tracking": {"uri": database}})
    first, second = _evaluation("a"), _evaluation("b")
    _choose(recipe, second)
    send_champion(recipe, second, "sharper", pytest.fail)
    send_champion(recipe, first, "of yesterday", pytest.fail)
    client = client_of(database)
    assert client.get_model_version_by_alias("stale", "champion").tags["unclip.prior"] == "b"
    assert {one.description for one in client.search_model_versions("name = 'stale'")} == {"sharper", "of yesterday"}
    for step, time_ms, candidate in ((second, 20, "b"), (first, 10, "b"), (first, 20, "a"), (second, 30, "b")):
        record = version_record(recipe, StepContext(recipe, step, str(tmp_path)), [], "candidate")
        send_waiting(recipe, Workspace(str(tmp_path)), pytest.fail, record | {"time_ms": time_ms})
        assert client.get_model_version_by_alias("stale", "candidate").tags["unclip.prior"] == candidate

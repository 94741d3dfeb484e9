from pathlib import Path

import pytest

from models.cascade import Cascade
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.sampling.sample import cascade_artifacts
from tests.evaluate.workspaces import build_tiny_workspace, make_recipe, tiny_tables


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose workspace is still empty."""
    return make_recipe(tmp_path / "workspace")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose every step up to evaluate is done, by untrained networks."""
    recipe = parse_recipe(tiny_tables(tmp_path_factory.mktemp("evaluate") / "workspace"))
    build_tiny_workspace(recipe)
    return recipe


@pytest.fixture(scope="session")
def cascade(tiny: Recipe) -> Cascade:
    """Its networks."""
    return load_cascade(cascade_artifacts(tiny))

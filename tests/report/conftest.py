from pathlib import Path

import pytest

from pipeline.recipe.recipe import Recipe
from tests.report.finished_run import make_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose workspace is still empty."""
    return make_recipe(tmp_path / "workspace")

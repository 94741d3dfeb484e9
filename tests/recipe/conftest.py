"""What the tests of recipes share."""

from pathlib import Path

import pytest

from pipeline.recipe.recipe import Recipe, parse_recipe
from tests.tiny.recipe import tiny_tables


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe, not run."""
    return parse_recipe(tiny_tables(tmp_path / "workspace"))

"""The database of the default tracker on a disk that is full."""

from pathlib import Path

import pytest

from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.tracking.place import Place
from pipeline.workspace.store import Workspace
from tests.tiny.storage import files_of_at_most


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The tracker of a new workspace."""
    return Place(parse_recipe({"name": "tiny", "workspace": str(tmp_path)}), Workspace(str(tmp_path)))


def test_a_database_that_a_full_disk_cut_off_is_made_when_there_is_room(place: Place, tmp_path: Path) -> None:
    with files_of_at_most(200_000), pytest.raises(Exception, match=r"disk|full"):
        place.tracker()
    assert list(tmp_path.iterdir()) == []
    place.tracker()
    place.tracker()  # of a database that is there
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]

"""The database of the default tracker on a disk that is full."""

import resource
from pathlib import Path

import pytest

from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.tracking.place import Place
from pipeline.workspace.store import Workspace


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The tracker of a new workspace."""
    return Place(parse_recipe({"name": "tiny", "workspace": str(tmp_path)}), Workspace(str(tmp_path)))


def test_a_database_that_a_full_disk_cut_off_is_made_when_there_is_room(place: Place, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(Exception, match=r"disk|full"):
            place.tracker()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    place.tracker()
    place.tracker()  # of a database that is there
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]

from pathlib import Path

import pytest

from tests.filter.planted import without_ray
from tests.forget.made import Made, copy_of, make_workspace


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return make_workspace(tmp_path_factory.mktemp("made") / "w")


@pytest.fixture
def made(first: Made, tmp_path: Path) -> Made:
    """A copy of it."""
    return copy_of(first, tmp_path / "w")

import contextlib
from collections.abc import Callable, Generator

import pytest
import ray

from pipeline.recipe.recipe import Recipe, load_recipe
from tests import ray_head as heads
from tests.tiny.command import ROOT
from tests.tiny.networks import make_cascade, save_cascade


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a folder of networks, as ``unclip serve FOLDER`` reads it."""
    folder = tmp_path_factory.mktemp("networks") / "mine"
    save_cascade(make_cascade(), folder)
    return load_recipe(folder)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a tracker in a local database, one for all files: to make its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def local_ray() -> Generator[None]:
    """Two CPUs in this process' own Ray, for the tests of one file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))  # inherited by the workers; a runtime_env would cost them their pool
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def ray_head() -> Callable[..., contextlib.AbstractContextManager[heads.RayHead]]:
    """``with ray_head(num_cpus=2, environment={}) as head``."""
    return heads.ray_head

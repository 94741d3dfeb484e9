"""What every test process does first."""

import os
import signal
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from models.cascade import Cascade
    from pipeline.recipe.recipe import Recipe
    from tests.data.hostile import HostileServer

# One thread a process: two processes of two threads each, on two cores, wait for one another most of the time. Set
# before any test imports torch; Ray and its workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Children of a script's background job ignore Ctrl-C, which is among what is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, those of faults and others with slow tests: the short ones fill the time beside them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("faults" not in item.path.parts, item.path not in slow))


@pytest.fixture(scope="module", autouse=True)
def _settings_of_a_files_ray() -> Generator[None]:
    """Each file begins with its environment's settings: a process that has joined a Ray without tokens keeps that.

    It then cannot start a Ray with tokens, although its environment says so.
    """
    yield
    _forget_settings_of_ray()


@pytest.fixture(autouse=True)
def _settings_of_ray() -> Generator[None]:
    """Each test, too, unless its file has one Ray for all of them."""
    yield
    _forget_settings_of_ray()


def _forget_settings_of_ray() -> None:
    if "ray._raylet" in sys.modules and not sys.modules["ray"].is_initialized():
        from ray._private.authentication_test_utils import reset_auth_token_state

        # A Ray of our own sets this for its process. A Ray without tokens that is joined later would not be heard.
        if os.environ.get("RAY_AUTH_MODE") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            del os.environ["RAY_AUTH_MODE"]
        reset_auth_token_state()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Recipe":
    """A recipe whose every step up to evaluate is done, by untrained networks."""
    from tests.tiny.workspace import evaluated_workspace  # tests of models run where pipeline's libraries are not

    return evaluated_workspace(tmp_path_factory.mktemp("tiny") / "workspace")


@pytest.fixture(scope="session")
def cascade(tiny: "Recipe") -> "Cascade":
    """Its networks."""
    from pipeline.networks.cascade import load_cascade
    from pipeline.recipe.plan import finished_artifacts
    from pipeline.recipe.steps import CASCADE_STEPS

    return load_cascade(finished_artifacts(tiny, CASCADE_STEPS))


@pytest.fixture
def hostile() -> Generator["HostileServer"]:
    """A server of pictures that does everything a server should not do, as its paths say."""
    from tests.data.hostile import HostileServer

    with HostileServer() as running:
        yield running

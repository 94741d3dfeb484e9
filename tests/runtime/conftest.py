import contextlib
from collections.abc import Callable

import pytest

from tests import ray_head as heads


@pytest.fixture(scope="session")
def unused_ports() -> Callable[[int], list[int]]:
    """Numbers of ports that nobody listens on."""
    return heads.free_ports


@pytest.fixture(scope="session")
def ray_head() -> Callable[..., contextlib.AbstractContextManager[heads.RayHead]]:
    """``with ray_head(num_cpus=2, environment={}) as head``."""
    return heads.ray_head

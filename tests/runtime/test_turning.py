"""A request whose networks one replica of several has, on a real Ray."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

import pipeline.runtime.replicas as replicas_module
from models.request import SampleRequest
from pipeline.runtime.parts import Tables, digest_of
from pipeline.runtime.remote_model import RemoteModel, answers_now
from pipeline.runtime.replicas import ModelReplica
from tests.serve.test_engine import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


class Engine:
    """Embeds texts as its number; pictures take for ever."""

    idle = False
    alive = True

    def __init__(self, tables: Tables, _metrics: Any) -> None:
        self.number = tables["number"]

    async def sample(self, *_: Any) -> None:
        await asyncio.Event().wait()

    async def embed_texts(self, _texts: Any) -> int:
        return self.number

    def close(self) -> None:
        pass


class Replica(ModelReplica):
    def __init__(self) -> None:
        replicas_module.load_engine = Engine  # pyright: ignore[reportAttributeAccessIssue]  (in this worker alone)
        super().__init__()


def tables(number: int) -> Tables:
    return {"number": number, "recipe": {"serve": {"drain_s": 60.0}}}


OLD, NEW = tables(1), tables(2)


@pytest.fixture
def handle() -> Iterator[DeploymentHandle[Any]]:
    """Of two replicas, of which the first one has the networks of before a swap, too."""
    deployment: Any = serve.deployment(
        Replica, name="networks", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=64
    )

    def run(served: Tables, count: int) -> Any:
        # With a version of our own the replica stays.
        placed = deployment.options(user_config=served, num_replicas=count, version="1", _internal=True)
        return serve.run(placed.bind(), name="turning", route_prefix=None)

    serve.start(proxy_location="Disabled")
    handle = run(OLD, 1)
    for method, argument in (("prepare", NEW), ("turn_to", digest_of(NEW))):
        answers_now(handle, method, argument)
    run(NEW, 2)
    wait_until(lambda: answers_now(handle, "serves", digest_of(NEW)) == [True, True])
    assert sorted(answers_now(handle, "serves", digest_of(OLD))) == [False, True]
    yield handle
    serve.shutdown()


def test_a_request_finds_the_only_replica_that_has_its_networks_though_it_is_the_busy_one(
    handle: DeploymentHandle[Any],
) -> None:
    model = RemoteModel({"networks": handle}, digest_of(OLD))

    async def ask() -> None:
        pictures = [asyncio.ensure_future(model.sample(SampleRequest("a", (seed,)))) for seed in range(8)]
        await asyncio.sleep(2)
        assert [await model.embed_texts(["a"]) for _ in range(8)] == [1] * 8
        assert not any(one.done() for one in pictures)
        for one in pictures:
            one.cancel()
        await asyncio.gather(*pictures, return_exceptions=True)

    asyncio.run(asyncio.wait_for(ask(), 60))

"""A chain of deployments in this process, of real networks: Ray Serve's local mode, without a Ray."""

import asyncio
import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve
from starlette.testclient import TestClient

from pipeline.errors import DataError
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.front import Front
from pipeline.runtime.parts import digest_of, most_requests, part_tables, parts_of, write_tables
from pipeline.runtime.remote_model import RemoteModel
from pipeline.runtime.replicas import ModelReplica
from pipeline.runtime.served import served_artifacts
from tests.tiny.collector import Collector, collecting
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import served_workspace


def _chained(recipe: Recipe, **serve: Any) -> Recipe:
    return replace(recipe, serve=replace(recipe.serve, mode="chain", **serve))


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collecting() as one:
        yield one


def test_a_chain_of_deployments_samples_what_the_cascade_does(recipe: Recipe, collector: Collector) -> None:
    """In Ray Serve's local mode; each part has the weights of its own networks alone."""
    artifacts, _ = served_artifacts(recipe)
    chain, handles = _chained(recipe, traces=collector.url), dict[str, Any]()
    tables = write_tables(chain, artifacts)
    assert parts_of(chain) == {"prior": ("clip", "prior"), "decoder": ("decoder",), "upsampler_1": ("upsampler_1",)}
    for part in parts_of(chain):
        deployment: Any = serve.deployment(ModelReplica, name=part, user_config=part_tables(chain, tables, part))
        handles[part] = serve.run(deployment.bind(), name=part, route_prefix=None, _local_testing_mode=True)
        while handles[part].broadcast("reconfigure", part_tables(chain, tables, part)).results() != [None]:
            pass
    front = Front(chain.serve)
    front.open(chain, artifacts, RemoteModel(handles, digest_of(tables), most_requests(chain.serve)))
    client = TestClient(front, base_url="http://127.0.0.1")
    body = {"prompt": "a", "seed": 3, "n": 2}
    trace_id = "1" * 32
    headers = {"traceparent": f"00-{trace_id}-{'2' * 16}-01"}
    data = client.post("/v1/images/generations", json=body, headers=headers).json()["data"]
    spans = collector.wait_for(trace_id, 8)
    assert [one.name for one in collector.spans(trace_id)].count("queue") == 3  # one in each part
    assert spans.keys() == {"POST /v1/images/generations", "queue", "prior", "decoder", "upsampler_1", "encode"}
    assert {one.parent_id for one in spans.values()} == {"2" * 16, spans["POST /v1/images/generations"].span_id}
    expected = load_cascade(artifacts).sample(["a", "a"], [3, 4]).images.numpy()
    for image, picture in zip(data, expected, strict=True):
        assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - picture).mean() < 0.1
    lines = client.post("/v1/images/generations", json=body | {"stream": True, "partial_images": 2}).text.splitlines()
    kinds = [line.removeprefix("event: image_generation.") for line in lines if line.startswith("event: ")]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    files = {"image": plain_picture("red")}
    answer = client.post("/v1/images/text-diffs", data={"source": "a red circle", "target": "a star"}, files=files)
    assert answer.status_code == 200, answer.text
    small = client.post("/v1/images/generations", json=body | {"size": "16x16"}).json()
    assert pixels(base64.b64decode(small["data"][0]["b64_json"])).shape == (16, 16, 3)
    stats = client.get("/healthz").json()
    assert (stats["requests"], stats["active"], stats["waiting"]) == (4, 0, 0)
    decoder, upsampler = (handles[part].broadcast("load").results()[0] for part in ("decoder", "upsampler_1"))
    assert (decoder.pictures, upsampler.pictures) == (0, 0)
    assert not decoder.stages.keys() & upsampler.stages.keys()
    passed = [load for part in (decoder, upsampler) for load in part.stages.values() if load.steps]
    assert len(passed) >= 2
    assert all(load.times.time_s > 0 for load in passed)
    stale: Any = {**tables, "artifacts": {**tables["artifacts"], "embed": "elsewhere"}}
    handles["decoder"].broadcast("reconfigure", {**stale, "part": "decoder", "steps": ["decoder"]}).results()
    assert client.post("/v1/images/generations", json=body).status_code == 200  # the older engine ends what it began


def test_networks_with_a_flipped_bit_are_not_served(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    weights = artifacts["decoder"].path("model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(damaged)
    chain = _chained(recipe)
    tables = write_tables(chain, artifacts)
    for own in (write_tables(recipe, artifacts), part_tables(chain, tables, "decoder")):
        with pytest.raises(DataError, match=r"decoder.*/model\.safetensors: does not match its checksum"):
            asyncio.run(ModelReplica().reconfigure(own))
    asyncio.run(ModelReplica().reconfigure(part_tables(chain, tables, "prior")))  # these weights are not its own
